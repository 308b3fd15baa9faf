"""Interrupts saga code that does not come to rest, so that one run cannot hold every pool child.

A turn that takes longer than its reservation is taken by the next child, and by all of them in the end.  Owns the alarm
that is set while turns are computed; a step's own is never set at the same time.
"""

from __future__ import annotations

import signal
import threading
from asyncio import events
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

from orchestrator.machine.loop import SagaLoop


def watch_for(timeout: timedelta) -> AbstractContextManager[object]:
    """Return what interrupts saga code with BlockedError once it has run for `timeout`, or up to twice as long.

    By a signal, which reaches code that waits; and so in the main thread alone.
    """
    return _Watch(timeout.total_seconds()) if threading.current_thread() is threading.main_thread() else nullcontext()


class _Watch:
    """An alarm that looks whether the loop has been quiet since it looked before; within itself it is set already."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._seen: tuple[SagaLoop, int] | None = None
        self._held = 0
        signal.signal(signal.SIGALRM, self._look)

    def __enter__(self) -> None:
        self._held += 1
        if self._held == 1:
            signal.setitimer(signal.ITIMER_REAL, self._seconds, self._seconds)

    def __exit__(self, *_: object) -> None:
        self._held -= 1
        if self._held == 0:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _look(self, number: int, frame: Any) -> None:
        loop = events._get_running_loop()
        seen, self._seen = self._seen, (loop, loop.rests) if isinstance(loop, SagaLoop) else None
        if self._seen is not None and self._seen == seen:
            self._seen[0].interrupt(
                f"the saga function ran for {self._seconds:g} s without coming to an `await` that waits: what blocks, "
                "computes for long or polls belongs into a step. Mend it and retry the run"
            )
