"""Recovery that never stops: rings for what is due, gives back what the dead held, wakes forgotten runs.

Owns rule 2 and the judging half of rule 6.  Must never keep state that matters: any number of pumps run at once, and
one that starts now knows as much as one that has run for a year.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic

from orchestrator.engine.circles import break_circles
from orchestrator.failpoints import failpoint
from orchestrator.store import gates, liveness, pauses, runs
from orchestrator.store.connection import Connection

logger = logging.getLogger(__name__)


_DOUBT_ROUNDS = 3
_CIRCLE_ROUNDS = 5


@dataclass(slots=True)
class Pumped:
    """What one round did: doorbells by queue, attempts given back, incarnations declared dead; the next due time."""

    rung: Counter[str] = field(default_factory=Counter)
    given_back: int = 0
    died: int = 0
    next_due_s: float | None = None


@dataclass(slots=True)
class _Seen:
    beats: int
    since: float


class Pump:
    """One round of recovery after the other; judges leases by its own monotonic clock.

    For a queue it rings at most `slots` times in a round, those of its own worker: all pumps see the same idle slots,
    and each rings for its part of them.
    """

    def __init__(
        self, ring: Callable[[str, int], None], *, lease: timedelta, reservation: timedelta, slots: int = 1
    ) -> None:
        self._ring = ring
        self._slots = slots
        self._lease = lease.total_seconds()
        self._reservation = reservation
        self._seen: dict[int, _Seen] = {}
        self._looked_at = monotonic()
        self._rounds = 0
        self._waited: dict[str, int] = {}
        self._after_gate = ""

    def connection_broke(self) -> None:
        """Forget what was seen: over a broken connection nobody may be judged."""
        self._seen.clear()

    def run_once(self, connection: Connection) -> Pumped:
        """Do one round over bounded pages; each page is its own transaction."""
        pumped = Pumped()
        pumped.died = self._judge(connection)
        queues = [
            *liveness.give_back_dead(connection),
            *liveness.give_back_expired(connection),
            *liveness.wake_forgotten(connection),
        ]
        pumped.given_back = len(queues)
        self._admit(connection)
        for saga in pauses.untold(connection):
            pauses.tell(connection, saga)
        due = liveness.due(connection, self._reservation)
        for queue, rows in due.items():
            times = min(runs.rings_needed(connection, queue, rows), self._slots) or self._doubt(queue)
            if times:
                failpoint("pump.ring.before", connection)
                self._ring(queue, times)
                failpoint("pump.ring.after", connection)
                pumped.rung[queue] += times
        self._waited = {queue: rounds for queue, rounds in self._waited.items() if queue in due}
        failpoint("pump.rung", connection)
        if not due or self._rounds % _CIRCLE_ROUNDS == 0:
            break_circles(connection)
        pumped.next_due_s = liveness.next_due(connection)
        self._rounds += 1
        if self._rounds % 60 == 0:
            liveness.sweep(connection)
            gates.sweep(connection)
        return pumped

    def _admit(self, connection: Connection) -> None:
        """Let in whom there is room for at a page of the gates; the next round goes on from there."""
        found = gates.lines(connection, self._after_gate)
        for gate in found:
            gates.admit(connection, gate)
        self._after_gate = found[-1] if found else ""

    def _doubt(self, queue: str) -> int:
        """Every slot says that it drains and still work is due: ring now and then, should a mark be wrong."""
        self._waited[queue] = self._waited.get(queue, 0) + 1
        return int(self._waited[queue] % _DOUBT_ROUNDS == 0)

    def _judge(self, connection: Connection) -> int:
        """Declare dead whose lease this pump itself saw unrenewed for a whole lease."""
        died = 0
        now = monotonic()
        if now - self._looked_at > self._lease:
            self._seen.clear()  # it stood still itself, and so may have everybody whose lease it would judge
        self._looked_at = now
        living = liveness.alive(connection)
        for incarnation, beats, node, _, _ in living:
            seen = self._seen.get(incarnation)
            if seen is None or seen.beats != beats:
                self._seen[incarnation] = _Seen(beats, now)
            elif now - seen.since > self._lease and liveness.declare_dead(connection, incarnation, beats):
                logger.warning(
                    "worker %s stopped renewing its lease and was declared dead (incarnation %s)", node, incarnation
                )
                died += 1
        self._seen = {row[0]: self._seen[row[0]] for row in living}
        return died
