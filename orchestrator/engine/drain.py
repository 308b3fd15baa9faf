"""The loop of a worker's child: hold what is due, do it, commit outcome and next begin together, go on.

Owns when a drain ends and what happens to a connection that breaks.  Must never import Celery: `Invoke` runs a step.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol

from orchestrator.codec import Json, check, encode_any
from orchestrator.engine.advance import Advancer, AfterCommit
from orchestrator.engine.commit import Identity, Scope, new_fence
from orchestrator.errors import PayloadError, Rejected, StoreUnavailableError, describe_exception
from orchestrator.failpoints import failpoint
from orchestrator.machine.journal import AttemptEnded
from orchestrator.machine.policy import RetryPolicy
from orchestrator.machine.turn import Script
from orchestrator.settings import Settings
from orchestrator.step import StepContext, StepStopped
from orchestrator.store import liveness, pauses, runs, turns
from orchestrator.store.connection import (
    PATIENCE_S,
    UNAVAILABLE,
    CommitUnknown,
    Connection,
    open_connection,
    unavailable,
)
from orchestrator.store.permits import Permit, Permits
from orchestrator.store.turns import Taken

logger = logging.getLogger(__name__)
_LINGER_S = (0.002, 0.004, 0.008)  # after work, how long to wait for more of it before a look at the table
_GATHER_S = 0.012  # how long to let short work gather where it comes fast: a wave of 16 costs half of four of 4


@dataclass(slots=True)
class Invocation:
    """What came of running a step's code: a result already encoded, or the error.

    `pause` (seconds) is what Celery's own retry asked for; `harmless` says that no code ran, or that all it did was
    rolled back.
    """

    result: Json = None
    error: BaseException | None = None
    pause: float | None = None
    harmless: bool = False


class LostFence(Exception):
    """The transaction of a transactional step is to be rolled back: its attempt was taken away."""


class StepRunner(Protocol):
    """Runs the code of steps; the Celery layer provides it."""

    worker: str

    def invoke(self, taken: Taken, context: StepContext) -> Invocation:
        """Run a step, undo or probe and encode its result."""
        ...

    def invoke_in_transaction(
        self, taken: Taken, context: StepContext, settle: Callable[[Connection, Invocation], None]
    ) -> Invocation:
        """Run a transactional step; `settle` is called with the open transaction before it is committed."""
        ...

    def is_transactional(self, task: str) -> bool: ...
    def non_retryable(self, task: str) -> RetryPolicy | None: ...
    def finished(self, taken: Taken, outcome: AttemptEnded) -> None: ...


@dataclass(slots=True)
class Worker:
    """What a drainer needs to know about the worker that it is part of."""

    settings: Settings
    scope: Scope
    identity: Callable[[], Identity]
    script_of: Callable[[str, int], Script | None]
    runner: StepRunner
    ring: Callable[[str, int], None]
    stopping: Callable[[], bool]
    permits: Permits | None = None  # none: this worker has fewer children than it may have connections
    linger: Sequence[float] = _LINGER_S
    seconds: Callable[[], float] | None = None  # a monotonic clock, should the database's be moved along with it


class Drainer:
    """Drains the queues of one worker in one child; keeps its connection and its coroutines between drains."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._settings = worker.settings
        self._connection: Connection | None = None
        self._advancer: Advancer | None = None
        self._reconnected = False
        self._owes = False  # whether something may be begun for this child that nobody else will do
        self._run_already: set[tuple[str, str, str, int]] = set()  # the attempts that this drain has run, or tried to
        self._permit: Permit | None = None
        self._queues = deque(sorted(worker.scope.queues))
        # Without the queues that are paused.
        self._scope = replace(worker.scope, may_begin=self._may_begin, is_short=self._is_short)
        self._paused = pauses.NOTHING
        self._known_until = 0.0
        self._until = math.inf
        self._steps = 0
        self._together = False  # whether the steps of the last take shared commits, and whether it left some behind
        self._more_due = False
        self._marked: Identity | None = None
        self._wave: list[Taken] = []  # the attempts that this child is about, and what they have begun so far
        self._begun: list[Taken] = []
        self._recent_s: dict[str, float] = {}  # how long each task took the last time

    # -- the loop ------------------------------------------------------------------------------------------------------
    def drain(self) -> int:
        """Work until nothing is due, or for about a second; returns how many steps were run.

        Raises: StoreUnavailableError if the database cannot be reached; what was begun is reported before.
        """
        self._until = time.monotonic() + self._settings.drain_seconds
        self._steps = 0
        try:
            self._drain_on()
            self._lend_connection()
            return self._steps
        except UNAVAILABLE as error:
            self._drop_connection()
            raise unavailable(error) from error
        except BaseException:
            self._drop_connection()  # what is still begun is given back when the next drain connects
            raise
        finally:
            self._take_mark_back()

    def _drain_on(self) -> None:
        """Drain; go on after a connection broke, for what was begun for this child waits for nobody else."""
        for pause in _PAUSES:
            try:
                return self._drain()
            except (*UNAVAILABLE, StoreUnavailableError):
                self._drop_connection()
                if not self._owes or self._worker.stopping():
                    raise
                time.sleep(pause)
        return self._drain()

    def _take_mark_back(self) -> None:
        """A mark that stays would keep everybody from ringing for this child."""
        marked, self._marked = self._marked, None
        if marked is None:
            return
        with suppress(*UNAVAILABLE, StoreUnavailableError):
            connection = self._connection or self._open("mark")
            liveness.leave(connection, marked.incarnation, marked.child)
            if connection is not self._connection:
                connection.close()

    def _drain(self) -> None:
        self._perform(self._enter())
        connection, advancer = self._ready()
        identity = advancer.identity
        while True:
            if time.monotonic() > self._known_until:
                self._mark(connection, identity)
            full = not self._may_begin()
            taken = [] if full else self._linger(connection, advancer)
            if taken:
                self._perform(taken)
                connection, advancer = self._ready()
                continue
            liveness.leave(connection, identity.incarnation, identity.child)
            self._marked = None
            self._owes = False
            self._run_already.clear()
            if self._worker.stopping():
                return
            if full:
                self._ring_if_due(connection)
                return
            # Look once more after the mark is gone: who added work before that saw the mark and did not ring.
            taken = self._take(connection, advancer)
            if not taken:
                self._owes = False
                return
            self._mark(connection, identity)
            self._marked = identity
            self._perform(taken)
            connection, advancer = self._ready()

    def _mark(self, connection: Connection, identity: Identity) -> bool:
        """Mark that this child drains, and hear what is paused; False if its incarnation was declared dead."""
        queues = list(self._worker.scope.queues)
        paused = liveness.enter(connection, identity.incarnation, identity.child, queues)
        if paused is None:
            return False
        self._paused, self._known_until = paused, time.monotonic() + _KNOWN_S
        self._scope.queues = [queue for queue in queues if queue not in paused.queues]
        return True

    def _linger(self, connection: Connection, advancer: Advancer) -> list[Taken]:
        """Take what is due; after work, wait a moment for more of it, which is cheaper than a doorbell for each.

        Where short steps come several at once, the wait comes first: the more are taken together, the less each costs,
        and whoever starts them gets the CPU meanwhile.
        """
        pauses = self._worker.linger if self._steps else ()
        gather = bool(pauses) and self._together and not self._more_due
        taken = [] if gather else self._take(connection, advancer)
        for pause in (_GATHER_S, *pauses) if gather else pauses:
            if taken or not self._may_begin():
                break
            time.sleep(pause)
            taken = self._take(connection, advancer)
        return taken

    def _may_begin(self) -> bool:
        """Whether this drain goes on: other tasks of this worker get their turn, a worker that stops begins nothing."""
        within = time.monotonic() < self._until and self._steps < self._settings.drain_steps
        return within and not self._worker.stopping()

    def _ring_if_due(self, connection: Connection) -> None:
        for queue, rows in liveness.due(connection, self._settings.reservation).items():
            if queue in self._worker.scope.queues:
                self._ring(connection, queue, rows)

    def _take(self, connection: Connection, advancer: Advancer) -> list[Taken]:
        scope, identity = self._worker.scope, advancer.identity
        self._queues.rotate(1)  # within a priority every queue comes first in its turn, so that none starves
        short = {task: seconds for task, seconds in self._recent_s.items() if self._is_short(task)}
        left = max(1, self._settings.drain_steps - self._steps)
        batch = min(left, _batch(max(short.values(), default=0.0)))
        queues = [queue for queue in self._queues if queue not in self._paused.queues]
        if not queues:
            return []
        self._owes = True
        taken = turns.take(
            connection,
            queues=queues,
            targets=[*scope.targets, turns.ANYONE],
            incarnation=identity.incarnation,
            child=identity.child,
            fences=[new_fence() for _ in range(batch)],
            short=list(short),
            reservation=self._settings.reservation,
        )
        self._more_due = len(taken) == batch
        if self._more_due:
            self._ring(connection, taken[-1].queue, len(taken))
        return taken

    def _perform(self, taken: list[Taken]) -> None:
        """Do what is held, and what that begins in turn.

        In waves: first turns share a commit, and so do the outcomes of steps that are known to be short.
        """
        self._begun = taken
        self._together = False
        while self._begun:
            wave, self._begun = self._begun, []
            firsts = [item for item in wave if item.role == "turn"]
            if firsts and self._worker.stopping():
                self._give_back(firsts)
                firsts = []
            attempts = self._wave = [item for item in wave if item.role != "turn"]
            self._steps += len(attempts)
            self._begun.extend(self._start_turns(firsts))
            short = [item for item in attempts if self._is_short(item.task) and item.role in ("do", "undo")]
            if len(short) > 1:
                self._together = True
                self._begun.extend(self._run_together(short))
                attempts = [item for item in attempts if item not in short]
            for item in attempts:
                self._begun.extend(self._run(item))

    def _put_aside(self, items: list[Taken]) -> list[Taken]:
        """Leave runs alone whose saga is paused; orders for one that has not begun are heard all the same."""
        held = [item for item in items if item.run and item.run.saga in self._paused.sagas]
        held = [item for item in held if item.run and (item.run.position or item.target != turns.ANYONE)]
        if not held:
            return items
        connection, advancer = self._ready()
        sagas, identity = list(self._paused.sagas), advancer.identity
        ids = [item.run_id for item in held]
        aside = pauses.put_aside(connection, ids, sagas, identity.incarnation, identity.child)
        return [item for item in items if item.run_id not in aside]

    def _start_turns(self, items: list[Taken]) -> list[Taken]:
        items = self._put_aside(items)
        if not items:
            return []
        connection, advancer = self._ready()
        if len(items) == 1:
            return self._start_turn(connection, advancer, items[0])
        try:
            return advancer.start_turns(connection, items, self._is_short)
        except (*UNAVAILABLE, StoreUnavailableError):
            raise
        except Exception:
            logger.exception("the turns of %s runs failed together; each is tried alone", len(items))
        begun: list[Taken] = []
        for item in items:
            begun += self._start_turn(connection, advancer, item)
        return begun

    def _is_short(self, task: str) -> bool:
        """Whether a task lately took so little time that others may wait for it."""
        return self._recent_s.get(task, 1.0) < _TOGETHER_S and not self._worker.runner.is_transactional(task)

    def _run_together(self, items: list[Taken]) -> list[Taken]:
        """Run short steps one after the other and record their outcomes with one commit."""
        ended = [(item, self._attempt(item)) for item in items]
        try:
            connection, advancer = self._ready()
            begun = advancer.record_together(connection, ended, self._is_short)
        except (*UNAVAILABLE, StoreUnavailableError):
            self._drop_connection()
            begun = []
            for item, outcome in ended:
                self._begun.extend(self._record(item, outcome, broken=True))
        for item, outcome in ended:
            self._worker.runner.finished(item, outcome)
        return begun

    def _start_turn(self, connection: Connection, advancer: Advancer, item: Taken) -> list[Taken]:
        """A turn that fails for a reason nobody foresaw must neither stop the others nor be tried in a tight loop."""
        try:
            return advancer.start_turn(connection, item)
        except (*UNAVAILABLE, StoreUnavailableError):
            raise
        except Exception:
            logger.exception("run %s: its turn failed and is tried again in 30 s; please report this", item.run_id)
            turns.postpone(connection, item.run_id, timedelta(seconds=30))
            return []

    def _give_back(self, items: list[Taken]) -> None:
        connection, advancer = self._ready()
        reserved = [item.run_id for item in items if item.role == "turn"]
        turns.give_back(connection, reserved, advancer.identity.incarnation, advancer.identity.child)

    # -- one attempt ---------------------------------------------------------------------------------------------------
    def _run(self, taken: Taken) -> list[Taken]:
        runner = self._worker.runner
        if taken.role in ("do", "undo") and runner.is_transactional(taken.task):
            return self._run_in_transaction(taken, self._context(taken))
        outcome = self._attempt(taken)
        begun = self._record(taken, outcome)
        runner.finished(taken, outcome)
        return begun

    def _attempt(self, taken: Taken) -> AttemptEnded:
        """Run the code of one attempt."""
        self._run_already.add(_attempt_of(taken))
        if taken.role == "once":
            connection, advancer = self._ready()
            function = advancer.function_of(connection, taken)
            failpoint("once.before", connection)
            invocation = _run_once(function)
            failpoint("once.after", connection)
            return self._outcome(taken, invocation)
        if self._recent_s.get(taken.task, 1.0) > _SHORT_S:
            self._lend_connection()
        began = time.monotonic()
        failpoint("effect.before", self._connection)
        invocation = self._worker.runner.invoke(taken, self._context(taken))
        failpoint("effect.after", self._connection)
        self._recent_s[taken.task] = time.monotonic() - began
        return self._outcome(taken, invocation)

    def _run_in_transaction(self, taken: Taken, context: StepContext) -> list[Taken]:
        after: list[AfterCommit] = []
        reported: list[AttemptEnded] = []
        self._run_already.add(_attempt_of(taken))
        _, advancer = self._ready()
        self._lend_connection()

        def settle(connection: Connection, invocation: Invocation) -> None:
            outcome = self._outcome(taken, invocation, harmless=True)
            found = advancer.record_within(connection, taken, outcome)
            if found is None:
                raise LostFence
            after.append(found)
            reported.append(outcome)

        try:
            invocation = self._worker.runner.invoke_in_transaction(taken, context, settle)
        except CommitUnknown as error:
            # The outcome counts only if the commit did not happen; recording finds out.
            outcome = self._outcome(taken, Invocation(error=error), harmless=True)
            return self._record(taken, outcome, broken=True)
        except LostFence:
            logger.warning(
                "run %s step %s: attempt %s to %s has lost its fence, its transaction is rolled back",
                taken.run_id, taken.key, taken.attempt, taken.role,
            )  # fmt: skip
            return []
        if invocation.error is None and after:
            self._worker.runner.finished(taken, reported[0])
            return self._after_transaction(taken, reported[0], after[0])
        outcome = self._outcome(taken, invocation, harmless=True)
        begun = self._record(taken, outcome)
        self._worker.runner.finished(taken, outcome)
        return begun

    def _after_transaction(self, taken: Taken, outcome: AttemptEnded, after: AfterCommit) -> list[Taken]:
        """Go on after the commit; if the connection breaks now, what was begun with it is found as after any other."""
        try:
            return after(self._ready()[0])
        except (*UNAVAILABLE, StoreUnavailableError):
            self._drop_connection()
            return self._record(taken, outcome, broken=True)

    def _context(self, taken: Taken) -> StepContext:
        call = taken.call or {}
        suffix = {"undo": ":undo", "probe": ":probe"}.get(taken.role, "")
        if taken.role == "undo" and call.get("l"):
            suffix += f":{call['l']}"
        deadline = taken.deadline or taken.now + timedelta(seconds=call.get("t", 300))
        run = f"{taken.run_id}~{call['k']}" if call.get("k") else taken.run_id
        key = f"{run}:{taken.key}"
        return StepContext(
            run_id=taken.run_id,
            key=taken.key,
            attempt=taken.attempt,
            idempotency_key=key if taken.role == "probe" else key + suffix,
            deadline=deadline,
            heartbeat_details=call.get("d"),
            undoes=key if taken.role == "undo" else "",
            beat=lambda details: self._beat(taken, details),
        )

    def _beat(self, taken: Taken, details: Json) -> None:
        assert taken.fence is not None
        connection, _ = self._ready()
        details = encode_any(details, f"the heartbeat details of {taken.task}")
        taken.call["d"] = details
        stop = turns.heartbeat(connection, taken.run_id, taken.key, taken.fence, details)
        if stop is None:
            raise StepStopped(
                f"attempt {taken.attempt} of {taken.key} was given up: its lease or its heartbeat was missed"
            )
        if stop:
            raise StepStopped(f"run {taken.run_id} does not want the result of {taken.key} any more")

    def _outcome(self, taken: Taken, invocation: Invocation, harmless: bool = False) -> AttemptEnded:
        began = taken.now.isoformat()
        worker = self._worker.runner.worker
        role = "do" if taken.role == "once" else taken.role
        error = invocation.error
        if error is None:
            try:
                check(invocation.result, what=f"the result of {taken.task}")
                return AttemptEnded(taken.key, role, taken.attempt, "succeeded", invocation.result, None, worker, began)
            except PayloadError as refused:
                error = refused
        described = describe_exception(error)
        verdict = "failed" if harmless or invocation.harmless else "doubt"
        if isinstance(error, Rejected) or self._refused(taken, described):
            verdict = "rejected"
        return AttemptEnded(
            taken.key, role, taken.attempt, verdict, None, described, worker, began, pause=invocation.pause,
            details=(taken.call or {}).get("d"),
        )  # fmt: skip

    def _refused(self, taken: Taken, described: dict[str, Any]) -> bool:
        policy = self._worker.runner.non_retryable(taken.task)
        names = set(described.get("mro") or ())
        return bool(policy and policy.refuses(names)) or any(name in names for name in (taken.call or {}).get("x", ()))

    # -- recording, whatever happens to the connection -----------------------------------------------------------------
    def _record(self, taken: Taken, outcome: AttemptEnded, broken: bool = False) -> list[Taken]:
        """Record an outcome; if the connection breaks, find out what became of it and go on."""
        pause, until = 0.05, time.monotonic() + _PATIENCE
        assert taken.fence is not None
        fences = [taken.fence]
        while True:
            try:
                connection, advancer = self._ready()
                if broken:
                    found = self._recover(connection, advancer, taken, outcome, fences)
                    if found is not None:
                        return found
                return advancer.record(connection, taken, outcome)
            except (*UNAVAILABLE, StoreUnavailableError):
                broken = True
                self._drop_connection()
                if time.monotonic() > until:
                    raise
                time.sleep(pause)
                pause = min(pause * 2, 1.0)

    def _recover(
        self, connection: Connection, advancer: Advancer, taken: Taken, outcome: AttemptEnded, fences: list[int]
    ) -> list[Taken] | None:
        """After a connection was lost at a commit: None if the outcome can still be recorded, else what to do next."""
        fences.append(new_fence())
        if turns.refence(connection, taken.run_id, taken.key, fences, fences[-1]):
            taken.fence = fences[-1]
            return None
        if not turns.recorded(connection, taken.run_id, taken.key, outcome.role, taken.attempt, outcome.worker):
            return None  # taken away meanwhile: recording it again reports a late effect
        identity = advancer.identity
        held = turns.held(connection, identity.incarnation, identity.child)
        in_hand = {item.fence for item in (*self._wave, *self._begun)}
        return [item for item in held if item.run_id == taken.run_id and item.fence not in in_hand]

    def _ready(self) -> tuple[Connection, Advancer]:
        """Return connection and advancer of the present incarnation, opening what is missing."""
        if self._connection is not None and self._connection.closed:
            self._drop_connection()
        if self._connection is None:
            if self._worker.permits is not None:
                self._permit = self._worker.permits.take()
            self._connection = self._open(f"child of {self._worker.runner.worker}")
            self._reconnected = self._reconnected or self._advancer is None
        if self._advancer is None:
            identity = self._worker.identity()
            if not self._mark(self._connection, identity):
                raise StoreUnavailableError("this worker was declared dead and is taking a new incarnation; try again")
            self._advancer = Advancer(
                self._worker.script_of,
                self._scope,
                identity,
                self._ring,
                self._settings.cache_runs,
                self._worker.seconds,
            )
        return self._connection, self._advancer

    def _open(self, name: str) -> Connection:
        prepare = self._settings.prepared_statements
        return open_connection(self._settings.dsn, name=name, prepare=prepare, patience_s=PATIENCE_S)

    def _ring(self, connection: Connection, queue: str, rows: int) -> None:
        failpoint("ring.before", connection)
        times = runs.rings_needed(connection, queue, rows)
        if times:
            self._worker.ring(queue, times)
        failpoint("ring.after", connection)

    def _drop_connection(self) -> None:
        if self._advancer is not None:
            self._advancer.discard()
            self._advancer = None
        self._close_connection()

    def _close_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._permit is not None:
            self._permit.give_back()
            self._permit = None

    def _lend_connection(self) -> None:
        """Where connections are scarce, none is held while a step runs or a child idles."""
        if self._worker.permits is not None:
            self._close_connection()

    def _enter(self) -> list[Taken]:
        """Mark that this child drains, and return what it has begun and not run.

        If its incarnation was declared dead meanwhile, the mark is under the next one, which has begun nothing.
        """
        connection, advancer = self._ready()
        begun: list[Taken] = []
        if self._reconnected:
            begun = self._take_up(connection, advancer.identity)
            self._reconnected = False
        if not self._mark(connection, advancer.identity):
            advancer.discard()
            self._advancer, begun = None, []
            _, advancer = self._ready()
        self._marked = advancer.identity
        return begun

    def _take_up(self, connection: Connection, identity: Identity) -> list[Taken]:
        """Return what was begun for this child in a commit whose answer was lost; what it has run is in doubt.

        So is what was begun for another process, whose number this one has been given.
        """
        held = turns.held(connection, identity.incarnation, identity.child) if self._owes else []
        begun = [item for item in held if _attempt_of(item) not in self._run_already]
        keep = [item.fence for item in begun if item.fence is not None]
        for queue in liveness.give_back_child(connection, identity.incarnation, identity.child, keep):
            self._ring(connection, queue, 1)
        return begun

    def close(self) -> None:
        """Close the connection and drop the coroutines."""
        self._drop_connection()


def _batch(seconds: float) -> int:
    """Return how much to take at once where a step takes so long: what is begun waits for no more than a moment.

    Where none is known to be short, one step at most is begun, and turns take no time to speak of.
    """
    return min(_LARGEST_BATCH, max(_BATCH, int(_WAVE_S / max(seconds, 1e-6))))


def _attempt_of(taken: Taken) -> tuple[str, str, str, int]:
    """Return what names an attempt for good; its fence may change, and a change may go unanswered."""
    return taken.run_id, taken.key, taken.role, taken.attempt


_BATCH = 8
_LARGEST_BATCH = 32
_WAVE_S = 0.02
_TOGETHER_S = 0.01  # steps shorter than this may share a commit
_SHORT_S = 0.02  # opening a connection takes about half of this
_PATIENCE = 600.0
_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, *[1.0] * 30)  # between looks whether the database is back
_KNOWN_S = 1.0  # how long a drain goes by what it has heard of pauses


def _run_once(function: Callable[[], Any] | None) -> Invocation:
    if function is None:
        return Invocation(error=LookupError("the saga does not ask for this any more"), harmless=True)
    try:
        return Invocation(function())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too is a failed attempt, not the end of this process
        return Invocation(error=error)
