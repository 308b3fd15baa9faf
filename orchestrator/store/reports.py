"""Reports of a reconciliation, and how far each of their checks has come.

Statements here never commit.  A page is written only over the page before it, so that two who work on the same report
never count anything twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orchestrator.codec import dumps
from orchestrator.failpoints import failpoint
from orchestrator.store.connection import CLOCK, Connection

_LONGEST_WANTED = 2000  # bytes; an entry of a B-tree has at most 2704

# One that was begun the night before and never finished is given up: it would mix two days.  Two nights may be less
# than a day apart: by an hour when the clock is set forward, and by as much as the first began late.
_GIVE_UP = f"""
UPDATE orchestrator.reports SET finished_at = {CLOCK}, given_up = true
WHERE wanted = %(wanted)s AND finished_at IS NULL AND started_at < {CLOCK} - interval '20 hours'
"""
_OPEN = f"""
INSERT INTO orchestrator.reports (wanted, started_at) VALUES (%(wanted)s, {CLOCK})
ON CONFLICT (wanted) WHERE finished_at IS NULL DO UPDATE SET wanted = excluded.wanted RETURNING id, started_at
"""
_CHECKS = (
    "INSERT INTO orchestrator.report_checks (report_id, name) SELECT %s, unnest(%s::text[]) ON CONFLICT DO NOTHING"
)


def open_report(connection: Connection, names: Sequence[str], now: datetime | None = None) -> tuple[int, datetime]:
    """Return the report on these checks that is not finished, or a new one (index reports_open)."""
    values = {"wanted": _wanted(names), "now": now}
    failpoint("reconcile.open.before", connection)
    connection.execute(_GIVE_UP, values)
    failpoint("reconcile.open.gave_up", connection)
    row = connection.execute(_OPEN, values).fetchone()
    assert row is not None
    failpoint("reconcile.open.made", connection)
    connection.execute(_CHECKS, (row[0], list(names)))
    failpoint("reconcile.open.after", connection)
    return row[0], row[1]


def _wanted(names: Sequence[str]) -> str:
    """Return what tells a report on these checks from others: their names, or a digest; no index takes a long text."""
    wanted = dumps([*sorted(names)])
    raw = wanted.encode()
    return wanted if len(raw) <= _LONGEST_WANTED else f"sha256:{hashlib.sha256(raw).hexdigest()}"


@dataclass(slots=True)
class Progress:
    """How far a check has come: `sums` of what was looked at, as text, by currency; `examples`: its first breaks."""

    name: str
    pages: int
    cursor: str
    looked_at: int
    breaks: int
    sums: dict[str, Any]
    examples: list[Any]
    error: str | None
    done: bool


_FIELDS = "name, pages, cursor, looked_at, breaks, sums, examples, error, done"


def progress(connection: Connection, report_id: int) -> list[Progress]:
    """Return how far the checks of a report have come (primary key of report_checks)."""
    statement = f"SELECT {_FIELDS} FROM orchestrator.report_checks WHERE report_id = %s ORDER BY name"
    return [Progress(*row) for row in connection.execute(statement, (report_id,)).fetchall()]


_ADVANCE = """
UPDATE orchestrator.report_checks SET pages = pages + 1, cursor = %(cursor)s, looked_at = %(looked_at)s,
    breaks = %(breaks)s, sums = %(sums)s, examples = %(examples)s, error = %(error)s, done = %(done)s
WHERE report_id = %(report)s AND name = %(name)s AND pages = %(pages)s AND NOT done
"""


def advance(connection: Connection, report_id: int, to: Progress) -> bool:
    """Write a page; False if somebody else has written one meanwhile."""
    values = {
        "report": report_id, "name": to.name, "pages": to.pages, "cursor": to.cursor, "looked_at": to.looked_at,
        "breaks": to.breaks, "sums": dumps(to.sums), "examples": dumps(to.examples), "error": to.error, "done": to.done,
    }  # fmt: skip
    return connection.execute(_ADVANCE, values).rowcount == 1


_FINISH = f"""
UPDATE orchestrator.reports SET finished_at = {CLOCK} WHERE id = %(id)s AND finished_at IS NULL
"""


def finish(connection: Connection, report_id: int, now: datetime | None = None) -> None:
    """Close a report; the next one is another."""
    connection.execute(_FINISH, {"id": report_id, "now": now})


_KEEP = "interval '400 days'"
# Primary keys: the oldest come first.
_FORGET = f"""
WITH old AS (
    SELECT id FROM (SELECT id, started_at FROM orchestrator.reports ORDER BY id LIMIT 100) AS first
    WHERE started_at < {CLOCK} - {_KEEP}
), checks AS (
    DELETE FROM orchestrator.report_checks c USING old WHERE c.report_id = old.id
)
DELETE FROM orchestrator.reports r USING old WHERE r.id = old.id
"""


def forget(connection: Connection, now: datetime | None = None) -> int:
    """Delete reports that are older than 400 days, at most a hundred; returns how many."""
    return connection.execute(_FORGET, {"now": now}).rowcount


_LATEST = f"""
SELECT DISTINCT ON (c.name) r.started_at, {", ".join(f"c.{name}" for name in _FIELDS.split(", "))}
FROM (SELECT id, started_at FROM orchestrator.reports
      WHERE (finished_at IS NOT NULL AND NOT given_up) OR id = %(id)s ORDER BY id DESC LIMIT 100) AS r
JOIN orchestrator.report_checks c ON c.report_id = r.id ORDER BY c.name, r.id DESC
"""


def latest(connection: Connection, report_id: int) -> list[tuple[datetime, Progress]]:
    """Return each check as it was last, in this report or in the hundred before, and when (primary keys)."""
    found = connection.execute(_LATEST, {"id": report_id}).fetchall()
    return [(row[0], Progress(*row[1:])) for row in found]


_TREND = """
SELECT r.id, r.started_at, sum(c.looked_at)::bigint, sum(c.breaks)::bigint, count(c.error)
FROM (SELECT id, started_at FROM orchestrator.reports
      WHERE finished_at IS NOT NULL AND NOT given_up AND id < %s AND wanted = (
          SELECT wanted FROM orchestrator.reports WHERE id = %s) ORDER BY id DESC LIMIT 14) AS r
JOIN orchestrator.report_checks c ON c.report_id = r.id GROUP BY r.id, r.started_at ORDER BY r.id DESC
"""


@dataclass(frozen=True, slots=True)
class Earlier:
    """What an earlier report came to."""

    id: int
    started_at: datetime
    looked_at: int
    breaks: int
    errors: int


def trend(connection: Connection, report_id: int) -> list[Earlier]:
    """Return the last reports on the same checks before one, the newest first (primary keys)."""
    return [Earlier(*row) for row in connection.execute(_TREND, (report_id, report_id)).fetchall()]
