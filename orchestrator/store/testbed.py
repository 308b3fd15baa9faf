"""A database that belongs to tests: made next to another one, emptied at will, with a clock that can be moved.

Owns the statements for that.  Must never touch a database that anybody else works with: `claim` refuses one that holds
runs and was not claimed before.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from psycopg import sql

from orchestrator.errors import UsageError
from orchestrator.settings import Settings
from orchestrator.store.connection import Connection, open_connection
from orchestrator.store.gates import LINE
from orchestrator.store.migration import migrate

# The clock goes on by itself, ahead of the real one by what was skipped.  A sequence, so that everybody sees a move at
# once, whatever snapshot they have.  Losing the last commits in a crash of the server is nothing to a test.
_CLOCK = """
CREATE SEQUENCE IF NOT EXISTS orchestrator.skipped_microseconds MINVALUE 0 START 0;
CREATE OR REPLACE FUNCTION orchestrator.now() RETURNS timestamptz LANGUAGE sql STABLE AS
    'SELECT statement_timestamp() + last_value * interval ''1 microsecond'' FROM orchestrator.skipped_microseconds';
"""
_CLAIMED = "SELECT to_regclass('orchestrator.skipped_microseconds') IS NOT NULL"
_HOLDS_RUNS = "SELECT EXISTS (SELECT FROM orchestrator.runs)"


def create(server_url: str) -> str:
    """Make a database of a test's own on the server of `server_url`; returns its URL.  Raises: StoreUnavailableError.

    It has the orchestrator's schema and a clock that can be moved.
    """
    name = f"orchestrator_test_{uuid.uuid4().hex}"
    _execute(server_url, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    url = urlsplit(server_url)._replace(path=f"/{name}").geturl()
    claim(url)
    return url


def drop(database_url: str, server_url: str) -> None:
    """Drop what `create` made, whoever is still connected to it."""
    name = urlsplit(database_url).path.removeprefix("/")
    _execute(server_url, sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def claim(database_url: str) -> None:
    """Bring the schema up to date and put the movable clock into it.

    Raises: UsageError if the database holds runs of somebody else.
    """
    migrate(database_url)
    with open_connection(_dsn(database_url), name="test") as connection:
        if _told(connection, _CLAIMED):
            return
        if _told(connection, _HOLDS_RUNS):
            raise UsageError(
                "this database holds runs, and a testing environment empties its database and moves its clock; "
                "give it a database of its own"
            )
        connection.execute(_CLOCK)
        name = sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("ALTER DATABASE {} SET synchronous_commit = off").format(name))


def tables(connection: Connection) -> list[str]:
    """Return the tables that hold runs and what belongs to them."""
    rows = connection.execute(
        "SELECT tablename FROM pg_tables WHERE schemaname = 'orchestrator' "
        "AND tablename NOT IN ('alembic_version', 'incarnations') ORDER BY tablename"
    )
    return [name for (name,) in rows]


def empty(connection: Connection, names: Collection[str]) -> None:
    """Forget every run; in a small table this is much quicker than TRUNCATE."""
    statement = sql.SQL("; ").join(
        sql.SQL("DELETE FROM orchestrator.{}").format(sql.Identifier(name)) for name in names
    )
    connection.execute(statement)


_SKIP = """
SELECT setval('orchestrator.skipped_microseconds', last_value + %s::bigint) FROM orchestrator.skipped_microseconds
"""


def skip(connection: Connection, length: timedelta) -> None:
    """Move the clock ahead."""
    connection.execute(_SKIP, [length // timedelta(microseconds=1)])


def now(connection: Connection) -> datetime:
    """Return the time of this database."""
    at: datetime = _told(connection, "SELECT orchestrator.now()")
    return at


# What may be taken, and when: a reservation holds for a while, an arrival that no turn took is woken after a second,
# and who stands in line at a gate is let in by a pump.
_LOOK = """
WITH waiting AS (
    SELECT w.run_id, w.key, w.attempt, w.due_at, r.state,
        greatest(w.due_at, w.reserved_at + %(reservation)s::interval) AS moment
    FROM orchestrator.work w LEFT JOIN orchestrator.runs r ON r.id = w.run_id
    WHERE w.begun_by IS NULL AND w.target = ANY (%(targets)s)
)
SELECT (SELECT coalesce(array_agg(DISTINCT queue), '{}') FROM orchestrator.work),
    (SELECT coalesce(array_agg(concat_ws(' ', run_id, key, attempt, due_at) ORDER BY due_at, run_id, key), '{}')
     FROM waiting WHERE moment <= orchestrator.now()),
    least((SELECT min(moment) FROM waiting WHERE moment > orchestrator.now() AND state IS DISTINCT FROM 'parked'
           AND due_at < orchestrator.now() + %(far)s),
          (SELECT min(next_at) FROM orchestrator.gates g WHERE next_at > orchestrator.now() AND EXISTS (
              SELECT FROM orchestrator.work w WHERE w.gate = g.name AND w.due_at > orchestrator.now() + %(far)s)),
          (SELECT min(at) + interval '1.001 seconds' FROM orchestrator.arrivals
           WHERE at > orchestrator.now() - interval '1.001 seconds')) - orchestrator.now(),
    EXISTS (SELECT FROM orchestrator.arrivals) OR EXISTS (SELECT FROM orchestrator.work WHERE begun_by IS NOT NULL),
    EXISTS (SELECT FROM orchestrator.work WHERE due_at > orchestrator.now() + %(far)s),
    EXISTS (SELECT FROM orchestrator.runs WHERE finished_at IS NULL AND state <> 'parked')
"""


@dataclass(frozen=True, slots=True)
class Look:
    """Which queues have work, what of it is due, in how long the next is; and whether anything strays.

    What is due later of parked runs is not waited for.  Arrivals and begun attempts are `stray` while nobody is about
    them, work is `lined` up while it waits at a gate, `open` are runs that have not ended and are not parked.
    """

    queues: list[str]
    due: list[str]
    next: timedelta | None
    stray: bool
    lined: bool
    open: bool


def look(connection: Connection, targets: Collection[str], reservation: timedelta) -> Look:
    """Return what there is to do for who has these targets."""
    values = {"targets": list(targets), "reservation": reservation, "far": LINE / 2}
    row = connection.execute(_LOOK, values).fetchone()
    assert row is not None
    return Look(*row)


def runs(connection: Connection, states: Sequence[str] = ()) -> list[tuple[str, str, int]]:
    """Return the runs in one of these states (default: any) as (id, saga, version), in the order of their start."""
    return connection.execute(
        "SELECT id, saga, version FROM orchestrator.runs WHERE state = ANY (%(states)s) OR %(states)s = '{}' "
        "ORDER BY started_at, id",
        {"states": list(states)},
    ).fetchall()


def _told(connection: Connection, statement: str) -> Any:
    row = connection.execute(statement.encode()).fetchone()
    assert row is not None
    return row[0]


def _execute(url: str, statement: sql.Composed) -> None:
    with open_connection(_dsn(url), name="test") as connection:
        connection.execute(statement)


def _dsn(url: str) -> str:
    return Settings.from_environment({}, database_url=url).dsn
