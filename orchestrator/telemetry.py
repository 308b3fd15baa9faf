"""The seam for metrics, traces and alerts: what happened, told to observers once it is committed.

Owns the events and the list of observers of this process. It must never be called inside an open transaction,
never carry an argument or a result, and never let an observer's error reach the engine.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, TypeAlias

__all__ = [
    "AttemptFailed",
    "Event",
    "Observer",
    "Parked",
    "RunEvent",
    "RunFinished",
    "RunStarted",
    "StepFinished",
    "UndoFinished",
    "emit",
    "observed",
    "subscribe",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent:
    """What every event carries: which run, of which saga, and when by the database's clock (aware, UTC)."""

    run_id: str
    saga: str
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(RunEvent):
    """A run took its first turn."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished(RunEvent):
    """A run reached a terminal state; ``duration`` counts from its start."""

    state: str
    duration: timedelta
    error_type: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished(RunEvent):
    """A step is settled; ``duration`` is that of its last attempt."""

    key: str
    step: str
    attempt: int
    outcome: Literal["succeeded", "rejected", "unknown", "failed", "withdrawn"]
    duration: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed(RunEvent):
    """An attempt did not succeed; ``retry_at`` is None if it was the last one."""

    key: str
    step: str
    attempt: int
    error_type: str
    retry_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoFinished(RunEvent):
    """A compensation succeeded: the effect of the step ``key`` is undone."""

    key: str
    compensation: str
    attempt: int
    duration: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked(RunEvent):
    """A run waits for an operator; ``key`` is empty if the run as a whole is parked."""

    key: str
    reason: str


Event: TypeAlias = RunStarted | RunFinished | StepFinished | AttemptFailed | UndoFinished | Parked
Observer: TypeAlias = Callable[[Event], None]

_lock = threading.Lock()
_observers: tuple[Observer, ...] = ()
_reported: set[int] = set()


def subscribe(observer: Observer) -> Callable[[], None]:
    """Have an observer called with every event of this process; return the function that ends it.

    Observers are called in the thread that committed, in the order they
    subscribed, and should return at once.
    """
    global _observers
    with _lock:
        _observers = (*_observers, observer)

    def unsubscribe() -> None:
        global _observers
        with _lock:
            _observers = tuple(other for other in _observers if other is not observer)
            _reported.discard(id(observer))

    return unsubscribe


def observed() -> bool:
    """Tell whether anybody has subscribed, so that events need not be made for nobody."""
    return bool(_observers)


def emit(event: Event) -> None:
    """Tell every observer what happened; to be called after the commit. Never raises an observer's error."""
    for observer in _observers:
        try:
            observer(event)
        except Exception:
            _report(observer, event)


def _report(observer: Observer, event: Event) -> None:
    with _lock:
        if id(observer) in _reported:
            return
        _reported.add(id(observer))
    logger.exception(
        "The telemetry observer %s raised at %s of run %s; later errors of it are not logged.",
        getattr(observer, "__qualname__", type(observer).__qualname__),
        type(event).__name__,
        event.run_id,
    )
