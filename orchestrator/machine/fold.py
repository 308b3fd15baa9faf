"""The journal folded: what is known of a run and of each of its steps.

Owns the meaning of every entry.  Must never decide what comes next: `decide` does, by recording further entries.
Folding the same entries gives the same state, always; the run's row in Postgres is a copy of a part of it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from orchestrator.machine.journal import (
    Abandoned,
    Asked,
    Attempted,
    CancelAsked,
    CancelRefused,
    Carried,
    Cleared,
    CodeBegan,
    Concluded,
    Continued,
    DeadlinePassed,
    Ended,
    Entry,
    Error,
    FamilyPivot,
    Json,
    Late,
    Operated,
    Parked,
    ProbeAsked,
    Raised,
    Reported,
    Restored,
    Returned,
    Revoked,
    RollbackBegan,
    Settled,
    Signalled,
    Unasked,
    UndoAsked,
    Undone,
    Unlocked,
    Versioned,
)
from orchestrator.machine.record import WAITS, Step
from orchestrator.machine.states import (
    TERMINAL,
    Backward,
    Forward,
    RunState,
    move_backward,
    move_forward,
    move_run,
)


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What never changes about a run; `started` is the aware UTC instant that loop time counts from."""

    id: str
    saga: str
    version: int
    input: Json
    started: datetime
    queue: str
    deadline: datetime | None = None
    priority: int = 0
    parent: str = ""  # of a child: the run that asked for it
    link: int = 0  # how often the run was continued as new
    since: int = 0  # the position at which the journal of this link begins

    def child(self, key: str) -> str:
        """The id of the child that was asked for as `key`."""
        return f"{self.id}~{self.link}/{key}" if self.link else f"{self.id}/{key}"

    def pivot(self, key: str) -> str:
        """The name of a pivot of this run in its family."""
        return f"{self.id} {key}"

    def pivot_of(self, origin: str) -> str:
        """The key of a pivot of this run, by its name."""
        return origin[len(self.id) + 1 :]

    def lock(self, key: str) -> str:
        """The handle of the lock that was asked for as `key`; it stays the same in later links."""
        return f"{key}~{self.link}" if self.link else key

    @property
    def key_in_parent(self) -> str:
        """The key of this child in its parent."""
        rest = self.id[len(self.parent) :]
        return rest.partition("/")[2] if rest.startswith("~") else rest[1:]

    @property
    def target(self) -> str:
        """Who can drive it: the saga with its version."""
        return f"{self.saga}@{self.version}"


_NEVER = datetime.min.replace(tzinfo=UTC)
_FAILURES = (Forward.REJECTED, Forward.FAILED, Forward.UNKNOWN)
_ENDING_EVENTS = {
    RunState.COMPLETED: "complete",
    RunState.FAILED: "fail",
    RunState.COMPENSATED: "compensate",
    RunState.CANCELLED: "cancel",
    RunState.TERMINATED: "terminate",
    RunState.CONTINUED: "continue",
}


