"""What the doctor asks of Postgres: its settings, what is due and who is there for it, what has grown old.

Reads only, in bounded pages.  Must never judge: that is the engine's side of the doctor.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from orchestrator.store.connection import CLOCK, Connection
from orchestrator.store.gates import LINE
from orchestrator.store.pauses import ASIDE

_SAMPLE = 100_000  # rows of work that are looked at


@dataclass(frozen=True, slots=True)
class Server:
    """Postgres itself; `clock` is its wall clock, in autocommit mode that of the statement."""

    version: str
    clock: datetime
    in_recovery: bool
    settings: dict[str, str]
    connections: int
    max_connections: int


_SETTINGS = ["fsync", "full_page_writes", "synchronous_commit", "autovacuum", "track_counts", "max_connections"]


def server(connection: Connection) -> Server:
    """Return what is to be known of the server."""
    settings = dict(
        connection.execute("SELECT name, setting FROM pg_settings WHERE name = ANY (%s)", (_SETTINGS,)).fetchall()
    )
    row = connection.execute(
        "SELECT current_setting('server_version'), clock_timestamp(), pg_is_in_recovery(), "
        "(SELECT coalesce(sum(numbackends), 0)::integer FROM pg_stat_database)"
    ).fetchone()
    assert row is not None
    return Server(row[0], row[1], row[2], settings, row[3], int(settings["max_connections"]))


@dataclass(frozen=True, slots=True)
class Waiting:
    """Due work that nobody has begun, of one queue and target; whether a living worker takes either."""

    queue: str
    target: str
    rows: int
    oldest: timedelta
    queue_served: bool
    target_served: bool


# Index work_due; a bounded page of it.
_WAITING = f"""
SELECT w.queue, w.target, count(*)::integer, max({CLOCK} - w.due_at),
    EXISTS (SELECT FROM orchestrator.incarnations i WHERE i.dead_at IS NULL AND w.queue = ANY (i.queues)),
    EXISTS (SELECT FROM orchestrator.incarnations i WHERE i.dead_at IS NULL AND w.queue = ANY (i.queues)
            AND (w.target = '*' OR w.target = ANY (i.targets)))
FROM (SELECT queue, target, due_at FROM orchestrator.work
      WHERE begun_by IS NULL AND due_at <= {CLOCK}
        AND NOT queue = ANY (ARRAY(SELECT name FROM orchestrator.pauses WHERE kind = 'queue')) LIMIT {_SAMPLE}) AS w
GROUP BY w.queue, w.target ORDER BY w.queue, w.target
"""


def waiting(connection: Connection, now: datetime | None = None) -> list[Waiting]:
    """Return due work that nobody has begun, by queue and target; on queues that are paused it is not looked at."""
    return [Waiting(*row) for row in connection.execute(_WAITING, {"now": now}).fetchall()]


@dataclass(frozen=True, slots=True)
class Living:
    """A worker that nobody has declared dead, and how long it has not been seen."""

    node: str
    queues: list[str]
    slots: int
    unseen: timedelta


_LIVING = f"""
SELECT node, queues, slots, {CLOCK} - seen_at FROM orchestrator.incarnations WHERE dead_at IS NULL ORDER BY node, id
"""


def living(connection: Connection, now: datetime | None = None) -> list[Living]:
    """Return the workers that are taken to live (index incarnations_alive)."""
    return [Living(*row) for row in connection.execute(_LIVING, {"now": now}).fetchall()]


@dataclass(frozen=True, slots=True)
class Stuck:
    """How much stands still that recovery should have moved, and what needs a person."""

    expired: int
    unread: int
    parked: int
    parked_since: timedelta | None
    paused: int
    unsent: int


# Indexes work_begun, arrivals (primary key, its head) and slots_open; runs by their start, newest first.
_STUCK = f"""
SELECT
    (SELECT count(*) FROM (SELECT FROM orchestrator.work WHERE begun_by IS NOT NULL
        AND expires_at < {CLOCK} - interval '30 s' LIMIT {_SAMPLE}) AS e)::integer,
    (SELECT count(*) FROM (SELECT FROM orchestrator.arrivals a JOIN orchestrator.runs r ON r.id = a.run_id
        WHERE a.at < {CLOCK} - interval '60 s' AND r.finished_at IS NULL AND NOT {ASIDE}
        LIMIT {_SAMPLE}) AS a)::integer,
    p.parked, p.since, p.paused,
    (SELECT count(*) FROM orchestrator.slots WHERE state = 'sending' AND at < {CLOCK} - interval '60 s')::integer
FROM (SELECT count(*) FILTER (WHERE state = 'parked')::integer AS parked,
             max({CLOCK} - started_at) FILTER (WHERE state = 'parked') AS since,
             count(*) FILTER (WHERE state = 'paused')::integer AS paused
      FROM orchestrator.runs WHERE state IN ('parked', 'paused')) AS p
"""


def stuck(connection: Connection, now: datetime | None = None) -> Stuck:
    """Return what stands still; reads all of runs, which only the doctor does."""
    row = connection.execute(_STUCK, {"line": LINE, "now": now}).fetchone()
    assert row is not None
    return Stuck(*row)


@dataclass(frozen=True, slots=True)
class Old:
    """The oldest open transaction of this database, as far as this role may see it."""

    age: timedelta
    pid: int
    application: str
    state: str


_OLDEST = """
SELECT clock_timestamp() - xact_start, pid, coalesce(application_name, ''), coalesce(state, '')
FROM pg_stat_activity WHERE datname = current_database() AND xact_start IS NOT NULL AND pid <> pg_backend_pid()
ORDER BY xact_start LIMIT 1
"""


def oldest_transaction(connection: Connection) -> Old | None:
    """Return the oldest open transaction besides this one."""
    row = connection.execute(_OLDEST).fetchone()
    return Old(*row) if row else None


@dataclass(frozen=True, slots=True)
class Size:
    """A table of the schema: rows, dead rows, bytes with its indexes."""

    table: str
    live: int
    dead: int
    bytes: int


_SIZES = """
SELECT relname, n_live_tup, n_dead_tup, pg_total_relation_size(relid)
FROM pg_stat_user_tables WHERE schemaname = 'orchestrator' ORDER BY relname
"""


def sizes(connection: Connection) -> list[Size]:
    """Return how large the tables are, by the server's own statistics."""
    return [Size(*row) for row in connection.execute(_SIZES).fetchall()]
