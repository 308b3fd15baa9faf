"""One transaction per outcome: the fence checked, the outcome and the whole turn written, or an arrival.

Owns rule 1 (docs/concepts.md) and the cache of live coroutines.  Saga code runs before the transaction, never in it.
"""

from __future__ import annotations

import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from time import monotonic
from typing import Any

from orchestrator.codec import Json
from orchestrator.engine.observe import tell
from orchestrator.errors import DriftError, describe_exception
from orchestrator.machine.fold import Fold, RunInfo
from orchestrator.machine.journal import (
    Arrival,
    Asked,
    AttemptEnded,
    CancelAsked,
    Late,
    LateSuccess,
    Operated,
    Parked,
    RollbackBegan,
    Settled,
    Work,
    decode_arrival,
    decode_entry,
    encode,
)
from orchestrator.machine.states import TERMINAL, RunState
from orchestrator.machine.turn import CodeError, CodeMissing, Execution, Script, Turn
from orchestrator.store import runs, turns
from orchestrator.store.connection import REFUSED, UNAVAILABLE, Connection
from orchestrator.store.turns import Commit, Loaded, RunRow, Taken

logger = logging.getLogger(__name__)
_TRIES = 1000


@dataclass(frozen=True, slots=True)
class Identity:
    """Who holds work: an incarnation and a child of it."""

    incarnation: int
    child: int


@dataclass(slots=True)
class Begun:
    """The work that a turn begins in the child that commits it."""

    work: Work
    taken: Taken


@dataclass(slots=True)
class Made:
    """What came of a turn: the work begun here, whether the run has more arrivals, whether it was written at all."""

    begun: list[Taken]
    again: bool
    written: bool = True


@dataclass(slots=True)
class Prepared:
    """A turn that is computed and not committed yet."""

    execution: Execution
    turn: Turn
    now: datetime
    consumed: list[int]
    done: Taken | None
    holds_turn: bool
    first: Begun | None = None


IsShort = Callable[[str], bool]
AfterCommit = Callable[[Connection], list[Taken]]


class Clock:
    """The database's time, carried on between statements by this process's monotonic clock."""

    def __init__(self) -> None:
        self._at = datetime.now(UTC)
        self._since = monotonic()

    def __call__(self) -> datetime:
        return self._at + timedelta(seconds=monotonic() - self._since)

    def set(self, now: datetime) -> datetime:
        """Take over the database's time."""
        self._at, self._since = now, monotonic()
        return now


@dataclass(slots=True)
class Scope:
    """What this process may begin: its queues and the targets registered here."""

    queues: Collection[str]
    targets: Collection[str]
    may_begin: Callable[[], bool] = lambda: True


