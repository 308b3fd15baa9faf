"""Interrupts code of an application that does not come back, so that one check or hook cannot hold a night for ever.

Owns the alarm that is set meanwhile, and puts back the handler that was there.  Must never interrupt a statement: that
has a limit of its own, and its connection would be of no more use.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_AGAIN_S = 1.0  # after a statement was under way
_INSIST_S = 10.0  # after it was caught by a loop that tries again


@contextlib.contextmanager
def at_most(seconds: float, in_statement: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Interrupt the block after so long, as soon as it runs Python code and no statement.  Raises: TimeoutError.

    By a signal, which reaches code that waits; and so in the main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over = False

    def interrupt(number: int, frame: Any) -> None:
        if over:  # it came just before the end, and is heard a little later
            return
        if not in_statement():
            raise TimeoutError(f"it did not come back within {seconds:g} s, and was interrupted")
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S, _INSIST_S)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, _INSIST_S)
    try:
        yield
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
