"""The runs that this child knows: their folds and live coroutines, and the database's time.

Owns loading and catching up; bounded by runs and by what these have asked for, and always allowed to forget.  Must
never commit anything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic

from orchestrator.engine.commit import MANY, signature
from orchestrator.machine.fold import RunInfo
from orchestrator.machine.journal import decode_entry
from orchestrator.machine.turn import CodeMissing, Execution, Script
from orchestrator.store import turns
from orchestrator.store.connection import Connection
from orchestrator.store.turns import Loaded, RunRow

_REQUESTS = 20  # that a run has asked for on the average, about 2 KB each


class Clock:
    """The database's time, carried on between statements by this process's monotonic clock, or by another one."""

    def __init__(self, seconds: Callable[[], float] | None = None) -> None:
        self._seconds = seconds or (lambda: monotonic())
        self._at = datetime.now(UTC)
        self._since = self._seconds()

    def __call__(self) -> datetime:
        return self._at + timedelta(seconds=self._seconds() - self._since)

    def set(self, now: datetime) -> datetime:
        """Take over the database's time."""
        self._at, self._since = now, self._seconds()
        return now


@dataclass(slots=True)
class _Kept:
    """An execution, how much it had asked for when it was used last, and how many had been made by then."""

    execution: Execution
    size: int
    made: int


class Executions:
    """Executions by run id, the least recently used dropped first.

    A run that others bring to its end is not asked for here again, and nobody says so.  So those that have ended count
    for as long as they would have been kept: an execution goes when `limit` others were made since it was used.
    """

    def __init__(
        self,
        script_of: Callable[[str, int], Script | None],
        limit: int,
        seconds: Callable[[], float] | None = None,
    ) -> None:
        self._script_of = script_of
        self._limit = limit
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._size = 0
        self._made = 0  # how many executions, for a run that was forgotten and came back another one
        self.clock = Clock(seconds)

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._kept

    def known(self, connection: Connection, run_id: str, position: int = 0) -> Loaded | None:
        """Return what the cache knows as a snapshot without arrivals, else load it; None if there is no such run.

        Others have moved a run whose `position` is said to be further, or which many are at work on: to look is cheaper
        than to be refused, which costs the coroutine.
        """
        cached = self._get(run_id)
        if cached is not None and cached.fold.in_flight < MANY and cached.fold.position >= position:
            info = cached.info
            row = RunRow(info.id, info.saga, info.version, info.queue, info.input, info.started, info.deadline,
                         info.priority, cached.fold.position, cached.fold.state, info.parent,
                         info.link, info.since)  # fmt: skip
            return Loaded(row, self.clock(), [], [])
        found = turns.run_row(connection, run_id) if cached is None else None
        if found is not None and found.needs_code and self._script_of(found.saga, found.version) is None:
            raise CodeMissing
        return self.load(connection, run_id)

    def load(self, connection: Connection, run_id: str) -> Loaded | None:
        """Read what the cache does not know of a run; None if there is no such run."""
        return self.load_all(connection, [run_id]).get(run_id)

    def load_all(self, connection: Connection, run_ids: Sequence[str]) -> dict[str, Loaded]:
        """Read what the cache does not know of these runs, in one round trip."""
        cached = {run_id: self._get(run_id) for run_id in run_ids}
        known = {run_id: execution.fold.position if execution else 0 for run_id, execution in cached.items()}
        found = turns.load(connection, known)
        for loaded in found.values():
            self.clock.set(loaded.now)
        return found

    def take(self, loaded: Loaded) -> Execution | None:
        """Return the execution of a run, caught up with what was loaded, out of the cache."""
        run = loaded.run
        execution = self._pop(run.id)
        if execution is not None and execution.info.link != run.link:
            execution.discard()  # continued as new elsewhere
            execution = None
        if execution is None:
            script = self._script_of(run.saga, run.version)
            info = RunInfo(
                run.id, run.saga, run.version, run.input, run.started_at, run.queue, run.deadline_at, run.priority,
                run.parent or "", run.link, run.since,
            )  # fmt: skip
            execution = Execution(info, script)
            self._made += 1
        begin = max(loaded.since, run.since)
        missing = loaded.rows[execution.fold.position - begin : run.position - begin]
        if missing:
            execution.catch_up((at, [decode_entry(entry) for entry in entries]) for at, entries in missing)
            execution.committed_summary = signature(execution)
            execution.committed_wake = None  # whoever moved the run may have taken back what was set here
        return execution

    def remember(self, execution: Execution) -> None:
        """Keep an execution; the least recently used go if they are too many, too large or of too long ago."""
        run_id = execution.info.id
        self._pop(run_id)
        self._kept[run_id] = kept = _Kept(execution, len(execution.fold.steps), self._made)
        self._size += kept.size
        while self._keeps_too_much():
            self._drop(next(iter(self._kept)))

    def _keeps_too_much(self) -> bool:
        oldest = next(iter(self._kept.values()), None)
        if oldest is None:
            return False
        if len(self._kept) > self._limit or self._made - oldest.made >= self._limit:
            return True
        return len(self._kept) > 1 and self._size > self._limit * _REQUESTS

    def forget(self, run_id: str) -> None:
        self._pop(run_id)

    def discard(self) -> None:
        """Drop every live coroutine."""
        while self._kept:
            self._drop(next(iter(self._kept)))

    def _drop(self, run_id: str) -> None:
        if (execution := self._pop(run_id)) is not None:
            execution.discard()

    def _get(self, run_id: str) -> Execution | None:
        kept = self._kept.get(run_id)
        return kept.execution if kept else None

    def _pop(self, run_id: str) -> Execution | None:
        kept = self._kept.pop(run_id, None)
        if kept is None:
            return None
        self._size -= kept.size
        return kept.execution