class Advancer:
    """Computes turns and commits them; one per child, never shared between threads."""

    def __init__(
        self,
        script_of: Callable[[str, int], Script | None],
        scope: Scope,
        identity: Identity,
        ring: Callable[[Connection, str, int], None],
        cache_runs: int = 1000,
    ) -> None:
        self._script_of = script_of
        self._scope = scope
        self.identity = identity
        self._ring = ring
        self._cache_runs = cache_runs
        self._cache: OrderedDict[str, Execution] = OrderedDict()
        self.clock = Clock()

    # -- what happens to a run -----------------------------------------------------------------------------------------
    def start_turn(self, connection: Connection, taken: Taken) -> list[Taken]:
        """Take the turn that a run owes; returns the work that was begun by it."""
        assert taken.run is not None
        self.clock.set(taken.now)
        # Nothing was left for a run that begins when it was to; before that, whoever woke it is heard first.
        if taken.run.position == 0 and taken.run_id not in self._cache and taken.now >= taken.run.started_at:
            made = self._attempt(connection, Loaded(taken.run, taken.now, [], []), None, holds_turn=True)
            if made.written:
                return self._go_on(connection, taken.run_id, made)
        return self._advance(connection, taken.run_id, holds_turn=True)

    def record(self, connection: Connection, taken: Taken, outcome: AttemptEnded) -> list[Taken]:
        """Record what came of an attempt, with its turn if possible; returns the work that was begun by it."""
        try:
            loaded = self._known(connection, taken.run_id)
            made = self._attempt(connection, loaded, outcome, done=taken) if loaded else None
        except CodeMissing:
            self._leave(connection, taken, outcome, drivable=False)
            return []
        if made is not None and made.written:
            return self._go_on(connection, taken.run_id, made)
        if not self._leave(connection, taken, outcome, drivable=True):
            return []
        return self._advance(connection, taken.run_id)

    def start_turns(self, connection: Connection, items: list[Taken], is_short: IsShort) -> list[Taken]:
        """Take the first turns of several runs with one commit; returns the work that was begun by them.

        Only the first may begin what is not known to be short: whoever waits behind it is better off with another
        child.
        """
        prepared: list[Prepared] = []
        for item in items:
            assert item.run is not None
            if item.run.position == 0 and item.run_id not in self._cache:
                made = self._prepare(connection, Loaded(item.run, item.now, [], []), None, holds_turn=True)
                if made is not None:
                    prepared.append(made)
        begun, written = self._commit_together(connection, prepared, is_short)
        for item in items:
            if item.run_id not in written:
                begun += self._advance(connection, item.run_id, holds_turn=True, may_begin=not begun)
        return begun

    def record_together(
        self, connection: Connection, ended: list[tuple[Taken, AttemptEnded]], is_short: IsShort
    ) -> list[Taken]:
        """Record the outcomes of attempts of different runs with one commit; returns the work that they began."""
        prepared: list[Prepared] = []
        for taken, outcome in ended:
            with suppress(CodeMissing):
                loaded = self._known(connection, taken.run_id)
                made = self._prepare(connection, loaded, outcome, done=taken) if loaded else None
                if made is not None:
                    prepared.append(made)
        begun, written = self._commit_together(connection, prepared, is_short)
        for taken, outcome in ended:
            if taken.run_id not in written:
                begun += self.record(connection, taken, outcome)
        return begun

    def _commit_together(
        self, connection: Connection, prepared: list[Prepared], is_short: IsShort
    ) -> tuple[list[Taken], set[str]]:
        """Commit turns of different runs at once, in order of their ids.

        Returns what they began, and which were written.  If one of them fails they all roll back, and are for the
        caller to commit one by one.
        """
        for made in prepared:
            own = None if made is prepared[0] else is_short
            made.first = self._begin_next(made.execution.info, made.turn, made.now, own)
        try:
            committed = self._write_together(connection, prepared)
        except BaseException as error:
            for made in prepared:
                made.execution.discard()
            if isinstance(error, UNAVAILABLE) or not isinstance(error, REFUSED):
                raise
            return [], set()
        begun: list[Taken] = []
        written: set[str] = set()
        for made, result in zip(prepared, committed, strict=True):
            if not result.written:
                made.execution.discard()
                continue
            written.add(made.execution.info.id)
            after = self._after(connection, made.execution, made.turn, made.first, result.owed, made.done)
            begun += self._go_on(connection, made.execution.info.id, after)
        return begun, written

    def _write_together(self, connection: Connection, prepared: list[Prepared]) -> list[turns.Committed]:
        commits = [
            self._commit_of(made.execution, made.turn, made.first, made.consumed, made.done, made.holds_turn)
            for made in prepared
        ]
        in_order = sorted(commits, key=lambda commit: commit.run_id)
        by_run = dict(
            zip((commit.run_id for commit in in_order), turns.commit_turns(connection, in_order), strict=True)
        )
        committed = [by_run[commit.run_id] for commit in commits]
        for made in prepared:
            made.execution.committed_wake = made.turn.wake
        return committed

    def _prepare(
        self,
        connection: Connection,
        loaded: Loaded,
        outcome: AttemptEnded | None,
        *,
        done: Taken | None = None,
        holds_turn: bool = False,
    ) -> Prepared | None:
        """Compute a turn that is committed together with others; None if it is for itself."""
        try:
            execution, turn = self._compute(connection, loaded, outcome)
        except CodeMissing:
            return None
        if execution is None or turn.was_ended or turn.corrections:
            return None
        consumed = [id for id, _ in loaded.arrivals]
        return Prepared(execution, turn, loaded.now, consumed, done, holds_turn)

    def record_within(self, connection: Connection, taken: Taken, outcome: AttemptEnded) -> AfterCommit | None:
        """Record an outcome in the caller's open transaction; does not commit.

        Returns what is to be called after the commit with the child's own connection, or None if the fence was lost:
        then the caller rolls back.
        """
        drivable = True
        loaded = None
        try:
            loaded = self._known(connection, taken.run_id)
            execution, turn = self._compute(connection, loaded, outcome) if loaded else (None, _NO_TURN)
        except CodeMissing:
            execution, turn, drivable = None, _NO_TURN, False
        if execution is not None and loaded is not None:
            first = self._begin_next(execution.info, turn, loaded.now)
            consumed = [id for id, _ in loaded.arrivals]
            committed = self._write(connection, execution, turn, first, consumed, taken, holds_turn=False)
            if committed.written:
                made = partial(self._after, execution=execution, turn=turn, first=first, owed=committed.owed)
                return lambda after: self._go_on(after, taken.run_id, made(after))
            execution.discard()
        assert taken.fence is not None
        if not turns.arrive(connection, taken.run_id, taken.key, taken.fence, encode(outcome)):
            return None
        if drivable:
            return lambda after: self._advance(after, taken.run_id)
        queue = turns.owe_turn(connection, taken.run_id)

        def ring(after: Connection) -> list[Taken]:
            if queue:
                self._ring(after, queue, 1)
            return []

        return ring

    def _leave(self, connection: Connection, taken: Taken, outcome: AttemptEnded, drivable: bool) -> bool:
        """Leave the outcome as an arrival; a success that the fence refuses is left as a late effect.

        Returns whether the outcome was accepted.
        """
        assert taken.fence is not None
        queue = None
        with connection.transaction():
            accepted = turns.arrive(connection, taken.run_id, taken.key, taken.fence, encode(outcome))
            if accepted and not drivable:
                queue = turns.owe_turn(connection, taken.run_id)
        if accepted:
            if queue:
                self._ring(connection, queue, 1)
            return True
        taken.refused = True
        logger.warning("run %s step %s: attempt %s has lost its fence, its outcome is refused", taken.run_id, taken.key,
                       taken.attempt)  # fmt: skip
        if outcome.verdict == "succeeded" and not (taken.call or {}).get("n"):
            late = LateSuccess(taken.key, taken.role, taken.attempt, outcome.result, outcome.worker)
            with connection.transaction():
                queue = turns.leave_arrival(connection, taken.run_id, encode(late), anyone=True)
            if queue:
                self._ring(connection, queue, 1)
        return False

    def function_of(self, connection: Connection, taken: Taken) -> Callable[[], Any] | None:
        """Return the function of a ``saga.once`` that was begun here."""
        loaded = self._known(connection, taken.run_id)
        execution = self._execution(loaded) if loaded else None
        if execution is None:
            return None
        try:
            function = execution.function_of(taken.key)
        except Exception as error:
            execution.discard()
            logger.warning("run %s step %s: %s", taken.run_id, taken.key, error)
            return None
        self._remember(execution)
        return function

    def discard(self) -> None:
        """Drop every live coroutine."""
        while self._cache:
            self._cache.popitem()[1].discard()

    # -- turns ---------------------------------------------------------------------------------------------------------
    def _go_on(self, connection: Connection, run_id: str, made: Made) -> list[Taken]:
        """After a turn: look again for arrivals, if there are or may be some."""
        if not made.again:
            return made.begun
        return made.begun + self._advance(connection, run_id, may_begin=not made.begun)

    def _advance(
        self, connection: Connection, run_id: str, holds_turn: bool = False, may_begin: bool = True
    ) -> list[Taken]:
        """Take the run's arrivals, until there are none or another process has the run."""
        begun: list[Taken] = []
        for _ in range(_TRIES):
            loaded = self._load(connection, run_id)
            if holds_turn:
                holds_turn = turns.holds_turn(connection, run_id, self.identity.incarnation, self.identity.child)
            if loaded is None or not (loaded.arrivals or holds_turn):
                return begun
            if loaded.run.finished and not loaded.arrivals:
                turns.ignore(connection, run_id, [])
                return begun
            try:
                made = self._attempt(connection, loaded, None, holds_turn=holds_turn, may_begin=may_begin and not begun)
            except CodeMissing:
                turns.pass_on(connection, run_id)
                return begun
            if not made.written:
                if holds_turn or made.again:
                    continue
                return begun  # whoever moved the run looks again after its commit
            begun += made.begun
            holds_turn = False
            if not made.again:
                return begun
        # Not lost: its arrivals are found by the next turn.
        turns.owe_turn(connection, run_id)
        return begun

    def _attempt(
        self,
        connection: Connection,
        loaded: Loaded,
        outcome: AttemptEnded | None,
        *,
        done: Taken | None = None,
        holds_turn: bool = False,
        may_begin: bool = True,
    ) -> Made:
        """Compute and commit one turn.  Raises: CodeMissing."""
        execution, turn = self._compute(connection, loaded, outcome)
        if execution is None:
            return Made([], False, written=False)
        first = self._begin_next(execution.info, turn, loaded.now) if may_begin else None
        consumed = [id for id, _ in loaded.arrivals]
        if turn.was_ended and done is not None:
            return Made([], False, written=False)  # its fence went with the end of the run; it may be a late effect
        if turn.was_ended and not turn.entries:
            turns.ignore(connection, loaded.run.id, consumed)
            return Made([], False)
        try:
            with connection.transaction() if turn.corrections else nullcontext():
                committed = self._write(connection, execution, turn, first, consumed, done, holds_turn)
                for late in turn.corrections if committed.written else ():
                    self._correct(connection, execution, late)
        except BaseException:
            self._forget(loaded.run.id)
            execution.discard()
            raise
        if not committed.written:
            self._forget(loaded.run.id)
            execution.discard()
            return Made([], committed.owed, written=False)
        return self._after(connection, execution, turn, first, committed.owed, done)

    def _after(
        self,
        connection: Connection,
        execution: Execution,
        turn: Turn,
        first: Begun | None,
        owed: bool,
        done: Taken | None = None,
    ) -> Made:
        """After the commit: keep the coroutine, ring, say whether to look again for arrivals."""
        if done is not None:
            done.again = any(work.key == done.key and work.role == done.role for work in turn.work)
        run_id = execution.info.id
        tell(execution.fold, turn)
        if turn.state in TERMINAL:
            execution.discard()
            self._forget(run_id)
        else:
            self._remember(execution)
        self._ring_for(connection, execution.info, turn, first)
        begun = [first.taken] if first else []
        others = execution.fold.in_flight > len(begun)
        return Made(begun, owed or (others and turns.has_arrivals(connection, run_id)))

    def _compute(
        self, connection: Connection, loaded: Loaded, outcome: AttemptEnded | None
    ) -> tuple[Execution | None, Turn]:
        arrivals: list[Arrival] = [decode_arrival(arrival) for _, arrival in loaded.arrivals]
        if outcome is not None:
            arrivals.append(outcome)
        execution = self._execution(loaded)
        if execution is None:
            return None, _NO_TURN
        try:
            return execution, execution.turn(arrivals, loaded.now)
        except CodeMissing:
            raise
        except Exception as error:
            self._forget(loaded.run.id)
            execution.discard()
            return self._park(connection, loaded.run.id, arrivals, error)

    def _park(
        self, connection: Connection, run_id: str, arrivals: Sequence[Arrival], error: Exception
    ) -> tuple[Execution | None, Turn]:
        """A turn that cannot be computed parks the run: what arrived is recorded, saga code is left alone."""
        if isinstance(error, DriftError):
            park = Parked("", "drift", str(error))
        elif isinstance(error, CodeError):
            why = f"the saga function raised {error.error.get('type')}: {error.error.get('message')}"
            park = Parked("", "code", why, error.error)
        else:
            logger.exception("run %s: its turn could not be computed", run_id)
            park = Parked("", "code", f"its turn could not be computed: {error!r:.500}", describe_exception(error))
        again = self._load(connection, run_id)
        execution = self._execution(again) if again else None
        if execution is None or again is None:
            return None, _NO_TURN
        return execution, execution.turn(arrivals, again.now, park)

    def _write(
        self,
        connection: Connection,
        execution: Execution,
        turn: Turn,
        first: Begun | None,
        consumed: list[int],
        done: Taken | None,
        holds_turn: bool,
    ) -> turns.Committed:
        commit = self._commit_of(execution, turn, first, consumed, done, holds_turn)
        execution.committed_wake = turn.wake
        committed = turns.commit_turn(connection, commit)
        if committed.now is not None:
            self.clock.set(committed.now)
        return committed

    def _commit_of(
        self,
        execution: Execution,
        turn: Turn,
        first: Begun | None,
        consumed: list[int],
        done: Taken | None,
        holds_turn: bool,
    ) -> Commit:
        info = execution.info
        return Commit(
            run_id=info.id,
            position=turn.position,
            at=turn.at,
            entries=[encode(entry) for entry in turn.entries],
            incarnation=self.identity.incarnation,
            child=self.identity.child,
            state=turn.state,
            target=info.target,
            queue=info.queue,
            priority=info.priority,
            ended=turn.state in TERMINAL and not turn.was_ended,
            done_key=done.key if done else None,
            done_fence=done.fence if done else None,
            shared=done is None or execution.fold.in_flight > (first is not None),
            holds_turn=holds_turn,
            wake=turn.wake,
            rewake=turn.wake is not None and turn.wake != execution.committed_wake,
            next=_work_row(info, first.work, begun=True) if first else None,
            next_fence=first.taken.fence if first else None,
            work=[_work_row(info, work) for work in turn.work if first is None or work is not first.work],
            withdraw=turn.withdraw,
            consumed=consumed,
            summary=_summary(execution, turn),
        )

    def _begin_next(self, info: RunInfo, turn: Turn, now: datetime, is_short: IsShort | None = None) -> Begun | None:
        """Choose the work that this child goes on with: the first that is due and can run here."""
        if turn.state in TERMINAL or not self._scope.may_begin():
            return None
        for work in turn.work:
            target, queue = target_of(info, work), work.queue or info.queue
            here = queue in self._scope.queues and target in self._scope.targets
            if here and (work.due is None or work.due <= now) and (is_short is None or is_short(work.task)):
                deadline = now + timedelta(seconds=work.call["t"]) if "t" in work.call else None
                taken = Taken(
                    info.id, work.key, work.role, target, queue, work.task, work.attempt + 1, work.call, new_fence(),
                    deadline, now,
                )  # fmt: skip
                return Begun(work, taken)
        return None

    def _ring_for(self, connection: Connection, info: RunInfo, turn: Turn, first: Begun | None) -> None:
        waiting: dict[str, int] = {}
        for work in turn.work:
            if (first is None or work is not first.work) and (work.due is None or work.due <= turn.at):
                queue = work.queue or info.queue
                waiting[queue] = waiting.get(queue, 0) + 1
        for queue, rows in waiting.items():
            self._ring(connection, queue, rows)

    def _correct(self, connection: Connection, execution: Execution, late: Late) -> None:
        """An effect that landed after its run had ended is undone by a linked run of its own."""
        step = execution.fold.steps[late.key]
        info = execution.info
        run_id = f"{info.id}/late/{late.key}/{late.attempt}"
        with connection.transaction():
            new = runs.Start(
                id=run_id, saga=info.saga, version=info.version, input=info.input, queue=info.queue,
                priority=info.priority, parent=info.id,
            )  # fmt: skip
            if runs.start(connection, new):
                turns.seed_journal(connection, run_id, self.clock(), _correction(step.asked, late))
        self._ring(connection, info.queue, 1)

    # -- executions ----------------------------------------------------------------------------------------------------
    def _known(self, connection: Connection, run_id: str) -> Loaded | None:
        """Return what the cache knows as a snapshot without arrivals, else load it; None if there is no such run."""
        cached = self._cache.get(run_id)
        if cached is not None:
            info = cached.info
            row = RunRow(info.id, info.saga, info.version, info.queue, info.input, info.started, info.deadline,
                         info.priority, cached.fold.position, cached.fold.state)  # fmt: skip
            return Loaded(row, self.clock(), [], [])
        found = turns.run_row(connection, run_id)
        if found is not None and found.needs_code and self._script_of(found.saga, found.version) is None:
            raise CodeMissing
        return self._load(connection, run_id)

    def _load(self, connection: Connection, run_id: str) -> Loaded | None:
        cached = self._cache.get(run_id)
        loaded = turns.load(connection, run_id, cached.fold.position if cached else 0)
        if loaded is not None:
            self.clock.set(loaded.now)
        return loaded

    def _execution(self, loaded: Loaded) -> Execution | None:
        """Return the execution of a run, caught up with what was loaded, out of the cache."""
        run = loaded.run
        execution = self._cache.pop(run.id, None)
        if execution is None:
            script = self._script_of(run.saga, run.version)
            info = RunInfo(
                run.id, run.saga, run.version, run.input, run.started_at, run.queue, run.deadline_at, run.priority
            )
            execution = Execution(info, script)
        missing = loaded.rows[execution.fold.position - loaded.since : run.position - loaded.since]
        if missing:
            execution.catch_up((at, [decode_entry(entry) for entry in entries]) for at, entries in missing)
            execution.committed_summary = _signature(execution)
        return execution

    def _remember(self, execution: Execution) -> None:
        self._cache[execution.info.id] = execution
        self._cache.move_to_end(execution.info.id)
        if len(self._cache) > self._cache_runs:
            self._cache.popitem(last=False)[1].discard()

    def _forget(self, run_id: str) -> None:
        self._cache.pop(run_id, None)


