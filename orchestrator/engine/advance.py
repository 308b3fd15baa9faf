"""One transaction per outcome: the fence checked, the outcome and the whole turn written, or an arrival.

Owns rule 1 (docs/concepts.md) and the cache of live coroutines.  Saga code runs before the transaction, never in it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from orchestrator.engine.cache import Executions
from orchestrator.engine.commit import Begun, Identity, IsShort, Scope, begin_next, commit_of, correction, gate_of
from orchestrator.engine.compute import NO_TURN, Computer
from orchestrator.engine.observe import tell
from orchestrator.failpoints import failpoint
from orchestrator.machine.fold import RunInfo
from orchestrator.machine.journal import (
    AttemptEnded,
    Late,
    LateSuccess,
    Parked,
    encode,
)
from orchestrator.machine.states import TERMINAL
from orchestrator.machine.turn import CodeMissing, Execution, Script, Turn
from orchestrator.store import arrivals, gates, runs, turns
from orchestrator.store.connection import REFUSED, UNAVAILABLE, Connection
from orchestrator.store.turns import Loaded, Taken

logger = logging.getLogger(__name__)
_TRIES = 1000
_DEADLY = 10  # so many processes may be gone with a turn before it is taken for their end


@dataclass(slots=True)
class Made:
    """What came of a turn: the work begun here, whether the run has more arrivals, whether it was written at all."""

    begun: list[Taken]
    again: bool
    written: bool = True


@dataclass(slots=True)
class _Left:
    """What this child knows of a run that another process drives: since when an outcome of its own may be unread."""

    since: float | None = None
    position: int = 0


@dataclass(slots=True)
class Prepared:
    """A turn that is computed and not committed yet."""

    execution: Execution
    turn: Turn
    now: datetime
    consumed: list[int]
    done: Sequence[Taken]
    holds_turn: bool
    first: Begun | None = None


AfterCommit = Callable[[Connection], list[Taken]]


class Advancer:
    """Computes turns and commits them; one per child, never shared between threads."""

    def __init__(
        self,
        script_of: Callable[[str, int], Script | None],
        scope: Scope,
        identity: Identity,
        ring: Callable[[Connection, str, int], None],
        cache_runs: int = 1000,
        seconds: Callable[[], float] | None = None,
        watch_code: AbstractContextManager[object] = nullcontext(),  # noqa: B008 - it has no state
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._runs = Executions(script_of, cache_runs, seconds)
        self._scope = scope
        self.identity = identity
        self._ring = ring
        self._computer = Computer(self._runs, watch_code, interrupted)
        self._elsewhere: dict[str, _Left] = {}  # runs that another process drives

    # -- what happens to a run -----------------------------------------------------------------------------------------
    def start_turn(self, connection: Connection, taken: Taken) -> list[Taken]:
        """Take the turn that a run owes; returns the work that was begun by it."""
        assert taken.run is not None
        self._runs.clock.set(taken.now)
        if taken.attempt > _DEADLY:
            why = (
                f"{_DEADLY} processes in a row have ended with its turn in hand, and never committed it: does the saga "
                "function end them, or take more memory than they may have? Mend it and retry the run"
            )
            return self._advance(connection, taken.run_id, holds_turn=True, park=Parked("", "code", why))
        if self._is_first_turn(taken):
            made = self._attempt(connection, Loaded(taken.run, taken.now, [], []), holds_turn=True)
            if made.written:
                return self._go_on(connection, taken.run_id, made)
        return self._advance(connection, taken.run_id, holds_turn=True)

    def _is_first_turn(self, taken: Taken) -> bool:
        """Nothing was left for a run that begins when it was to; before that, whoever woke it is heard first."""
        run = taken.run
        if run is None or run.position > 0 or taken.target == turns.ANYONE or taken.attempt:
            return False
        return taken.run_id not in self._runs and taken.now >= run.started_at

    def record(
        self, connection: Connection, taken: Taken, outcome: AttemptEnded, may_begin: bool = True
    ) -> list[Taken]:
        """Record what came of an attempt, with its turn if possible; returns the work that was begun by it."""
        try:
            loaded = None if _was_lost(taken) else self._runs.known(connection, taken.run_id, taken.position)
            made = self._attempt(connection, loaded, [outcome], done=[taken], may_begin=may_begin) if loaded else None
        except CodeMissing:
            self.leave(connection, [(taken, outcome)], owe=True)
            return []
        if made is not None and made.written:
            return self._go_on(connection, taken.run_id, made, may_begin)
        if not self.leave(connection, [(taken, outcome)]):
            return []
        return self._advance(connection, taken.run_id, may_begin=may_begin)

    def start_turns(self, connection: Connection, items: list[Taken], is_short: IsShort) -> list[Taken]:
        """Take the turns that several runs owe with one commit; returns the work that was begun by them.

        Either one step is begun that is not known to be short, or only short ones: nothing that is begun waits behind
        a long one.
        """
        later = [item.run_id for item in items if not self._is_first_turn(item)]
        loaded = self._runs.load_all(connection, later) if later else {}
        for item in items:
            if item.run_id not in later and item.run is not None:
                loaded[item.run_id] = Loaded(item.run, item.now, [], [])
        with self._computer.watch_code:
            tried = (self._prepare(connection, found, holds_turn=True) for found in loaded.values())
            prepared = [made for made in tried if made is not None]
        begun, written = self._commit_together(connection, prepared, is_short)
        for item in items:
            if item.run_id not in written:
                begun += self._advance(connection, item.run_id, holds_turn=True, may_begin=not begun)
        return begun

    def record_together(
        self, connection: Connection, ended: list[tuple[Taken, AttemptEnded]], is_short: IsShort
    ) -> list[Taken]:
        """Record the outcomes of attempts with one commit, those of one run with one turn.

        Of a run that another process drives they are left as arrivals: two that compute its turns would throw away
        each other's, and replay it each time.  See `look_after`.

        Returns the work that was begun by them.
        """
        by_run: dict[str, list[tuple[Taken, AttemptEnded]]] = {}
        for pair in ended:
            by_run.setdefault(pair[0].run_id, []).append(pair)
        with self._computer.watch_code:
            prepared = [
                made for run_id, pairs in by_run.items()
                if run_id not in self._elsewhere and (made := self._prepare_outcomes(connection, run_id, pairs))
            ]  # fmt: skip
        begun, written = self._commit_together(connection, prepared, is_short)
        tried = {made.execution.info.id for made in prepared}
        for run_id, pairs in by_run.items():
            if run_id in written:
                continue
            if run_id in self._elsewhere or (run_id in tried and len(pairs) > 1):
                if self.leave(connection, pairs):
                    left = self._elsewhere.setdefault(run_id, _Left())
                    left.since = left.since or time.monotonic()
                continue
            for taken, outcome in pairs:
                begun += self.record(connection, taken, outcome, may_begin=not begun)
        return begun

    @property
    def has_left(self) -> bool:
        """Whether something that was left for another process may be unread."""
        return any(left.since is not None for left in self._elsewhere.values())

    def look_after(self, connection: Connection, patience_s: float) -> list[Taken]:
        """Take in what was left for others that long ago and is unread; returns the work that was begun by it.

        A driver that moves the run is given time again.
        """
        begun: list[Taken] = []
        for run_id, left in [*self._elsewhere.items()]:
            if left.since is None or time.monotonic() - left.since < patience_s:
                continue
            position, unread = arrivals.noticed(connection, run_id)
            moved, left.position = position != left.position, position
            left.since = time.monotonic() if unread and moved and patience_s else None
            if unread and left.since is None:
                begun += self._advance(connection, run_id, may_begin=not begun)
        return begun

    def _commit_together(
        self, connection: Connection, prepared: list[Prepared], is_short: IsShort
    ) -> tuple[list[Taken], set[str]]:
        """Commit turns of different runs at once, in order of their ids.

        Returns what they began, and which were written.  Those that were not, because a fence is lost or the database
        refuses them, are for the caller to commit one by one.
        """
        for made in prepared:
            alone = made is prepared[0]
            made.first = begin_next(self._scope, made.execution, made.turn, made.now, None if alone else is_short)
            if alone and made.first is not None and not is_short(made.first.work.task):
                break  # nothing that is begun may wait behind a step that can take long
        try:
            committed = self._write_together(connection, prepared)
        except BaseException:
            for made in prepared:
                made.execution.discard()
            raise
        begun: list[Taken] = []
        written: set[str] = set()
        holds = any(made.first is not None for made in prepared)
        for made in prepared:
            result = committed.get(made.execution.info.id)
            if result is None or not result.written:
                made.execution.discard()
                continue
            written.add(made.execution.info.id)
            after = self._after(connection, made.execution, made.turn, made.first, result, made.done)
            begun += self._go_on(connection, made.execution.info.id, after, may_begin=not (holds or begun))
        return begun, written

    def _write_together(self, connection: Connection, prepared: list[Prepared]) -> dict[str, turns.Committed]:
        """Write what can share a statement with one, the rest each with its own."""
        commits = [
            commit_of(self.identity, made.execution, made.turn, made.first, made.consumed, made.done, made.holds_turn)
            for made in prepared
        ]
        for made in prepared:
            made.execution.committed_wake = made.turn.wake
        committed: dict[str, turns.Committed] = {}
        plain = sorted((commit for commit in commits if commit.is_plain), key=lambda commit: commit.run_id)
        with _unless_refused():
            committed |= turns.commit_turns(connection, plain) if plain else {}
        for commit in commits:
            if not commit.is_plain and len(commit.done) <= 1:
                with _unless_refused():
                    committed[commit.run_id] = turns.commit_turn(connection, commit)
        return committed

    def _prepare(
        self,
        connection: Connection,
        loaded: Loaded,
        outcomes: Sequence[AttemptEnded] = (),
        *,
        done: Sequence[Taken] = (),
        holds_turn: bool = False,
    ) -> Prepared | None:
        """Compute a turn that is committed together with others; None if it is for itself."""
        try:
            execution, turn = self._computer.turn(connection, loaded, outcomes)
        except CodeMissing:
            return None
        if execution is None or turn.was_ended or turn.corrections:
            return None
        consumed = [id for id, _ in loaded.arrivals]
        return Prepared(execution, turn, loaded.now, consumed, done, holds_turn)

    def _prepare_outcomes(
        self, connection: Connection, run_id: str, ended: Sequence[tuple[Taken, AttemptEnded]]
    ) -> Prepared | None:
        """Compute the turn that takes these outcomes in; None if it is for itself, or cannot be computed here."""
        try:
            loaded = self._runs.known(connection, run_id, max(taken.position for taken, _ in ended))
        except CodeMissing:
            return None
        if loaded is None:
            return None
        return self._prepare(connection, loaded, [outcome for _, outcome in ended], done=[taken for taken, _ in ended])

    def record_within(self, connection: Connection, taken: Taken, outcome: AttemptEnded) -> AfterCommit | None:
        """Record an outcome in the caller's open transaction; does not commit.

        Returns what is to be called after the commit with the child's own connection, or None if the fence was lost:
        then the caller rolls back.
        """
        drivable = True
        loaded = None
        try:
            loaded = None if _was_lost(taken) else self._runs.known(connection, taken.run_id, taken.position)
            execution, turn = self._computer.turn(connection, loaded, [outcome]) if loaded else (None, NO_TURN)
        except CodeMissing:
            execution, turn, drivable = None, NO_TURN, False
        if execution is not None and loaded is not None:
            first = begin_next(self._scope, execution, turn, loaded.now)
            consumed = [id for id, _ in loaded.arrivals]
            committed = self._write(connection, execution, turn, first, consumed, [taken], holds_turn=False)
            if committed.written:
                made = partial(
                    self._after, execution=execution, turn=turn, first=first, committed=committed, done=[taken]
                )
                return lambda after: self._go_on(after, taken.run_id, made(after))
            execution.discard()
        assert taken.fence is not None
        if not arrivals.arrive(connection, taken.run_id, [(taken.lane, taken.fence, encode(outcome))]):
            return None
        queue = None if drivable else arrivals.owe_turn(connection, taken.run_id)

        def go_on(after: Connection) -> list[Taken]:
            self._admit(after, [taken.call])
            if queue:
                self._ring(after, queue, 1)
            return self._advance(after, taken.run_id) if drivable else []

        return go_on

    def leave(self, connection: Connection, ended: Sequence[tuple[Taken, AttemptEnded]], *, owe: bool = False) -> bool:
        """Leave outcomes of a run as arrivals; a success that the fence refuses is left as a late effect.

        With `owe` the run owes a turn, for whoever takes it; else the caller sees to it that they are taken in.

        Returns whether any was accepted.
        """
        queue = None
        run_id = ended[0][0].run_id
        outcomes = [(taken.lane, taken.fence, encode(outcome)) for taken, outcome in ended if taken.fence is not None]
        failpoint("arrive.before", connection)
        with connection.transaction():
            failpoint("arrive.begun", connection)
            accepted = arrivals.arrive(connection, run_id, outcomes)
            if accepted and owe:
                queue = arrivals.owe_turn(connection, run_id)
            failpoint("arrive.left", connection)
        failpoint("arrive.after", connection)
        if queue:
            self._ring(connection, queue, 1)
        self._admit(connection, [taken.call for taken, _ in ended if taken.lane in accepted])
        for taken, outcome in ended:
            if taken.lane not in accepted:
                self._refuse(connection, taken, outcome)
        return bool(accepted)

    def _refuse(self, connection: Connection, taken: Taken, outcome: AttemptEnded) -> None:
        """An attempt was given to somebody else: its outcome does not count, but its effect may be there."""
        taken.refused = True
        logger.warning("run %s step %s: attempt %s to %s has lost its fence, its outcome is refused",
                       taken.run_id, taken.key, taken.attempt, taken.role)  # fmt: skip
        if outcome.verdict != "succeeded" or (taken.call or {}).get("n"):
            return
        late = LateSuccess(taken.key, taken.role, taken.attempt, outcome.result, outcome.worker, taken.call.get("k", 0))
        failpoint("late.before", connection)
        with connection.transaction():
            failpoint("late.begun", connection)
            queue = arrivals.leave(connection, taken.run_id, encode(late), anyone=True)
            failpoint("late.left", connection)
        failpoint("late.after", connection)
        if queue:
            self._ring(connection, queue, 1)
        elif taken.role == "do":
            logger.error("run %s step %s: attempt %s to do has succeeded, and its run is not there any more: it was "
                         "pruned. Nothing undoes what it did; look whether that must stay",
                         taken.run_id, taken.key, taken.attempt)  # fmt: skip

    def function_of(self, connection: Connection, taken: Taken) -> Callable[[], Any] | None:
        """Return the function of a ``saga.once`` that was begun here."""
        return self._computer.function_of(connection, taken)

    def forget_others(self) -> None:
        """Forget which runs are driven elsewhere: a drain has ended, and everything that it left is read."""
        self._elsewhere.clear()

    def discard(self) -> None:
        """Drop every live coroutine."""
        self._runs.discard()

    # -- turns ---------------------------------------------------------------------------------------------------------
    def _go_on(self, connection: Connection, run_id: str, made: Made, may_begin: bool = True) -> list[Taken]:
        """After a turn: look again for arrivals, if there are or may be some."""
        if not made.again:
            return made.begun
        return made.begun + self._advance(connection, run_id, may_begin=may_begin and not made.begun)

    def _advance(
        self,
        connection: Connection,
        run_id: str,
        holds_turn: bool = False,
        may_begin: bool = True,
        park: Parked | None = None,
    ) -> list[Taken]:
        """Take the run's arrivals, until there are none or another process has the run."""
        begun: list[Taken] = []
        for _ in range(_TRIES):
            loaded = self._runs.load(connection, run_id)
            if holds_turn:
                holds_turn = turns.holds_turn(connection, run_id, self.identity.incarnation, self.identity.child)
            if loaded is None or not (loaded.arrivals or holds_turn):
                return begun
            if loaded.run.finished and not loaded.arrivals:
                arrivals.ignore(connection, run_id, [])
                return begun
            try:
                may_begin = may_begin and not begun
                made = self._attempt(connection, loaded, holds_turn=holds_turn, may_begin=may_begin, park=park)
            except CodeMissing:
                turns.pass_on(connection, run_id, self.identity.incarnation, self.identity.child)
                return begun
            if not made.written:
                if holds_turn or made.again:
                    continue
                return begun  # whoever moved the run looks again after its commit
            begun += made.begun
            holds_turn, park = False, None
            if not made.again:
                return begun
        # Not lost: its arrivals are found by the next turn.
        arrivals.owe_turn(connection, run_id)
        return begun

    def _attempt(
        self,
        connection: Connection,
        loaded: Loaded,
        outcomes: Sequence[AttemptEnded] = (),
        *,
        done: Sequence[Taken] = (),
        holds_turn: bool = False,
        may_begin: bool = True,
        park: Parked | None = None,
    ) -> Made:
        """Compute and commit one turn; with `park` without saga code.  Raises: CodeMissing."""
        execution, turn = self._computer.turn(connection, loaded, outcomes, park)
        if execution is None:
            return Made([], False, written=False)
        first = begin_next(self._scope, execution, turn, loaded.now) if may_begin else None
        consumed = [id for id, _ in loaded.arrivals]
        if turn.was_ended and done:
            return Made([], False, written=False)  # its fence went with the end of the run; it may be a late effect
        if turn.was_ended and not (turn.entries or turn.posts):
            arrivals.ignore(connection, loaded.run.id, consumed)
            return Made([], False)
        try:
            with connection.transaction() if turn.corrections else nullcontext():
                committed = self._write(connection, execution, turn, first, consumed, done, holds_turn)
                for late in turn.corrections if committed.written else ():
                    self._correct(connection, execution, late)
            if turn.corrections:
                failpoint("correct.after", connection)
        except BaseException:
            self._runs.forget(loaded.run.id)
            execution.discard()
            raise
        if not committed.written:
            self._runs.forget(loaded.run.id)
            execution.discard()
            return Made([], committed.owed, written=False)
        return self._after(connection, execution, turn, first, committed, done)

    def _after(
        self,
        connection: Connection,
        execution: Execution,
        turn: Turn,
        first: Begun | None,
        committed: turns.Committed,
        done: Sequence[Taken] = (),
    ) -> Made:
        """After the commit: keep the coroutine, ring, say whether to look again for arrivals."""
        for taken in done:
            taken.again = any(work.key == taken.key and work.role == taken.role for work in turn.work)
        run_id = execution.info.id
        self._elsewhere.pop(run_id, None)  # who commits a turn drives the run
        tell(execution.fold, turn)
        if turn.state in TERMINAL or execution.fold.reported:  # a child that is done may wait long, and be many
            execution.discard()
            self._runs.forget(run_id)
        else:
            self._runs.remember(execution)
        self._ring_for(connection, execution.info, turn, first, committed.posted or ())
        self._admit(connection, [*(work.call for work in turn.work), *(taken.call for taken in done)])
        begun = [first.taken] if first else []
        others = execution.fold.in_flight > len(begun)
        return Made(begun, committed.owed or (others and arrivals.waiting(connection, run_id)))

    def _write(
        self,
        connection: Connection,
        execution: Execution,
        turn: Turn,
        first: Begun | None,
        consumed: list[int],
        done: Sequence[Taken],
        holds_turn: bool,
    ) -> turns.Committed:
        commit = commit_of(self.identity, execution, turn, first, consumed, done, holds_turn)
        execution.committed_wake = turn.wake
        committed = turns.commit_turn(connection, commit)
        if committed.now is not None:
            self._runs.clock.set(committed.now)
        return committed

    def _ring_for(
        self, connection: Connection, info: RunInfo, turn: Turn, first: Begun | None, posted: Sequence[str]
    ) -> None:
        waiting: dict[str, int] = {}
        for work in turn.work:
            if (first is not None and work is first.work) or gate_of(work.call):
                continue
            if work.due is None or work.due <= turn.at:
                queue = work.queue or info.queue
                waiting[queue] = waiting.get(queue, 0) + 1
        for queue in (*(child.queue for child in turn.children), *posted):
            waiting[queue] = waiting.get(queue, 0) + 1
        for queue, rows in waiting.items():
            self._ring(connection, queue, rows)

    def _admit(self, connection: Connection, calls: Iterable[Any]) -> None:
        """Somebody came to a gate, or has left: let in whom there is room for."""
        for gate in {gate: None for call in calls if call and (gate := gate_of(call))}:
            for queue, rows in gates.admit(connection, gate).items():
                self._ring(connection, queue, rows)

    def _correct(self, connection: Connection, execution: Execution, late: Late) -> None:
        """An effect that landed after its run had ended is undone by a linked run of its own."""
        info = execution.info
        run_id = f"{info.id}/late/{late.key}/{late.attempt}"
        failpoint("correct.before", connection)
        with connection.transaction():
            new = runs.Start(
                id=run_id, saga=info.saga, version=info.version, input=info.input, queue=info.queue,
                priority=info.priority, parent=info.id,
            )  # fmt: skip
            if runs.start(connection, new):
                failpoint("correct.started", connection)
                turns.seed_journal(connection, run_id, self._runs.clock(), correction(execution.fold, late))
                failpoint("correct.seeded", connection)
        self._ring(connection, info.queue, 1)


@contextmanager
def _unless_refused() -> Iterator[None]:
    """Pass over a statement that the database refuses, not a connection that it lost."""
    try:
        yield
    except UNAVAILABLE:
        raise
    except REFUSED:
        logger.exception("turns could not be committed together; each is tried alone")


def _was_lost(taken: Taken) -> bool:
    """Tell whether the attempt before was lost with its process, which saga code may have ended that followed on it.

    Its outcome is recorded before that code is run again: it is counted against the turn then, and not the step.
    """
    return "w" in (taken.call or {})
