"""The statements of the hot path: take work, commit a turn, leave an arrival.

Each runs in the caller's connection and is one statement: with autocommit it is one transaction and one round trip.
Lock order everywhere: the run's row, then work rows, then the rest.  Must never decide anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from orchestrator.codec import Json, dumps
from orchestrator.store.connection import Connection

CLOCK = "coalesce(%(now)s::timestamptz, orchestrator.now())"

# Index work_due, once per queue and priority, so that what sleeps is never looked at.  Rows that somebody else holds are
# skipped (SKIP LOCKED).  A turn is only reserved; any other work is begun: its attempt is counted and its fence set.
# Only the first row may be begun, since a row that is begun and not run would burn an attempt if the process died.
_TAKE = f"""
WITH found AS (
    SELECT w.run_id, w.key, w.role, row_number() OVER () AS n
    FROM generate_series(9, 0, -1) AS level
    CROSS JOIN LATERAL unnest(%(queues)s::text[]) AS served (queue)
    CROSS JOIN LATERAL (
        SELECT run_id, key, role FROM orchestrator.work
        WHERE fence IS NULL AND queue = served.queue AND priority = level AND due_at <= {CLOCK}
          AND (reserved_at IS NULL OR reserved_at < {CLOCK} - %(reservation)s::interval)
          AND target = ANY(%(targets)s)
        ORDER BY due_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
    ) AS w
    LIMIT %(limit)s
), picked AS (
    SELECT * FROM found WHERE n = 1 OR (role = 'turn' AND NOT EXISTS (SELECT FROM found WHERE n = 1 AND role <> 'turn'))
), taken AS (
    UPDATE orchestrator.work w SET
        reserved_at = {CLOCK}, incarnation = %(incarnation)s, child = %(child)s,
        fence = CASE WHEN w.role <> 'turn' THEN %(fence)s::bigint END,
        attempt = w.attempt + (w.role <> 'turn')::int,
        begun_at = CASE WHEN w.role <> 'turn' THEN {CLOCK} END,
        deadline_at = {CLOCK} + make_interval(secs => (w.call ->> 't')::float8),
        expires_at = {CLOCK} + make_interval(secs => least((w.call ->> 't')::float8 + 5, (w.call ->> 'h')::float8))
    FROM picked WHERE w.run_id = picked.run_id AND w.key = picked.key
    RETURNING w.*
)
SELECT t.run_id, t.key, t.role, t.target, t.queue, t.task, t.attempt, t.call, t.fence, t.deadline_at, {CLOCK},
       r.saga, r.version, r.queue, r.input, r.started_at, r.deadline_at, r.priority, r.position,
       r.finished_at IS NOT NULL
FROM taken t LEFT JOIN orchestrator.runs r ON t.role = 'turn' AND r.id = t.run_id
"""


@dataclass(slots=True)
class Taken:
    """A row of work that this process holds: reserved if it is a turn, begun otherwise."""

    run_id: str
    key: str
    role: str
    target: str
    queue: str
    task: str
    attempt: int
    call: Json
    fence: int | None
    deadline: datetime | None
    now: datetime
    run: RunRow | None = None


@dataclass(slots=True)
class RunRow:
    """The part of a run's row that never changes, and its position."""

    id: str
    saga: str
    version: int
    queue: str
    input: Json
    started_at: datetime
    deadline_at: datetime | None
    priority: int
    position: int
    finished: bool


def take(
    connection: Connection,
    *,
    queues: Sequence[str],
    targets: Sequence[str],
    incarnation: int,
    child: int,
    fence: int,
    limit: int,
    reservation: timedelta,
    now: datetime | None = None,
) -> list[Taken]:
    """Hold up to `limit` due turns, or begin one step; highest priority first, then the longest due."""
    rows = connection.execute(
        _TAKE,
        {
            "queues": list(queues), "targets": list(targets), "incarnation": incarnation, "child": child, "fence": fence,
            "limit": limit, "reservation": reservation, "now": now,
        },
    ).fetchall()  # fmt: skip
    return [_taken(row) for row in rows]


def _taken(row: tuple[Any, ...]) -> Taken:
    taken = Taken(*row[:11])
    if row[11] is not None:
        taken.run = RunRow(taken.run_id, *row[11:])
    return taken


