"""What piles up when something leaks: connections, rows, dead tuples, messages, memory.

Owns the measure before and after.  Near, not equal: thresholds are parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import psutil
import psycopg

from tests.proof.report import Violation

_LEVELS = """
SELECT (SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()),
    (SELECT count(*) FROM orchestrator.work WHERE run_id IN (
        SELECT id FROM orchestrator.runs WHERE state <> 'parked') OR run_id NOT IN (SELECT id FROM orchestrator.runs)),
    (SELECT count(*) FROM orchestrator.arrivals),
    (SELECT count(*) FROM orchestrator.drainers),
    (SELECT coalesce(sum(n_dead_tup), 0)::int FROM pg_stat_user_tables WHERE schemaname = 'orchestrator')
"""


@dataclass(frozen=True, slots=True)
class Levels:
    """How much there is of what should not grow; in an `Allowance`, by how much each may have grown."""

    connections: int = 0
    work: int = 0
    arrivals: int = 0
    marks: int = 0
    dead_tuples: int = 0
    messages: int = 0
    memory_bytes: int = 0


# One more connection for a pump that happens to look; what autovacuum leaves alone by default; what a heap keeps.
ALLOWANCE = Levels(connections=2, dead_tuples=3000, messages=5, memory_bytes=64 * 1024 * 1024)


@dataclass(frozen=True, slots=True)
class Baseline:
    """The levels before a test, and how to measure them again."""

    database_url: str
    before: Levels
    messages: Callable[[], int] | None = None
    within_s: float = 5.0

    @classmethod
    def take(
        cls,
        database_url: str,
        *,
        messages: Callable[[], int] | None = None,
        pids: Iterable[int] = (),
        within_s: float = 5.0,
    ) -> Baseline:
        """Measure before; `messages` counts what waits in the broker, `pids` are the processes whose memory counts.

        What is compared with it later has `within_s` to come back: a connection that was closed is not gone at once.
        """
        return cls(database_url, measure(database_url, messages, pids), messages, within_s)

    def compare(self, pids: Collection[int] = (), allowance: Levels = ALLOWANCE) -> list[Violation]:
        """Measure again, until all has come back or the time is over; return what has not."""
        until = time.monotonic() + self.within_s
        while True:
            found = list(self._grown(pids, allowance))
            if not found or time.monotonic() > until:
                return found
            time.sleep(0.05)

    def _grown(self, pids: Collection[int], allowance: Levels) -> Iterator[Violation]:
        after = measure(self.database_url, self.messages, pids)
        for name in Levels.__dataclass_fields__:
            was, now, more = (getattr(levels, name) for levels in (self.before, after, allowance))
            if now > was + more:
                found = f"{was} before, {now} now, {more} more would be well"
                yield Violation(f"{name.replace('_', ' ')} did not come back", "levels", found)


def measure(database_url: str, messages: Callable[[], int] | None = None, pids: Iterable[int] = ()) -> Levels:
    """Return the levels now."""
    with psycopg.connect(database_url) as connection:
        row = connection.execute(_LEVELS).fetchone()
    assert row is not None
    connections, work, arrivals, marks, dead = row
    waiting, resident = messages() if messages else 0, sum(map(_resident_bytes, pids))
    return Levels(connections, work, arrivals, marks, dead, waiting, resident)


def _resident_bytes(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)
