"""Who is alive, whose work is given back, what the pump finds.

Statements for rules 2 and 6.  A worker start is an incarnation; declared dead it stays dead.  All pages are bounded and
skip what others hold, so that any number of pumps can run.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from orchestrator.codec import dumps
from orchestrator.failpoints import failpoint
from orchestrator.store.arrivals import owe_turn
from orchestrator.store.connection import CLOCK, Connection
from orchestrator.store.gates import LINE
from orchestrator.store.pauses import ASIDE, Paused
from orchestrator.store.turns import ANYONE

_REGISTER = """
INSERT INTO orchestrator.incarnations (node, host, pid, queues, targets, slots)
VALUES (%(node)s, %(host)s, %(pid)s, %(queues)s, %(targets)s, %(slots)s) RETURNING id
"""


def register(
    connection: Connection, *, node: str, host: str, pid: int, queues: Sequence[str], targets: Sequence[str], slots: int
) -> int:
    """Record the start of a worker; returns its incarnation."""
    values = {"node": node, "host": host, "pid": pid, "queues": list(queues), "targets": list(targets), "slots": slots}
    failpoint("register.before", connection)
    row = connection.execute(_REGISTER, values).fetchone()
    failpoint("register.after", connection)
    assert row is not None
    return int(row[0])


_RENEW = f"""
UPDATE orchestrator.incarnations SET beats = beats + 1, seen_at = {CLOCK}
WHERE id = %(id)s AND dead_at IS NULL RETURNING beats
"""


def renew(connection: Connection, incarnation: int, now: datetime | None = None) -> bool:
    """Renew the lease; False if the incarnation was declared dead."""
    failpoint("renew.before", connection)
    renewed = connection.execute(_RENEW, {"id": incarnation, "now": now}).fetchone() is not None
    failpoint("renew.after", connection)
    return renewed


def alive(connection: Connection) -> list[tuple[int, int, str, str, int]]:
    """Return the living incarnations as (id, beats, node, host, pid) (index incarnations_alive)."""
    return connection.execute(
        "SELECT id, beats, node, host, pid FROM orchestrator.incarnations WHERE dead_at IS NULL ORDER BY id"
    ).fetchall()


_DECLARE_DEAD = f"""
UPDATE orchestrator.incarnations SET dead_at = {CLOCK}
WHERE id = %(id)s AND dead_at IS NULL AND (%(beats)s::bigint IS NULL OR beats = %(beats)s) RETURNING id
"""


def declare_dead(
    connection: Connection, incarnation: int, beats: int | None = None, now: datetime | None = None
) -> bool:
    """Declare an incarnation dead, for ever; with `beats`, only if it has not renewed since."""
    values = {"id": incarnation, "beats": beats, "now": now}
    failpoint("declare_dead.before", connection)
    declared = connection.execute(_DECLARE_DEAD, values).fetchone() is not None
    failpoint("declare_dead.after", connection)
    return declared


# A page of what dead incarnations hold (index work_begun).  Begun means in doubt: the row goes and an arrival comes.
# Whose process is gone the first time is tried again without a pause: most likely it was a deploy, not the step.
# `quiet` is empty when the process is known to be gone; otherwise an effect may land until the attempt's deadline.
_LOST = """
WITH lost AS (
    SELECT run_id, lane, key, role, attempt, fence, deadline_at, begun_at, expires_at,
        (call ->> 'n') IS NOT NULL AS harmless
    FROM orchestrator.work
    WHERE begun_by IS NOT NULL AND {which} LIMIT %(limit)s FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM orchestrator.work w USING lost
    WHERE w.run_id = lost.run_id AND w.lane = lost.lane AND w.fence = lost.fence
    RETURNING lost.*, w.details
)
INSERT INTO orchestrator.arrivals (run_id, arrival)
SELECT run_id, json_build_object(
    'e', 'outcome', 'key', key, 'role', CASE role WHEN 'once' THEN 'do' ELSE role END, 'attempt', attempt,
    'pause', CASE WHEN %(known_dead)s AND attempt = 1 THEN 0 END,
    'verdict', CASE WHEN harmless THEN 'failed' ELSE 'doubt' END, 'began', begun_at, 'details', details,
    'quiet', CASE WHEN %(known_dead)s OR harmless OR deadline_at IS NULL THEN '' ELSE to_char(
        deadline_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"') END,
    'error', CASE WHEN %(overdue)s::json IS NOT NULL AND expires_at < {CLOCK} THEN %(overdue)s ELSE %(error)s END::json)
FROM gone ORDER BY run_id, lane RETURNING run_id
"""
_OF_DEAD = "begun_by IN (SELECT id FROM orchestrator.incarnations WHERE id = %(incarnation)s AND dead_at IS NOT NULL)"
_OF_ANY_DEAD = """begun_by NOT IN (SELECT id FROM orchestrator.incarnations WHERE dead_at IS NULL)"""
_OF_CHILD = "begun_by = %(incarnation)s AND child = %(child)s AND fence <> ALL (%(keep)s::bigint[])"
# The worker's own companion comes first: it can end the process, and then nothing of the attempt can come late.
_EXPIRED = f"expires_at < {CLOCK} - interval '2 seconds'"

LOST: dict[str, Any] = {"type": "WorkerLost", "message": "the worker process that ran this attempt is gone"}
LEASE_LOST: dict[str, Any] = {
    "type": "LeaseLost",
    "message": "the worker that ran this attempt stopped renewing its lease",
}
EXPIRED: dict[str, Any] = {
    "type": "AttemptExpired",
    "message": "the attempt missed its heartbeat, or overran its start-to-close timeout",
}


# A child that hangs is ended by its companion, and a child that is ended looks like one that died.
OVERDUE: dict[str, Any] = EXPIRED | {"message": f"{EXPIRED['message']}; its process was ended"}


def _give_back(connection: Connection, which: str, values: dict[str, Any]) -> list[str]:
    """Turn lost attempts into arrivals and make their runs' turns due; returns the queues to ring, one per run."""
    failpoint("give_back.before", connection)
    with connection.transaction():
        failpoint("give_back.begun", connection)
        values = {"overdue": None, **values}
        rows = connection.execute(_LOST.format(which=which, CLOCK=CLOCK), values).fetchall()
        if rows:
            failpoint("give_back.arrived", connection)
        queues = [owe_turn(connection, run_id, values.get("now")) for run_id in sorted({row[0] for row in rows})]
        if queues:
            failpoint("give_back.owed", connection)
    if queues:
        failpoint("give_back.after", connection)
    return [queue for queue in queues if queue]


def give_back_dead(connection: Connection, limit: int = 500, now: datetime | None = None) -> list[str]:
    """Give back a page of what incarnations that are declared dead had begun."""
    values = {"limit": limit, "known_dead": False, "error": dumps(LEASE_LOST), "now": now}
    return _give_back(connection, _OF_ANY_DEAD, values)


def give_back_gone(
    connection: Connection, incarnation: int, limit: int = 500, now: datetime | None = None
) -> list[str]:
    """Give back a page of what one dead incarnation had begun, whose processes are known to be gone."""
    values = {"limit": limit, "known_dead": True, "error": dumps(LOST), "incarnation": incarnation, "now": now}
    return _give_back(connection, _OF_DEAD, values)


def give_back_child(
    connection: Connection, incarnation: int, child: int, keep: Sequence[int] = (), now: datetime | None = None
) -> list[str]:
    """Give back what one pool child had begun and will not end, but for the attempts with a fence in `keep`."""
    values = {
        "limit": 500,
        "known_dead": True,
        "error": dumps(LOST),
        "overdue": dumps(OVERDUE),
        "incarnation": incarnation,
        "child": child,
        "keep": list(keep),
        "now": now,
    }
    queues = _give_back(connection, _OF_CHILD, values)
    leave(connection, incarnation, child)
    return queues


def give_back_expired(connection: Connection, limit: int = 500, now: datetime | None = None) -> list[str]:
    """Give back a page of attempts that missed a heartbeat or overran their time, in whatever process they hang."""
    values = {"limit": limit, "known_dead": False, "error": dumps(EXPIRED), "now": now}
    return _give_back(connection, _EXPIRED, values)


_CHILDREN = """
SELECT child FROM orchestrator.work WHERE begun_by = %(incarnation)s
UNION SELECT child FROM orchestrator.drainers WHERE incarnation = %(incarnation)s
"""


def children(connection: Connection, incarnation: int) -> list[int]:
    """Return the children of an incarnation that hold work or drain (index work_begun, primary key of drainers)."""
    return [row[0] for row in connection.execute(_CHILDREN, {"incarnation": incarnation}).fetchall()]


_EXPIRED_CHILDREN = f"""
SELECT DISTINCT child FROM orchestrator.work
WHERE begun_by = %(incarnation)s AND expires_at < {CLOCK}
"""


def expired_children(connection: Connection, incarnation: int, now: datetime | None = None) -> list[int]:
    """Return the children of an incarnation that hang in an attempt (index work_begun)."""
    rows = connection.execute(_EXPIRED_CHILDREN, {"incarnation": incarnation, "now": now}).fetchall()
    return [row[0] for row in rows]


# Due rows that nobody has begun, per queue (index work_due, from its head); at most a page of each queue is counted.
_DUE = f"""
SELECT q.queue, (SELECT count(*) FROM (SELECT FROM generate_series(0, 9) AS level CROSS JOIN LATERAL (
        SELECT FROM orchestrator.work
        WHERE begun_by IS NULL AND queue = q.queue AND priority = level AND due_at <= {CLOCK}
          AND (reserved_at IS NULL OR reserved_at < {CLOCK} - %(reservation)s::interval)
        LIMIT %(limit)s) AS w LIMIT %(limit)s) AS page)
FROM (
    SELECT unnest(queues) AS queue FROM orchestrator.incarnations WHERE dead_at IS NULL
    EXCEPT SELECT name FROM orchestrator.pauses WHERE kind = 'queue'
) AS q
"""


def due(
    connection: Connection, reservation: timedelta, limit: int = 100, now: datetime | None = None
) -> dict[str, int]:
    """Return how many rows are due and not begun, counted up to `limit`, for every queue that a living worker serves.

    Queues that are paused are left out.
    """
    rows = connection.execute(_DUE, {"reservation": reservation, "limit": limit, "now": now}).fetchall()
    return {queue: count for queue, count in rows if count}


# When the next row of a served queue falls due (index work_due, one probe per level of priority).
_NEXT_DUE = f"""
SELECT extract(epoch FROM min(w.due_at) - {CLOCK})::float8
FROM (SELECT DISTINCT unnest(queues) AS queue FROM orchestrator.incarnations WHERE dead_at IS NULL) AS q
CROSS JOIN generate_series(0, 9) AS level
CROSS JOIN LATERAL (
    SELECT due_at FROM orchestrator.work
    WHERE begun_by IS NULL AND queue = q.queue AND priority = level AND due_at > {CLOCK} ORDER BY due_at LIMIT 1
) AS w
"""


def next_due(connection: Connection, now: datetime | None = None) -> float | None:
    """Return in how many seconds the next row of a served queue falls due; None if nothing waits."""
    row = connection.execute(_NEXT_DUE, {"now": now}).fetchone()
    return None if row is None or row[0] is None else float(row[0])


# A slot of this worker that does not drain, and work for it that has been due for long (index work_due, one probe per
# queue and level of priority).
_NEGLECTS = f"""
SELECT EXISTS (
    SELECT FROM (
        SELECT unnest(%(queues)s::text[]) AS queue EXCEPT SELECT name FROM orchestrator.pauses WHERE kind = 'queue'
    ) AS q CROSS JOIN generate_series(0, 9) AS level CROSS JOIN LATERAL (
        SELECT FROM orchestrator.work w
        WHERE w.begun_by IS NULL AND w.queue = q.queue AND w.priority = level
          AND w.due_at < {CLOCK} - %(patience)s::interval AND w.target = ANY (%(targets)s)
          AND (w.reserved_at IS NULL OR w.reserved_at < {CLOCK} - %(patience)s::interval)
        LIMIT 1
    ) AS neglected
) AND EXISTS (
    SELECT FROM orchestrator.incarnations i WHERE i.id = %(incarnation)s AND i.dead_at IS NULL
      AND i.slots > (SELECT count(*) FROM orchestrator.drainers d WHERE d.incarnation = i.id)
)
"""


def neglects(
    connection: Connection,
    incarnation: int,
    queues: Sequence[str],
    targets: Sequence[str],
    patience: timedelta,
    now: datetime | None = None,
) -> bool:
    """Tell whether a worker has a slot that does not drain while work that it could do has been due for `patience`."""
    takes = [*targets, ANYONE]
    values = {"incarnation": incarnation, "queues": list(queues), "targets": takes, "patience": patience}
    row = connection.execute(_NEGLECTS, {**values, "now": now}).fetchone()
    return bool(row and row[0])


# Arrivals older than a moment whose run has no turn due (a timer's row may be there, due much later): both their author
# and the turn before them missed them.  Those of runs that are gone, or put aside, must not fill the page.
_FORGOTTEN = f"""
SELECT DISTINCT run_id FROM (
    SELECT run_id FROM orchestrator.arrivals a
    WHERE at < {CLOCK} - interval '1 second'
      AND NOT EXISTS (SELECT FROM orchestrator.work w WHERE w.run_id = a.run_id AND w.lane = 0 AND w.due_at <= {CLOCK})
      AND EXISTS (SELECT FROM orchestrator.runs r WHERE r.id = a.run_id AND NOT {ASIDE})
    ORDER BY id LIMIT %(limit)s
) AS page ORDER BY run_id
"""


def wake_forgotten(connection: Connection, limit: int = 500, now: datetime | None = None) -> list[str]:
    """Make the turns of runs with unread arrivals due; returns the queues to ring."""
    rows = connection.execute(_FORGOTTEN, {"limit": limit, "line": LINE, "now": now}).fetchall()
    if rows:
        failpoint("wake_forgotten.before", connection)
    queues = [owe_turn(connection, run_id, now) for (run_id,) in rows]
    if rows:
        failpoint("wake_forgotten.after", connection)
    return [queue for queue in queues if queue]


_ENTER = """
INSERT INTO orchestrator.drainers (incarnation, child, queues)
SELECT id, %(child)s, %(queues)s FROM orchestrator.incarnations WHERE id = %(incarnation)s AND dead_at IS NULL
ON CONFLICT (incarnation, child) DO UPDATE SET queues = EXCLUDED.queues, looking = false
RETURNING ARRAY(SELECT name FROM orchestrator.pauses WHERE kind = 'queue'),
    ARRAY(SELECT name FROM orchestrator.pauses WHERE kind = 'saga' AND NOT lifted)
"""


def enter(connection: Connection, incarnation: int, child: int, queues: Sequence[str]) -> Paused | None:
    """Mark that a child drains these queues; returns what is paused, None if its incarnation was declared dead."""
    values = {"incarnation": incarnation, "child": child, "queues": list(queues)}
    failpoint("enter.before", connection)
    row = connection.execute(_ENTER, values).fetchone()
    failpoint("enter.after", connection)
    return Paused(*map(frozenset, row)) if row else None


# Which statements hold it, shared, until they are committed: take_3 and its like in 0009_lanes.sql.
_OUTLAST = "SELECT pg_advisory_xact_lock(hashint8extended(%(incarnation)s, %(child)s))"


def outlast(connection: Connection, incarnation: int, child: int) -> None:
    """Wait until nothing more can be begun for a child over a connection that it has lost.

    A commit may take longer than a child waits for its answer: where a synchronous standby is away, or a disk stands
    still.  What is begun by it after that, nobody would know of.
    """
    connection.execute(_OUTLAST, {"incarnation": incarnation, "child": child})


def leave(connection: Connection, incarnation: int, child: int) -> None:
    """Take the mark back, after the starts that have counted on it; the function leave_2 of 0007_lean_statements.sql.

    What such a start has added is committed when this returns: who looks once more finds it.
    """
    failpoint("leave.before", connection)
    connection.execute("SELECT orchestrator.leave_2(%s, %s)", (incarnation, child))
    failpoint("leave.after", connection)


def sweep(connection: Connection, keep: timedelta = timedelta(hours=1), now: datetime | None = None) -> None:
    """Delete marks of dead incarnations, and dead incarnations that hold nothing any more."""
    failpoint("sweep.before", connection)
    connection.execute(
        """DELETE FROM orchestrator.drainers d
           WHERE NOT EXISTS (
               SELECT FROM orchestrator.incarnations i WHERE i.id = d.incarnation AND i.dead_at IS NULL)"""
    )
    failpoint("sweep.marks", connection)
    connection.execute(
        f"""DELETE FROM orchestrator.incarnations i WHERE dead_at < {CLOCK} - %(keep)s::interval
            AND NOT EXISTS (SELECT FROM orchestrator.work w WHERE w.begun_by = i.id)""",
        {"keep": keep, "now": now},
    )
    failpoint("sweep.after", connection)