@dataclass(slots=True)
class Loaded:
    """A run as it was read: journal rows from position `since` on as (instant, entries), arrivals as (id, arrival)."""

    run: RunRow
    now: datetime
    rows: list[tuple[datetime, Json]]
    arrivals: list[tuple[int, Json]]
    since: int = 0


# Primary keys of runs and journal, index arrivals_by_run; takes no lock.
_LOAD_ROWS = """
SELECT at, entries FROM orchestrator.journal WHERE run_id = %(run_id)s AND seq >= %(position)s ORDER BY seq
"""
_LOAD_ARRIVALS = "SELECT id, arrival FROM orchestrator.arrivals WHERE run_id = %(run_id)s ORDER BY id"
_LOAD_RUN = f"""
SELECT id, saga, version, queue, input, started_at, deadline_at, priority, position, finished_at IS NOT NULL, {CLOCK}
FROM orchestrator.runs WHERE id = %(run_id)s
"""


def load(connection: Connection, run_id: str, position: int = 0, now: datetime | None = None) -> Loaded | None:
    """Read a run from journal position `position` on; None if there is no such run.

    Three statements in one round trip.  They may see different snapshots; a commit between them only makes the position
    check of `commit_turn` fail, or leaves an arrival for later.
    """
    values = {"run_id": run_id, "position": position, "now": now}
    with connection.pipeline():
        arrivals = connection.execute(_LOAD_ARRIVALS, values)
        run = connection.execute(_LOAD_RUN, values)
        rows = connection.execute(_LOAD_ROWS, values)
        found = run.fetchone()
        if found is None:
            return None
        return Loaded(RunRow(*found[:10]), found[10], rows.fetchall(), arrivals.fetchall(), position)


@dataclass(slots=True, kw_only=True)
class Commit:
    """A turn as it is written.

    `done_key` and `done_fence` name the attempt whose outcome this turn records, if it records one.  `holds_turn` says
    that the run's turn row is reserved by this child; `wake` is when the run wants its next turn by itself, and is
    written only if `rewake` or `holds_turn`.  `work` rows with a fence are begun by this child.
    """

    run_id: str
    position: int
    at: datetime
    entries: list[Json]
    incarnation: int
    child: int
    state: str
    target: str
    queue: str
    priority: int = 0
    ended: bool = False
    done_key: str | None = None
    done_fence: int | None = None
    holds_turn: bool = False
    wake: datetime | None = None
    rewake: bool = False
    work: list[Json] | None = None
    withdraw: Sequence[str] = ()
    consumed: Sequence[int] = ()
    summary: dict[str, Any] | None = None


@dataclass(slots=True)
class Committed:
    """What became of a `Commit`: whether it was written, whether the run has arrivals, the database's time."""

    written: bool
    owed: bool
    now: datetime


