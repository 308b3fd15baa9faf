"""Finds a worker that answers no doorbell any more, so that its supervisor can start it again.

Owns that judgement.  Must never end anything itself, and never judge while the database or the broker is away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from time import monotonic

from orchestrator.store import liveness
from orchestrator.store.connection import Connection


class Watchdog:
    """Watches one worker: one that has slots to spare and lets work lie that it is rung for is stuck."""

    def __init__(self, patience: timedelta, clock: Callable[[], float] = monotonic) -> None:
        self._patience = patience
        self._clock = clock
        self._since: float | None = None

    def is_stuck(
        self, connection: Connection, incarnation: int, queues: Sequence[str], targets: Sequence[str], *, rung: bool
    ) -> bool:
        """Look once; true when every look for the whole patience, by this process's clock, found the same."""
        if not rung or not liveness.neglects(connection, incarnation, queues, targets, self._patience):
            self._since = None
            return False
        now = self._clock()
        self._since = now if self._since is None else self._since
        return now - self._since >= self._patience.total_seconds()
