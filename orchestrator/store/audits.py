"""What the audits of the engine read: runs with their journals, and whose the rows of the other tables are.

Reads only, page by page, in the caller's transaction.  Must never judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any

from orchestrator.store.connection import Connection

_FETCH = 500  # journal rows at once


@dataclass(slots=True)
class Audited:
    """A run with its family's state and what is outstanding of it; `journal` is to be read before the next run is."""

    row: dict[str, Any]
    journal: Iterator[tuple[int, datetime, list[Any]]]

    def __getitem__(self, name: str) -> Any:
        return self.row[name]


_COLUMNS = (
    "id", "saga", "version", "state", "input", "output", "error", "left_effects", "parked", "parent_id", "root_id",
    "queue", "priority", "position", "past_pivot", "link", "since", "started_at", "deadline_at", "finished_at",
)  # fmt: skip
# Primary key of runs, and for what is outstanding the indexes by run.
_RUNS = f"""
SELECT {", ".join(f"r.{name}" for name in _COLUMNS)}, p.id IS NOT NULL AS has_parent, root.state AS root_state,
    root.link AS root_link,
    ARRAY(SELECT key FROM orchestrator.work w WHERE w.run_id = r.id) AS work,
    EXISTS (SELECT FROM orchestrator.arrivals a WHERE a.run_id = r.id) AS unread,
    ARRAY(SELECT key FROM orchestrator.locks l WHERE l.run_id = r.id AND l.granted_at IS NULL) AS in_line
FROM (SELECT * FROM orchestrator.runs WHERE id > %s ORDER BY id LIMIT %s) AS r
LEFT JOIN orchestrator.runs p ON p.id = r.parent_id
LEFT JOIN orchestrator.runs root ON root.id = r.root_id
ORDER BY r.id
"""
# The primary key of journal has the order.
_JOURNALS = "SELECT run_id, seq, at, entries FROM orchestrator.journal WHERE run_id = ANY (%s) ORDER BY run_id, seq"


def runs(connection: Connection, after: str, limit: int) -> Iterator[Audited]:
    """Yield the next runs by their ids; only the journal of one is in memory at a time."""
    found = connection.execute(_RUNS, (after, limit))
    names = [column.name for column in found.description or ()]
    rows = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    with connection.cursor(name="journals") as cursor:
        cursor.itersize = _FETCH
        cursor.execute(_JOURNALS, ([row["id"] for row in rows],))
        groups = groupby(cursor, key=lambda row: row[0])
        run_id, group = next(groups, ("", iter(())))
        for row in rows:
            if run_id == row["id"]:
                yield Audited(row, ((seq, at, entries) for _, seq, at, entries in group))
                run_id, group = next(groups, ("", iter(())))
            else:
                yield Audited(row, iter(()))


_OPEN = "SELECT id FROM orchestrator.runs WHERE id = ANY (%s) AND finished_at IS NULL"


def still_open(connection: Connection, run_ids: Sequence[str]) -> set[str]:
    """Return which of these runs have not ended (primary key)."""
    return {row[0] for row in connection.execute(_OPEN, (list(run_ids),)).fetchall()}


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
SELECT o.run_id, r.state, {settling} FROM owner o LEFT JOIN orchestrator.runs r ON r.id = o.run_id
WHERE o.run_id IS NOT NULL ORDER BY o.run_id
"""
_RUNNING = f"""coalesce(r.finished_at > orchestrator.now() - {_SETTLING}, true) OR EXISTS (
    SELECT FROM orchestrator.work w WHERE w.run_id = o.run_id AND w.expires_at > orchestrator.now())"""


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