class Fold:
    """A run as its journal tells it; `position` counts journal rows, `at` is the instant of the last one."""

    def __init__(self, info: RunInfo) -> None:
        self.info = info
        self.position = info.since
        self.at = _NEVER
        self.begun = False  # whether saga code may have run
        self.begun_with = info.since  # the position of the row that it begins with
        self.state = RunState.PENDING
        self.steps: dict[str, Step] = {}
        self.unasked: set[str] = set()  # requests that were taken back
        self.versions: dict[str, int] = {}
        self.in_flight = 0
        self.unsettled = 0
        self.parked_keys: dict[str, Parked] = {}
        self.abandoned_effects: dict[str, Step] = {}
        self.given_up: dict[str, Step] = {}  # abandoned, and still under way, to be undone or being undone
        self.late_effects: list[Late] = []
        self.pivots_passed: set[str] = set()  # keys of pivots that succeeded, and of children with one that did
        self.pivots_in_flight = 0
        self.returned: Returned | None = None
        self.resolved = False  # a person has said what it returned
        self.raised: Error | None = None
        self.stop: CancelAsked | DeadlinePassed | None = None
        self.deadline_passed = False
        self.rollback: RollbackBegan | None = None
        self.parked: Parked | None = None
        self.terminated: Operated | None = None
        self.pauses: dict[str, Operated] = {}  # by cause: who holds the run, each until it is resumed for that cause
        self.waiting: dict[str, Step] = {}  # requests that wait for somebody else, oldest first
        self.signals: dict[str, deque[Signalled]] = {}  # those that no code has got yet
        self.signal_ids: dict[tuple[str, str], int] = {}  # by name and id: how many had come before it
        self.children: list[Step] = []
        self.locks: dict[str, str] = {}  # held or asked for: the lock's handle, by the key of its request
        self.carried: Carried | None = None
        self.carried_locks: dict[str, str] = {}  # held since an earlier link: the handle, by the lock's name
        self.reported = self.revoked = self.concluded = False
        self.granted: set[str] = set()  # keys of this child's own pivots that may begin
        self.continued: Continued | None = None
        self.restored: Restored | None = None
        self.ended: Ended | None = None
        self._entries = 0
        self._undo_stack: list[Step] | None = None

    def apply_row(self, at: datetime, entries: Iterable[Entry]) -> None:
        """Fold one committed journal row.  Raises: IllegalTransition, and then nothing more can be relied on."""
        for entry in entries:
            self.apply(entry)
        self.close_row(at)

    def apply(self, entry: Entry) -> None:
        """Fold one entry of the row that is being written."""
        self._entries += 1
        self._start()
        apply = _APPLY.get(type(entry))
        if apply is not None:
            apply(self, entry)

    def close_row(self, at: datetime) -> None:
        """End the row: count it, and settle whether the run is parked."""
        self.begun = self.begun or self._may_have_run_code(at)
        self.position += 1
        self.at = max(self.at, at)
        self._start()
        if self.state in TERMINAL:
            return
        if self.is_parked:
            if self.state is not RunState.PARKED:
                self.state = move_run(self.state, "park")
        elif self.rollback is None and self.paused:
            if self.state is not RunState.PAUSED:
                self.state = move_run(self.state, "pause")
        elif self.state is RunState.PAUSED:
            self.state = move_run(self.state, "resume")
        elif self.state is RunState.PARKED:
            self.state = move_run(self.state, "roll back" if self.rollback else "go on")
        if self.state is RunState.RUNNING and at < self.info.started:
            self.state = move_run(self.state, "wait")

    def _start(self) -> None:
        if self.state is RunState.PENDING:
            self.state = move_run(self.state, "start")

    def _may_have_run_code(self, at: datetime) -> bool:
        """Tell whether the row that ends can be one of a turn in which saga code ran.

        That is none of before the start, nor what a link takes over, nor one that left the code alone.
        """
        takes_over = self.carried is not None and self.position == self.info.since
        left_alone = self.paused or (self.parked is not None and self.parked.role != "pivot")
        return at >= self.info.started and not (takes_over or left_alone)

    # -- questions -----------------------------------------------------------------------------------------------------
    @property
    def is_parked(self) -> bool:
        """Whether a person is needed and nothing of the run is in flight."""
        return (self.parked is not None or bool(self.parked_keys)) and self.in_flight == 0

    @property
    def past_pivot(self) -> bool:
        """Whether the run has passed the point of no return, itself or in a child."""
        return bool(self.pivots_passed)

    @property
    def paused(self) -> bool:
        """Whether somebody holds the run: saga code is not resumed, whatever else is recorded."""
        return bool(self.pauses)

    @property
    def wants_code(self) -> bool:
        """Whether saga code is to be resumed."""
        return not (self.ended or self.rollback or self.parked or self.paused or self.returned or self.raised)

    def next_undo(self) -> Step | None:
        """Return the youngest request that still has to be undone, once the run rolls back and all of it is settled."""
        if self._undo_stack is None:
            self._undo_stack = list(self.steps.values())
        while self._undo_stack and not self._undo_stack[-1].owes_undo:
            self._undo_stack.pop()
        return self._undo_stack[-1] if self._undo_stack else None

    # -- one function an entry -----------------------------------------------------------------------------------------
    def _asked(self, entry: Asked) -> None:
        self.steps[entry.key] = Step(entry, self._entries)
        if self.restored:
            self._forget(self.steps[entry.key])
        self.in_flight += self.steps[entry.key].in_flight
        self.unsettled += 1
        self.unasked.discard(entry.key)
        if entry.kind in WAITS:
            self.waiting[entry.key] = self.steps[entry.key]
        if entry.kind == "lock":
            self.locks[entry.key] = self.carried_locks.pop(entry.task, "") or self.info.lock(entry.key)
        elif entry.kind == "child":
            self.children.append(self.steps[entry.key])
        self.pivots_in_flight += self.steps[entry.key].is_pivot

    def _count(self, step: Step, was: bool) -> None:
        self.in_flight += step.in_flight - was

    def _unpark(self, step: Step) -> None:
        step.parked = ""
        self.parked_keys.pop(step.key, None)

    def _attempted(self, entry: Attempted) -> None:
        step = self.steps[entry.key]
        step.lost = not entry.worker  # who would have reported its outcome
        if entry.role == "undo":
            step.undo_attempts = entry.attempt
        elif entry.role == "probe":
            step.probe_attempts = entry.attempt
        else:
            step.attempts = entry.attempt
            step.doubt = step.doubt or entry.doubt
            step.details = entry.details if entry.details is not None else step.details
            step.quiet = max(step.quiet, entry.quiet)
            step.error = entry.error

    def _settled(self, entry: Settled) -> None:
        step = self.steps[entry.key]
        was = step.in_flight
        step.forward = move_forward(step.forward, entry.outcome)
        step.attempts = max(step.attempts, entry.attempt)
        self._unpark(step)
        self.unsettled -= 1
        self.waiting.pop(entry.key, None)
        if step.asked.kind == "signal" and step.forward is Forward.SUCCEEDED:
            kept = self.signals[step.asked.task]
            kept.remove(next(signal for signal in kept if signal.id == entry.by))
        if step.asked.kind == "lock" and step.forward is not Forward.SUCCEEDED:
            self.locks.pop(step.key, None)
        step.result = entry.result
        step.error = entry.error
        step.partly = step.asked.kind == "child" and bool((entry.error or {}).get("partly"))
        step.signal_id = entry.by if step.asked.kind == "signal" else ""
        self._count(step, was)
        self.pivots_in_flight -= step.is_pivot
        if step.is_pivot and step.forward is Forward.SUCCEEDED:
            self.pivots_passed.add(step.key)
        self._note_abandoned(step)
        if step.owes_late_undo and step.forward is Forward.REJECTED:
            self.late_effects += step.undecided  # the probe, or a person, did not know of them
        awaited = self.returned is not None and not (self.resolved or step.abandoned)
        if awaited and step.forward in _FAILURES:
            self.raised = entry.error

    def _probe_asked(self, entry: ProbeAsked) -> None:
        step = self.steps[entry.key]
        was = step.in_flight
        step.forward = move_forward(step.forward, "probe")
        self._unpark(step)
        self._count(step, was)

    def _undo_asked(self, entry: UndoAsked) -> None:
        step = self.steps[entry.key]
        was = step.in_flight
        if not step.settled:
            step.forward = move_forward(step.forward, "undo")
        step.backward = move_backward(step.backward, "ask")
        self.abandoned_effects.pop(step.key, None)
        if entry.late:
            step.late, step.late_result = entry.late, entry.result
            self.late_effects.remove(
                next(e for e in self.late_effects if (e.key, e.attempt) == (entry.key, entry.late))
            )
            step.undo_budget_from = step.undo_attempts
        self._count(step, was)
        self._note_abandoned(step)  # again, if an effect came late: it had been undone

    def _undone(self, entry: Undone) -> None:
        step = self.steps[entry.key]
        was = step.in_flight
        step.backward = move_backward(step.backward, "skip" if entry.how == "skipped" else "done")
        step.undo_attempts = max(step.undo_attempts, entry.attempt)
        step.left, step.partly = entry.left, entry.how == "partly"
        self._unpark(step)
        self._count(step, was)
        self._note_abandoned(step)

    def _late(self, entry: Late) -> None:
        step = self.steps[entry.key]
        step.doubt = True
        if self.ended:
            return
        if step.owes_late_undo:
            self.late_effects.append(entry)
        elif not step.settled:
            step.undecided.append(entry)

    def _abandoned(self, entry: Abandoned) -> None:
        step = self.steps[entry.key]
        step.abandoned = True
        if step.asked.kind == "signal" and step.forward is Forward.SUCCEEDED:
            # It came just when nobody waited any more: the next one who waits gets it, the one that came first before.
            self._give_back(Signalled(step.asked.task, step.signal_id, step.result))
        self._note_abandoned(step)

    def _unasked(self, entry: Unasked) -> None:
        step = self.steps[entry.key]
        step.forward = move_forward(step.forward, "withdrawn")
        self.unsettled -= 1
        self.waiting.pop(step.key, None)
        self.unasked.add(step.key)

    def _give_back(self, signal: Signalled) -> None:
        kept, came = self.signals[signal.name], self.signal_ids
        before = itertools.takewhile(lambda other: came[other.name, other.id] < came[signal.name, signal.id], kept)
        kept.insert(len(list(before)), signal)

    def _note_abandoned(self, step: Step) -> None:
        """What nobody waits for any more is undone, but for a child in which the point of no return was passed."""
        if not step.abandoned:
            return
        owes_undo = step.owes_undo and step.key not in self.pivots_passed
        if owes_undo:
            self.abandoned_effects[step.key] = step
        if owes_undo or not step.settled or step.backward in (Backward.ASKED, Backward.PARKED):
            self.given_up[step.key] = step
        else:
            self.given_up.pop(step.key, None)

    def _versioned(self, entry: Versioned) -> None:
        self.versions[entry.key] = entry.number

    def _returned(self, entry: Returned) -> None:
        self.returned = entry
        self.parked = self.raised = None  # of a run that a person has resolved

    def _raised(self, entry: Raised) -> None:
        self.raised = entry.error

    def _cancel_asked(self, entry: CancelAsked) -> None:
        self.stop = self.stop or entry

    def _cancel_refused(self, entry: CancelRefused) -> None:
        self.stop = None

    def _deadline(self, entry: DeadlinePassed) -> None:
        self.deadline_passed = True
        self.stop = self.stop or entry

    def _rollback(self, entry: RollbackBegan) -> None:
        self.rollback = entry
        self.parked = None
        self.state = move_run(self.state, "roll back")

    def _parked(self, entry: Parked) -> None:
        if not entry.key:
            self.parked = entry
            return
        step = self.steps[entry.key]
        was = step.in_flight
        if entry.role == "undo":
            step.backward = move_backward(step.backward, "park")
        else:
            step.forward = move_forward(step.forward, "park")
        step.parked = entry.role
        self.parked_keys[step.key] = entry
        self._count(step, was)

    def _operated(self, entry: Operated) -> None:
        if entry.action == "terminate":
            self.terminated = entry
        if entry.action == "resolve" and not entry.key:
            self.resolved = True
        if entry.action == "pause":
            self.pauses[entry.cause] = entry
        elif entry.action == "resume":
            self._let_go(entry.cause)
        if entry.action != "retry":
            return  # skip and resolve say the rest with a Settled, Undone or Returned entry
        if not entry.key:
            self.parked = self.raised = self.returned = None
            return
        step = self.steps[entry.key]
        was, role = step.in_flight, step.parked
        self._unpark(step)
        if role == "undo":
            step.backward = move_backward(step.backward, "retry")
            step.undo_budget_from = step.undo_attempts
        elif role == "probe":
            step.forward = move_forward(step.forward, "probe")
            step.probe_budget_from = step.probe_attempts
        else:
            step.forward = move_forward(step.forward, "retry")
            step.budget_from = step.attempts
            step.forgotten = False
        self._count(step, was)

    def _let_go(self, cause: str) -> None:
        self.pauses.pop(cause, None)
        if self.state is RunState.PAUSED and not self.pauses:
            self.state = move_run(self.state, "resume")  # at once: the run may end within the same turn

    def _signalled(self, entry: Signalled) -> None:
        self.signals.setdefault(entry.name, deque()).append(entry)
        self.signal_ids[entry.name, entry.id] = len(self.signal_ids)

    def _unlocked(self, entry: Unlocked) -> None:
        self.locks.pop(entry.key, None)

    def _reported(self, entry: Reported) -> None:
        self.reported = True

    def _revoked(self, entry: Revoked) -> None:
        self.revoked = True

    def _concluded(self, entry: Concluded) -> None:
        self.concluded = True

    def _family_pivot(self, entry: FamilyPivot) -> None:
        if not entry.child:
            if entry.phase == "granted":
                self.granted.add(self.info.pivot_of(entry.origin))
        elif entry.phase == "asked":
            self.pivots_in_flight += 1
        elif entry.phase != "granted":
            self.pivots_in_flight -= 1
            if entry.phase == "succeeded":
                self.pivots_passed.add(entry.child)
                self.abandoned_effects.pop(entry.child, None)

    def _carried(self, entry: Carried) -> None:
        self.carried, self.carried_locks = entry, dict(entry.locks)
        self.signal_ids.update({(name, id): number for number, (name, id) in enumerate(entry.heard)})
        self.deadline_passed = entry.alarmed

    def _restored(self, entry: Restored) -> None:
        self.restored = entry
        for step in self.steps.values():
            if step.forward is Forward.ASKED:
                self._forget(step)

    def _forget(self, step: Step) -> None:
        step.forgotten = step.outlives_restore
        step.doubt = step.doubt or step.forgotten

    def _cleared(self, entry: Cleared) -> None:
        step = self.steps[entry.key]
        was = step.in_flight
        step.forward = move_forward(step.forward, "retry")
        step.forgotten = step.doubt = False
        step.budget_from = step.attempts
        self._count(step, was)

    def _code_began(self, entry: CodeBegan) -> None:
        self.begun, self.begun_with = True, self.position

    def _continued(self, entry: Continued) -> None:
        self.continued = entry

    def _ended(self, entry: Ended) -> None:
        self.ended = entry
        self.parked = None
        self.state = move_run(self.state, _ENDING_EVENTS[RunState(entry.state)])


_APPLY: dict[type, Callable[[Fold, Any], None]] = {
    Asked: Fold._asked,
    Attempted: Fold._attempted,
    Settled: Fold._settled,
    ProbeAsked: Fold._probe_asked,
    UndoAsked: Fold._undo_asked,
    Undone: Fold._undone,
    Late: Fold._late,
    Abandoned: Fold._abandoned,
    Unasked: Fold._unasked,
    Versioned: Fold._versioned,
    Returned: Fold._returned,
    Raised: Fold._raised,
    CancelAsked: Fold._cancel_asked,
    CancelRefused: Fold._cancel_refused,
    DeadlinePassed: Fold._deadline,
    RollbackBegan: Fold._rollback,
    Parked: Fold._parked,
    Operated: Fold._operated,
    Signalled: Fold._signalled,
    Unlocked: Fold._unlocked,
    Reported: Fold._reported,
    Revoked: Fold._revoked,
    Concluded: Fold._concluded,
    FamilyPivot: Fold._family_pivot,
    Restored: Fold._restored,
    Cleared: Fold._cleared,
    Continued: Fold._continued,
    Carried: Fold._carried,
    CodeBegan: Fold._code_began,
    Ended: Fold._ended,
}