# Locks the run's row without waiting (SKIP LOCKED) if its position is the expected one, then deletes the attempt's row if
# its fence is the expected one; everything else happens only if both did.  The order of the rest follows from its
# dependencies on `ok`: work (primary key), journal (append), arrivals (primary key).
_COMMIT = f"""
WITH run AS (
    SELECT id FROM orchestrator.runs
    WHERE id = %(run_id)s AND position = %(position)s FOR UPDATE SKIP LOCKED
), done AS (
    DELETE FROM orchestrator.work
    WHERE run_id = %(run_id)s AND key = %(done_key)s AND fence = %(done_fence)s AND EXISTS (SELECT FROM run)
    RETURNING 1
), ok AS (
    SELECT FROM run WHERE %(done_key)s::text IS NULL OR EXISTS (SELECT FROM done)
), moved AS (
    UPDATE orchestrator.runs SET position = position + 1, state = %(state)s
    WHERE id = %(run_id)s AND NOT %(summarize)s AND EXISTS (SELECT FROM ok)
), summed AS (
    UPDATE orchestrator.runs SET position = position + 1, state = %(state)s, output = %(output)s::jsonb,
        error = %(error)s::jsonb, left_effects = %(left)s::jsonb, parked = %(parked)s::jsonb,
        past_pivot = %(past_pivot)s, finished_at = CASE WHEN %(ended)s THEN {CLOCK} END
    WHERE id = %(run_id)s AND %(summarize)s AND EXISTS (SELECT FROM ok)
), wrote AS (
    INSERT INTO orchestrator.journal (run_id, seq, at, entries)
    SELECT %(run_id)s, %(position)s, %(at)s, %(entries)s::json WHERE EXISTS (SELECT FROM ok)
), gone AS (
    DELETE FROM orchestrator.work
    WHERE run_id = %(run_id)s AND key = ANY(%(withdraw)s::text[]) AND fence IS NULL AND EXISTS (SELECT FROM ok)
    RETURNING key
), withdrawn AS (
    INSERT INTO orchestrator.arrivals (run_id, arrival)
    SELECT %(run_id)s, json_build_object('e', 'withdrawn', 'key', key) FROM gone
), told AS (
    UPDATE orchestrator.work SET stop = true
    WHERE run_id = %(run_id)s AND key = ANY(%(withdraw)s::text[]) AND key NOT IN (SELECT key FROM gone)
      AND EXISTS (SELECT FROM ok)
), slept AS (
    DELETE FROM orchestrator.work
    WHERE run_id = %(run_id)s AND key = '' AND incarnation = %(incarnation)s AND child = %(child)s
      AND reserved_at IS NOT NULL AND %(holds)s AND %(wake)s::timestamptz IS NULL AND EXISTS (SELECT FROM ok)
), woken AS (
    INSERT INTO orchestrator.work AS w (run_id, key, role, target, queue, priority, due_at)
    SELECT %(run_id)s, '', 'turn', %(target)s, %(queue)s, %(priority)s, %(wake)s
    WHERE %(wake)s::timestamptz IS NOT NULL AND %(rewake)s AND EXISTS (SELECT FROM ok)
    ON CONFLICT (run_id, key) DO UPDATE SET
        due_at = CASE WHEN %(holds)s AND w.reserved_at IS NOT NULL AND w.incarnation = %(incarnation)s
                      AND w.child = %(child)s THEN EXCLUDED.due_at ELSE least(w.due_at, EXCLUDED.due_at) END,
        reserved_at = NULL, incarnation = NULL, child = NULL
), cleared AS (
    DELETE FROM orchestrator.work
    WHERE run_id = %(run_id)s AND %(ended)s AND key IS DISTINCT FROM %(done_key)s::text
      AND (key <> '' OR NOT %(holds)s) AND EXISTS (SELECT FROM ok)
), added AS (
    INSERT INTO orchestrator.work (run_id, key, role, target, queue, task, priority, due_at, attempt, call, fence,
        reserved_at, incarnation, child, begun_at, deadline_at, expires_at)
    SELECT %(run_id)s, w.key, w.role, w.target, w.queue, w.task, w.priority, coalesce(w.due, {CLOCK}), w.attempt, w.call,
        w.fence, b.at, b.incarnation, b.child, b.at,
        b.at + make_interval(secs => (w.call ->> 't')::float8),
        b.at + make_interval(secs => least((w.call ->> 't')::float8 + 5, (w.call ->> 'h')::float8))
    FROM json_to_recordset(%(work)s::json) AS w (key text, role text, target text, queue text, task text,
        priority smallint, due timestamptz, attempt int, call json, fence bigint)
    LEFT JOIN (SELECT {CLOCK} AS at, %(incarnation)s::bigint AS incarnation, %(child)s::int AS child) AS b
        ON w.fence IS NOT NULL
    WHERE EXISTS (SELECT FROM ok)
), consumed AS (
    DELETE FROM orchestrator.arrivals WHERE id = ANY(%(consumed)s::bigint[]) AND EXISTS (SELECT FROM ok)
)
SELECT EXISTS (SELECT FROM ok),
    EXISTS (SELECT FROM gone) OR EXISTS (SELECT FROM orchestrator.arrivals
        WHERE run_id = %(run_id)s AND NOT id = ANY(%(consumed)s::bigint[])),
    {CLOCK}
"""


