"""What the audits of the engine read: runs with their journals, and whose the rows of the other tables are.

Reads only, page by page, in the caller's transaction.  Must never judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg.types.json import set_json_loads

from orchestrator.codec import read_stored
from orchestrator.store.connection import Connection
from orchestrator.store.journals import with_journals

_AT_ONCE = 100


@dataclass(slots=True)
class Audited:
    """A run with its family's state and what is outstanding of it; `journal` is to be read before the next run is."""

    row: dict[str, Any]
    journal: Iterator[tuple[int, datetime, list[Any]]]

    def __getitem__(self, name: str) -> Any:
        return self.row[name]


# Primary key of runs, and for what is outstanding the indexes by run.  LIMIT keeps any table from being read whole: a
# join or EXISTS is planned so when tables are small, and the plan is kept.  Empty lists need not be decoded.
_RUNS = """
SELECT r.id, r.saga, r.version, r.state, r.output, r.error, nullif(r.left_effects, '[]') AS left_effects,
    nullif(r.parked, '[]') AS parked, r.parent_id, r.root_id, r.queue, r.position, r.past_pivot, r.link, r.since,
    r.started_at, r.finished_at, p.id IS NOT NULL AS has_parent, root.state AS root_state, root.link AS root_link,
    ARRAY(SELECT key FROM orchestrator.work w WHERE w.run_id = r.id) AS work,
    (SELECT true FROM orchestrator.arrivals a WHERE a.run_id = r.id LIMIT 1) IS NOT NULL AS unread,
    ARRAY(SELECT key FROM orchestrator.locks l WHERE l.run_id = r.id AND l.granted_at IS NULL) AS in_line
FROM (SELECT * FROM orchestrator.runs WHERE id > %s ORDER BY id LIMIT %s) AS r
LEFT JOIN LATERAL (SELECT id FROM orchestrator.runs WHERE id = r.parent_id LIMIT 1) AS p ON true
LEFT JOIN LATERAL (
    SELECT state, link FROM orchestrator.runs WHERE id = r.root_id AND r.root_id <> r.id LIMIT 1
) AS root ON true
ORDER BY r.id
"""


def runs(connection: Connection, after: str, limit: int) -> Iterator[Audited]:
    """Yield the next runs by their ids; few rows of them and only the journal of one are in memory at a time."""
    with connection.cursor() as cursor:
        set_json_loads(read_stored, cursor)
        while limit > 0:
            cursor.execute(_RUNS, (after, min(limit, _AT_ONCE)))
            names = [column.name for column in cursor.description or ()]
            rows = {row[0]: dict(zip(names, row, strict=True)) for row in cursor}
            if not rows:
                return
            *_, last = rows
            where = "run_id > %s AND run_id <= %s"
            for row, journal in with_journals(connection, rows, where, (after, last), "seq, at, entries"):
                yield Audited(row, journal)
            after, limit = last, limit - len(rows)


_OPEN = "SELECT id FROM orchestrator.runs WHERE id = ANY (%s) AND finished_at IS NULL"


def still_open(connection: Connection, run_ids: Sequence[str]) -> set[str]:
    """Return which of these runs have not ended (primary key)."""
    return {row[0] for row in connection.execute(_OPEN, (list(run_ids),)).fetchall()}


_KNOWN = """
SELECT id FROM orchestrator.runs WHERE id = ANY (%(ids)s)
UNION ALL SELECT id FROM orchestrator.pruned WHERE id = ANY (%(ids)s)
"""


def known(connection: Connection, run_ids: Sequence[str]) -> set[str]:
    """Return which of these runs are there, or were until they were pruned (primary keys)."""
    return {row[0] for row in connection.execute(_KNOWN, {"ids": list(run_ids)}).fetchall()}


TABLES = ("arrivals", "journal", "locks", "work")
_SETTLING = "interval '1 hour'"  # what a run that has just ended may still have lying about
# Of each index, which begins with run_id, only one row a run is read.
_OWNERS = """
WITH RECURSIVE owner (run_id, n) AS (
    (SELECT run_id, 1 FROM orchestrator.{table} WHERE run_id > %s ORDER BY run_id LIMIT 1)
    UNION ALL
    SELECT (SELECT t.run_id FROM orchestrator.{table} t WHERE t.run_id > o.run_id ORDER BY t.run_id LIMIT 1), n + 1
    FROM owner o WHERE o.run_id IS NOT NULL AND n < %s
)
SELECT o.run_id, r.state, {settling} FROM owner o LEFT JOIN LATERAL (
    SELECT state, finished_at FROM orchestrator.runs WHERE id = o.run_id LIMIT 1
) AS r ON true
WHERE o.run_id IS NOT NULL ORDER BY o.run_id
"""
_RUNNING = f"""coalesce(r.finished_at > orchestrator.now() - {_SETTLING}, true) OR (
    SELECT true FROM orchestrator.work w WHERE w.run_id = o.run_id AND w.expires_at > orchestrator.now() LIMIT 1
) IS NOT NULL"""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose rows there are in a table: the state of that run, None if there is none; whether it may have them."""

    run_id: str
    state: str | None
    may: bool


def owners(connection: Connection, table: str, after: str, limit: int) -> list[Owner]:
    """Return the next owners of rows in one of `TABLES`, by their ids."""
    assert table in TABLES
    statement = _OWNERS.format(table=table, settling="true" if table == "journal" else _RUNNING)
    return [Owner(*row) for row in connection.execute(statement, (after, limit)).fetchall()]
