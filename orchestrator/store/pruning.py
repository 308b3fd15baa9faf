"""Which runs may go, and how they go: a run with all that belongs to it, and its id stays taken.

Statements here never commit.  Must never delete what has not ended, nor a part of a family whose other part stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from orchestrator.store.connection import CLOCK, Connection


def clock(connection: Connection, now: datetime | None = None) -> datetime:
    """Return the database's time."""
    row = connection.execute(f"SELECT {CLOCK}", {"now": now}).fetchone()
    assert row is not None
    found: datetime = row[0]
    return found


@dataclass(frozen=True, slots=True)
class Seen:
    """A run that was looked at; `fits` if it heads a family, and it fits what was asked for."""

    started_at: datetime
    id: str
    fits: bool


_EVER = datetime.min.replace(tzinfo=UTC)
# Index runs_by_start.  What ended before an instant began before it.
_PAGE = """
SELECT started_at, id, parent_id IS NULL AND finished_at < %(before)s
    AND (%(states)s::text[] = '{}' OR state = ANY (%(states)s)) AND %(saga)s IN ('', saga)
FROM orchestrator.runs WHERE started_at < %(before)s AND (started_at, id) > (%(at)s, %(id)s)
ORDER BY started_at, id LIMIT %(limit)s
"""


def page(
    connection: Connection, before: datetime, after: Seen | None, *, states: Sequence[str], saga: str, limit: int
) -> list[Seen]:
    """Return the next runs that began before an instant, the oldest first; those that fit ended before it."""
    values = {
        "before": before, "states": list(states), "saga": saga, "limit": limit,
        "at": after.started_at if after else _EVER, "id": after.id if after else "",
    }  # fmt: skip
    return [Seen(*row) for row in connection.execute(_PAGE, values).fetchall()]


@dataclass(frozen=True, slots=True)
class Member:
    """A run of a family: its children, its ended links, the runs that corrected late effects of it."""

    head: str
    id: str
    saga: str
    state: str
    position: int
    rows: int
    free: bool  # it has ended, and nothing of it is outstanding


# Indexes runs_by_parent and runs_pkey; those of work, arrivals and locks by their run.  OFFSET and LIMIT keep any of
# these from being read whole: a join or NOT EXISTS is planned so when tables are small, and the plan is kept.  Heads
# come last.
_FAMILIES = """
WITH RECURSIVE family (head, id, depth) AS (
    SELECT id, id, 0 FROM unnest(%s::text[]) AS id
    UNION ALL SELECT f.head, r.id, f.depth + 1
    FROM family f CROSS JOIN LATERAL (SELECT id FROM orchestrator.runs WHERE parent_id = f.id OFFSET 0) AS r
)
SELECT f.head, r.id, r.saga, r.state, r.position, r.position - r.since, r.finished_at IS NOT NULL
    AND (SELECT true FROM orchestrator.work w WHERE w.run_id = r.id LIMIT 1) IS NULL
    AND (SELECT true FROM orchestrator.arrivals a WHERE a.run_id = r.id LIMIT 1) IS NULL
    AND (SELECT true FROM orchestrator.locks l WHERE l.run_id = r.id LIMIT 1) IS NULL
FROM family f CROSS JOIN LATERAL (SELECT * FROM orchestrator.runs WHERE id = f.id OFFSET 0) AS r
ORDER BY f.head, f.depth DESC, r.id
"""


def families(connection: Connection, heads: Sequence[str]) -> list[Member]:
    """Return these runs with all that belong to them, family by family, a head after its members."""
    return [Member(*row) for row in connection.execute(_FAMILIES, (list(heads),)).fetchall()]


# Ended links cannot be started by anybody: their ids are the engine's.
_BURY = f"""
INSERT INTO orchestrator.pruned (id, saga, state, pruned_at)
SELECT id, saga, state, {CLOCK} FROM orchestrator.runs WHERE id = ANY (%(ids)s) AND state <> 'continued'
ORDER BY id ON CONFLICT (id) DO NOTHING
"""


def bury(connection: Connection, ids: Sequence[str], now: datetime | None = None) -> None:
    """Take ids for ever.  To be committed before the runs go: a start that waits for a row to go sees it then."""
    connection.execute(_BURY, {"ids": list(ids), "now": now})


# Locked in the order of their ids: two that prune at once have batches that overlap, and must not wait in a circle.
_DELETE = """
WITH mine AS MATERIALIZED (
    SELECT r.id FROM orchestrator.runs r JOIN unnest(%(ids)s::text[], %(positions)s::integer[]) AS g (id, position)
        USING (id, position)
    WHERE r.id = ANY (%(ids)s) AND r.finished_at IS NOT NULL ORDER BY r.id FOR UPDATE OF r
), gone AS (
    DELETE FROM orchestrator.runs WHERE id = ANY (ARRAY(SELECT id FROM mine)) RETURNING id
), rows AS (
    DELETE FROM orchestrator.journal WHERE run_id = ANY (ARRAY(SELECT id FROM gone))
)
SELECT count(*) FROM gone
"""


def delete(connection: Connection, members: Sequence[Member]) -> bool:
    """Delete runs with their journals; False if one of them has moved since, and then the caller rolls back."""
    values = {"ids": [each.id for each in members], "positions": [each.position for each in members]}
    row = connection.execute(_DELETE, values).fetchone()
    return row is not None and row[0] == len(members)
