"""The options of the calls that take many, for type checkers and editors; what a call does with them it says itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypedDict


class _Start(TypedDict, total=False):
    countdown: float | timedelta | None  # seconds
    eta: datetime | str | None  # aware, or ISO 8601 with an offset
    priority: int | None  # 0 to 9, higher first
    deadline: float | timedelta | None  # from the start; seconds
    queue: str | None
    tags: Mapping[str, str | int | float | bool] | None


class StartOptions(_Start, total=False):
    """How a run is started."""

    task_id: str | None
    transaction: Any  # an open connection or session of psycopg, SQLAlchemy or Django


class CanvasOptions(StartOptions, total=False):
    """How a canvas is started."""

    link: Any  # a signature, or several
    link_error: Any


class StartManyOptions(_Start, total=False):
    """How many runs are started."""

    task_ids: Sequence[str] | None


class BulkOptions(TypedDict, total=False):
    """Which runs an order is for, and who gives it; see `orchestrator.bulk.Filter`."""

    saga: Any  # a saga, or the name of one
    states: Sequence[str]
    step: Any  # a step, the name of one or the last part of it, or a key
    started_after: datetime | str | None
    started_before: datetime | str | None
    tags: dict[str, Any]
    limit: int | None
    by: str
    reason: str
    dry_run: bool
    everything: bool


class PruneOptions(TypedDict, total=False):
    """Which of the old runs are deleted, and what becomes of them before."""

    states: Iterable[str]
    saga: Any  # a saga, or the name of one
    limit: int | None
    dry_run: bool
    archive: str | os.PathLike[str] | None
