"""What a committed turn means to observers: journal entries as telemetry events, and a line in the log when it parks.

Owns the translation.  Must never be called before the commit, nor log why a run is parked: that may quote a payload.
Events cost nothing while nobody has subscribed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, cast

from orchestrator import telemetry
from orchestrator.errors import as_typed
from orchestrator.machine.fold import Fold
from orchestrator.machine.journal import Attempted, Ended, Entry, Parked, Settled, Undone
from orchestrator.machine.turn import Turn

logger = logging.getLogger(__name__)


def tell(fold: Fold, turn: Turn) -> None:
    """Emit the events of a turn that was committed, and log what of it waits for a person."""
    for entry in turn.entries:
        if type(entry) is Parked:
            what = f"the {entry.role} of {entry.key}" if entry.key else f"as a whole, {entry.role}"
            told = "run %s of %s is parked (%s) and waits for a person; `saga explain %s` says why, and what helps"
            logger.warning(told, fold.info.id, fold.info.saga, what, as_typed(fold.info.id))
    if not telemetry.observed():
        return
    if turn.position == 0:
        info = fold.info
        telemetry.emit(telemetry.RunStarted(run_id=info.id, saga=info.saga, at=info.started, version=info.version))
    for entry in turn.entries:
        make = _EVENTS.get(type(entry))
        if make is not None:
            telemetry.emit(make(fold, turn, cast(Any, entry)))


def _duration(began: str, at: datetime) -> timedelta:
    return max(timedelta(0), at - datetime.fromisoformat(began)) if began else timedelta(0)


def _about(fold: Fold, turn: Turn) -> dict[str, Any]:
    return {"run_id": fold.info.id, "saga": fold.info.saga, "at": turn.at}


def _settled(fold: Fold, turn: Turn, entry: Settled) -> telemetry.Event:
    return telemetry.StepFinished(
        **_about(fold, turn), key=entry.key, step=fold.steps[entry.key].asked.task, attempt=entry.attempt,
        outcome=cast(Any, entry.outcome), duration=_duration(entry.began, turn.at),
    )  # fmt: skip


def _attempted(fold: Fold, turn: Turn, entry: Attempted) -> telemetry.Event:
    again = next((work for work in turn.work if work.key == entry.key and work.role in (entry.role, "once")), None)
    return telemetry.AttemptFailed(
        **_about(fold, turn), key=entry.key, step=fold.steps[entry.key].asked.task, attempt=entry.attempt,
        error_type=str(entry.error.get("type", "")), retry_at=(again.due or turn.at) if again else None,
    )  # fmt: skip


def _undone(fold: Fold, turn: Turn, entry: Undone) -> telemetry.Event:
    undo = fold.steps[entry.key].asked.undo
    return telemetry.UndoFinished(
        **_about(fold, turn), key=entry.key, compensation=undo.task if undo else "", attempt=entry.attempt,
        duration=_duration(entry.began, turn.at),
    )  # fmt: skip


def _parked(fold: Fold, turn: Turn, entry: Parked) -> telemetry.Event:
    return telemetry.Parked(**_about(fold, turn), key=entry.key, reason=entry.why)


def _ended(fold: Fold, turn: Turn, entry: Ended) -> telemetry.Event:
    error = fold.raised or {}
    return telemetry.RunFinished(
        **_about(fold, turn), state=entry.state, duration=turn.at - fold.info.started,
        error_type=str(error.get("type", "")) if entry.state != "completed" else "",
    )  # fmt: skip


_EVENTS: dict[type[Entry], Callable[[Fold, Turn, Any], telemetry.Event]] = {
    Settled: _settled,
    Attempted: _attempted,
    Undone: _undone,
    Parked: _parked,
    Ended: _ended,
}
