"""Runs by filter: what is asked for differs from call to call, so that these statements are built with SQLAlchemy.

Apart from `runs`, which processes that only drive runs import without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, Text, cast, func, literal, or_, select, tuple_
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import JSONB

from orchestrator.codec import Json, dumps
from orchestrator.store import tables
from orchestrator.store.connection import Connection

_DIALECT = postgresql.psycopg.dialect()  # type: ignore[no-untyped-call]


def listed(connection: Connection, query: Select[Any]) -> list[dict[str, Any]]:
    """Return the rows of a query over tables of this schema, such as `listing`."""
    compiled = query.compile(dialect=_DIALECT, compile_kwargs={"render_postcompile": True})
    cursor = connection.execute(str(compiled), compiled.params)
    names = [column.name for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def listing(
    *,
    states: Sequence[str] = (),
    saga: str = "",
    parent: str = "",
    tags: Mapping[str, str] | None = None,
    limit: int = 50,
    before: datetime | None = None,
) -> Select[Any]:
    """Return the query of ``saga list``: the newest runs first (index runs_by_start)."""
    runs = tables.runs
    query = select(runs).order_by(runs.c.started_at.desc(), runs.c.id).limit(limit)
    if states:
        query = query.where(runs.c.state.in_(states))
    if saga:
        query = query.where(runs.c.saga == saga)
    if parent:
        query = query.where(runs.c.parent_id == parent)
    if before is not None:
        query = query.where(runs.c.started_at < before)
    return _tagged(query, tags or {})


def _tagged(query: Select[Any], tags: Mapping[str, str]) -> Select[Any]:
    """Only runs with these tags, each as the text of its value."""
    for name, value in tags.items():
        wanted = [cast(literal(dumps({name: given}), Text), JSONB) for given in _readings(value)]
        query = query.where(or_(*(tables.runs.c.tags.contains(one) for one in wanted)))
    return query


@dataclass(frozen=True, slots=True)
class Found:
    """A run as far as an order for many needs to know it."""

    id: str
    saga: str
    state: str
    past_pivot: bool
    error: dict[str, Json] | None
    parked: list[dict[str, Json]]
    started_at: datetime


def unfinished(
    *,
    saga: str = "",
    states: Sequence[str] = (),
    started_after: datetime | None = None,
    started_before: datetime | None = None,
    tags: Mapping[str, str] | None = None,
    parked: bool = False,
    after: Found | None = None,
    limit: int = 500,
) -> Select[Any]:
    """Return the query of a page of the runs that have not ended, the oldest first (index runs_by_start)."""
    runs = tables.runs
    query = select(*(runs.c[name] for name in Found.__slots__)).where(runs.c.finished_at.is_(None))
    query = query.order_by(runs.c.started_at, runs.c.id).limit(limit)
    if saga:
        query = query.where(runs.c.saga == saga)
    if states:
        query = query.where(runs.c.state.in_(states))
    if started_after is not None:
        query = query.where(runs.c.started_at >= started_after)
    if started_before is not None:
        query = query.where(runs.c.started_at < started_before)
    if parked:
        query = query.where(func.jsonb_array_length(runs.c.parked) > 0)
    if after is not None:
        query = query.where(tuple_(runs.c.started_at, runs.c.id) > (after.started_at, after.id))
    return _tagged(query, tags or {})


def found(connection: Connection, query: Select[Any]) -> list[Found]:
    """Return the rows of `unfinished`."""
    return [Found(**row) for row in listed(connection, query)]


def _readings(value: str | int | float) -> Iterator[Json]:
    """Yield what a tag may be that is written so, on a command line too: text, a number or a truth value."""
    text = value if isinstance(value, str) else json.dumps(value)
    yield text
    try:
        read = json.loads(text)
    except ValueError:
        return
    if isinstance(read, int) or (isinstance(read, float) and math.isfinite(read)):  # no tag is NaN or Infinity
        yield read