def commit_turn(connection: Connection, commit: Commit, now: datetime | None = None) -> Committed:
    """Write a turn if the run is still at its position and the attempt still has its fence; else write nothing.

    Does not commit by itself: with autocommit the statement is the transaction.
    """
    summary = commit.summary
    values = {
        "run_id": commit.run_id, "position": commit.position, "at": commit.at, "entries": dumps(commit.entries),
        "incarnation": commit.incarnation, "child": commit.child, "state": commit.state, "target": commit.target,
        "queue": commit.queue, "priority": commit.priority, "ended": commit.ended, "done_key": commit.done_key,
        "done_fence": commit.done_fence, "holds": commit.holds_turn, "wake": commit.wake,
        "rewake": commit.rewake or commit.holds_turn, "work": dumps(commit.work or []),
        "withdraw": list(commit.withdraw), "consumed": list(commit.consumed), "now": now,
        "summarize": summary is not None, "output": None, "error": None, "left": "[]", "parked": "[]", "past_pivot": False,
    }  # fmt: skip
    if summary is not None:
        values.update(summary)
    row = connection.execute(_COMMIT, values).fetchone()
    assert row is not None
    return Committed(*row)


# Deletes the attempt's row (primary key) if its fence is the expected one, and only then leaves the arrival.
_ARRIVE = """
WITH done AS (
    DELETE FROM orchestrator.work
    WHERE run_id = %(run_id)s AND key = %(key)s AND fence = %(fence)s RETURNING 1
)
INSERT INTO orchestrator.arrivals (run_id, arrival) SELECT %(run_id)s, %(arrival)s::json FROM done RETURNING id
"""


def arrive(connection: Connection, run_id: str, key: str, fence: int, arrival: Json) -> bool:
    """Leave the outcome of an attempt as an arrival; False if the fence is not its own any more."""
    values = {"run_id": run_id, "key": key, "fence": fence, "arrival": dumps(arrival)}
    return connection.execute(_ARRIVE, values).fetchone() is not None


# One row of work per run says that it owes a turn; a reservation of it is lifted, so that its holder cannot delete it.
_OWE_TURN = f"""
INSERT INTO orchestrator.work AS w (run_id, key, role, target, queue, priority, due_at)
SELECT id, '', 'turn', saga || '@' || version, queue, priority, {CLOCK} FROM orchestrator.runs WHERE id = %(run_id)s
ON CONFLICT (run_id, key) DO UPDATE SET
    due_at = least(w.due_at, EXCLUDED.due_at), reserved_at = NULL, incarnation = NULL, child = NULL
RETURNING queue
"""


def owe_turn(connection: Connection, run_id: str, now: datetime | None = None) -> str | None:
    """Make the run's turn due; returns the queue to ring, None if there is no such run."""
    row = connection.execute(_OWE_TURN, {"run_id": run_id, "now": now}).fetchone()
    return row[0] if row else None


_LEAVE = "INSERT INTO orchestrator.arrivals (run_id, arrival) VALUES (%(run_id)s, %(arrival)s::json)"


def leave_arrival(connection: Connection, run_id: str, arrival: Json, now: datetime | None = None) -> str | None:
    """Leave an arrival that needs no fence and make the run's turn due; returns the queue to ring.

    Two statements; the caller opens the transaction that holds them together.
    """
    connection.execute(_LEAVE, {"run_id": run_id, "arrival": dumps(arrival)})
    return owe_turn(connection, run_id, now)


_HAS_ARRIVALS = "SELECT EXISTS (SELECT FROM orchestrator.arrivals WHERE run_id = %(run_id)s)"


def has_arrivals(connection: Connection, run_id: str) -> bool:
    """Tell whether somebody left something for the run (index arrivals_by_run)."""
    row = connection.execute(_HAS_ARRIVALS, {"run_id": run_id}).fetchone()
    return bool(row and row[0])


_HEARTBEAT = f"""
UPDATE orchestrator.work SET details = coalesce(%(details)s::json, details),
    expires_at = {CLOCK} + make_interval(secs => least((call ->> 't')::float8 + 5, (call ->> 'h')::float8))
WHERE run_id = %(run_id)s AND key = %(key)s AND fence = %(fence)s RETURNING stop
"""