_NO_TURN = Turn(0, datetime.min.replace(tzinfo=UTC), [], [], [], [], RunState.PENDING, None, False)


def new_fence() -> int:
    """Return 64 random bits as Postgres' bigint; never a counter, so that no stale holder can guess it."""
    return secrets.randbits(64) - (1 << 63)


def target_of(info: RunInfo, work: Work) -> str:
    """Return who can run `work`: the saga itself if it is local to the driving worker, else its task."""
    return info.target if work.local or work.role == "once" else work.task


def _work_row(info: RunInfo, work: Work, *, begun: bool = False) -> Json:
    return {
        "key": work.key,
        "role": work.role,
        "target": target_of(info, work),
        "queue": work.queue or info.queue,
        "task": work.task,
        "priority": work.priority or info.priority,
        "due": work.due.isoformat() if work.due else None,
        "attempt": work.attempt + begun,
        "call": work.call,
    }


def _summary(execution: Execution, turn: Turn) -> dict[str, Any] | None:
    """Return the columns that change seldom, if one of them changed."""
    if turn.was_ended:
        return None
    fold = execution.fold
    parked: list[Any] = [{"key": key, "role": entry.role, "why": entry.why} for key, entry in fold.parked_keys.items()]
    if fold.parked is not None:
        parked.insert(0, {"key": "", "role": fold.parked.role, "why": fold.parked.why})
    changed = _signature(execution)
    if turn.state not in TERMINAL and changed == execution.committed_summary:
        return None
    execution.committed_summary = changed
    return {
        "output": fold.returned.output if fold.returned and fold.ended and fold.ended.state == "completed" else None,
        "error": _error(fold),
        "left_effects": list(fold.ended.left) if fold.ended else [],
        "parked": parked,
        "past_pivot": fold.past_pivot,
    }


def _error(fold: Fold) -> Json:
    """Return what a run ended in, or is going back from; somebody's order counts as such."""
    order = fold.terminated or (fold.stop if fold.rollback and fold.rollback.cause == "cancel" else None)
    if isinstance(order, (CancelAsked, Operated)):
        done = "terminated" if fold.terminated else "cancelled"
        reason = f": {order.reason}" if order.reason else ""
        return {"type": done.capitalize(), "message": f"{done} by {order.by or 'an unnamed caller'}{reason}"}
    return fold.raised or (fold.rollback.error if fold.rollback else None)


def _signature(execution: Execution) -> tuple[Any, ...]:
    """Return what decides whether the columns of `_summary` are up to date."""
    fold = execution.fold
    return (fold.parked, tuple(fold.parked_keys.values()), fold.past_pivot)


def _correction(asked: Asked, late: Late) -> list[Json]:
    """Return the journal that a correcting run begins with: the step, its late success, the decision to undo."""
    return [
        encode(asked),
        encode(Settled(late.key, "succeeded", late.attempt, late.result)),
        encode(RollbackBegan("late")),
    ]
