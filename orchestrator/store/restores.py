"""What a restore of the database leaves to be done: the lineage of the data, and a sweep over the runs of that moment.

Owns its statements.  A page of the sweep is one transaction of the caller's.  Lock order: the sweep's row (so that two
of them work one after the other), then runs by id, then their work.  Must never decide what becomes of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orchestrator.codec import Json, dumps
from orchestrator.store.connection import CLOCK, Connection


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where the data was last looked at, and where it is: the server's identifier, its timeline, the table's number.

    A timeline begins whenever a server is promoted: at the end of a restore, and at a failover.  A table gets a new
    number when a dump is put back.
    """

    known: tuple[int, str, int]
    now: tuple[int, str, int]

    @property
    def is_broken(self) -> bool:
        """Whether the data may be from a moment in the past of what was written."""
        return self.known != self.now


# The timeline that is written to now: the one of pg_control_checkpoint() lags behind until the next checkpoint.
_NOW = """
SELECT system_identifier, substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) AS timeline,
    'orchestrator.lineage'::regclass::oid AS relation
FROM pg_control_system()
"""
_LINEAGE = f"SELECT l.system, l.timeline, l.relation, n.* FROM orchestrator.lineage l, ({_NOW}) AS n"


def lineage(connection: Connection) -> Lineage:
    """Return what is known of the data's lineage.  Must not be asked of a standby."""
    row = connection.execute(_LINEAGE).fetchone()
    assert row is not None
    return Lineage(row[:3], row[3:])


def acknowledge(connection: Connection) -> None:
    """Note that the data goes on where it is now (primary key)."""
    connection.execute(f"UPDATE orchestrator.lineage SET (system, timeline, relation) = ({_NOW})")


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep, and how far it has come."""

    id: int
    by: str
    began_at: datetime
    swept_to: str
    found: dict[str, Any]


_BEGIN = f"INSERT INTO orchestrator.restores (by, began_at) VALUES (%(by)s, {CLOCK}) ON CONFLICT DO NOTHING"
_OPEN = "SELECT id, by, began_at, swept_to, found FROM orchestrator.restores WHERE finished_at IS NULL"


def begin(connection: Connection, by: str, now: datetime | None = None) -> None:
    """Begin a sweep, unless one is open already (index restores_open)."""
    connection.execute(_BEGIN, {"by": by, "now": now})


def open_sweep(connection: Connection, *, hold: bool = False) -> Sweep | None:
    """Return the sweep that has not ended, held until the transaction ends if that is asked for."""
    row = connection.execute(_OPEN + (" FOR UPDATE" if hold else "")).fetchone()
    return Sweep(*row) if row else None


_LAST = "SELECT began_at, by FROM orchestrator.restores ORDER BY id DESC LIMIT 1"


def last(connection: Connection) -> tuple[datetime, str] | None:
    """Return when somebody began to look after the last restore, and who; None if nobody ever did (primary key)."""
    return connection.execute(_LAST).fetchone()


def advance(connection: Connection, sweep: int, swept_to: str, found: Json) -> None:
    """Write down how far a sweep has come, and what it found up to there."""
    connection.execute(
        "UPDATE orchestrator.restores SET swept_to = %s, found = %s::jsonb WHERE id = %s",
        (swept_to, dumps(found), sweep),
    )


def finish(connection: Connection, sweep: int, now: datetime | None = None) -> None:
    """End a sweep."""
    connection.execute(
        f"UPDATE orchestrator.restores SET finished_at = {CLOCK} WHERE id = %(id)s", {"id": sweep, "now": now}
    )


# A page of the runs that have not ended (primary key).  No worker lives, but whoever starts or cancels runs may.
_PAGE = """
SELECT id FROM orchestrator.runs WHERE finished_at IS NULL AND id > %(after)s ORDER BY id LIMIT %(limit)s
"""


def page(connection: Connection, after: str, limit: int, *, hold: bool = False) -> list[str]:
    """Return the ids of a page of the runs that have not ended, held if that is asked for."""
    rows = connection.execute(_PAGE + ("FOR UPDATE" if hold else ""), {"after": after, "limit": limit}).fetchall()
    return [row[0] for row in rows]


# Begun or not: it may have been begun, and even have ended, in the time that is forgotten (primary key of work).
_TAKE_AWAY = "DELETE FROM orchestrator.work WHERE run_id = ANY (%s) AND role <> 'turn'"


def take_away(connection: Connection, run_ids: Sequence[str]) -> None:
    """Delete what is due of runs but their turns; the caller leaves each of them an arrival in the same transaction."""
    connection.execute(_TAKE_AWAY, (list(run_ids),))