def heartbeat(
    connection: Connection, run_id: str, key: str, fence: int, details: Json, now: datetime | None = None
) -> bool | None:
    """Extend the attempt's life; returns whether it should stop, None if it has lost its fence."""
    encoded = None if details is None else dumps(details)
    values = {"run_id": run_id, "key": key, "fence": fence, "details": encoded, "now": now}
    row = connection.execute(_HEARTBEAT, values).fetchone()
    return None if row is None else bool(row[0])


_DROP_TURN = "DELETE FROM orchestrator.work WHERE run_id = %(run_id)s AND key = '' AND role = 'turn'"


def drop_turn(connection: Connection, run_id: str) -> None:
    """Delete the turn row of a run that has ended."""
    connection.execute(_DROP_TURN, {"run_id": run_id})


_SEED = """
WITH moved AS (
    UPDATE orchestrator.runs SET position = 1, state = 'compensating' WHERE id = %(run_id)s AND position = 0 RETURNING id
)
INSERT INTO orchestrator.journal (run_id, seq, at, entries) SELECT id, 0, %(at)s, %(entries)s::json FROM moved
"""


def seed_journal(connection: Connection, run_id: str, at: datetime, entries: list[Json]) -> None:
    """Give a new run the journal row that it begins with."""
    connection.execute(_SEED, {"run_id": run_id, "at": at, "entries": dumps(entries)})


# After a lost connection: what this child holds begun, which may be more than it was told (primary key, index work_begun).
_HELD = f"""
SELECT run_id, key, role, target, queue, task, attempt, call, fence, deadline_at, {CLOCK}
FROM orchestrator.work WHERE fence IS NOT NULL AND incarnation = %(incarnation)s AND child = %(child)s
"""


def held(connection: Connection, incarnation: int, child: int, now: datetime | None = None) -> list[Taken]:
    """Return what this child has begun according to the database."""
    rows = connection.execute(_HELD, {"incarnation": incarnation, "child": child, "now": now}).fetchall()
    return [Taken(*row) for row in rows]


_REFENCE = """
UPDATE orchestrator.work SET fence = %(new)s WHERE run_id = %(run_id)s AND key = %(key)s AND fence = %(fence)s RETURNING 1
"""


def refence(connection: Connection, run_id: str, key: str, fence: int, new: int) -> bool:
    """Change an attempt's fence, waiting for whoever holds its row: after True the old fence can never commit."""
    values = {"run_id": run_id, "key": key, "fence": fence, "new": new}
    return connection.execute(_REFENCE, values).fetchone() is not None


_RECORDED = """
SELECT EXISTS (
    SELECT FROM orchestrator.journal j CROSS JOIN LATERAL json_array_elements(j.entries) AS e (entry)
    WHERE j.run_id = %(run_id)s AND e.entry ->> 'key' = %(key)s AND (e.entry ->> 'attempt')::int = %(attempt)s
      AND e.entry ->> 'e' IN ('settled', 'attempted', 'undone') AND e.entry ->> 'worker' = %(worker)s
) OR EXISTS (
    SELECT FROM orchestrator.arrivals
    WHERE run_id = %(run_id)s AND arrival ->> 'key' = %(key)s AND (arrival ->> 'attempt')::int = %(attempt)s
      AND arrival ->> 'worker' = %(worker)s
)
"""


def recorded(connection: Connection, run_id: str, key: str, attempt: int, worker: str) -> bool:
    """Tell whether an outcome that `worker` reported is in the journal or the inbox of the run (primary keys)."""
    values = {"run_id": run_id, "key": key, "attempt": attempt, "worker": worker}
    row = connection.execute(_RECORDED, values).fetchone()
    return bool(row and row[0])


_GIVE_BACK_TURNS = """
UPDATE orchestrator.work SET reserved_at = NULL, incarnation = NULL, child = NULL
WHERE fence IS NULL AND (run_id, key) IN (SELECT unnest(%(runs)s::text[]), '')
  AND incarnation = %(incarnation)s AND child = %(child)s
"""


def give_back(connection: Connection, run_ids: Sequence[str], incarnation: int, child: int) -> None:
    """Give back turns that this child reserved and will not get to."""
    connection.execute(_GIVE_BACK_TURNS, {"runs": list(run_ids), "incarnation": incarnation, "child": child})
