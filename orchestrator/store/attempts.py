"""The statements about one attempt between its begin and its outcome: it lives, it is held, it is known.

Each is one statement on the caller's connection.  Must never decide anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from orchestrator.codec import Json, dumps
from orchestrator.failpoints import failpoint
from orchestrator.store.arrivals import owe_turn
from orchestrator.store.connection import CLOCK, Connection
from orchestrator.store.turns import Taken

# The time of the whole attempt is never put off: code that swallows its StepTimeout and beats on has to come to an end.
_HEARTBEAT = f"""
UPDATE orchestrator.work SET details = coalesce(%(details)s::json, details),
    expires_at = least(deadline_at + interval '5 s', {CLOCK} + make_interval(secs => (call ->> 'h')::float8))
WHERE run_id = %(run_id)s AND lane = %(lane)s AND fence = %(fence)s RETURNING stop
"""


def heartbeat(
    connection: Connection, run_id: str, lane: int, fence: int, details: Json, now: datetime | None = None
) -> bool | None:
    """Extend the attempt's life; returns whether it should stop, None if it has lost its fence."""
    encoded = None if details is None else dumps(details)
    values = {"run_id": run_id, "lane": lane, "fence": fence, "details": encoded, "now": now}
    failpoint("heartbeat.before", connection)
    row = connection.execute(_HEARTBEAT, values).fetchone()
    failpoint("heartbeat.after", connection)
    return None if row is None else bool(row[0])


# After a lost connection: what this child holds begun, which may be more than it was told (primary key, index
# work_begun).  Whoever is about to take some of it is waited for, the lost connection itself as well.
_HELD = f"""
SELECT run_id, lane, key, role, target, queue, task, attempt, call, fence, deadline_at, {CLOCK}
FROM orchestrator.work WHERE begun_by = %(incarnation)s AND child = %(child)s ORDER BY run_id, lane FOR UPDATE
"""


def held(connection: Connection, incarnation: int, child: int, now: datetime | None = None) -> list[Taken]:
    """Return what this child has begun according to the database."""
    rows = connection.execute(_HELD, {"incarnation": incarnation, "child": child, "now": now}).fetchall()
    return [Taken(*row) for row in rows]


# Primary key of work, in its order.  The row of a step that followed others in its lane was due when the first of them
# was: who has looked through all that was due since would pass it over.  What its run has given up meanwhile is
# withdrawn, as if it had not been begun by then.
_GIVE_BACK = """
WITH held AS MATERIALIZED (
    SELECT w.run_id, w.lane, w.stop FROM orchestrator.work w
    JOIN unnest(%(runs)s::text[], %(lanes)s::bigint[], %(fences)s::bigint[]) AS g (run_id, lane, fence)
        ON w.run_id = g.run_id AND w.lane = g.lane AND w.fence = g.fence
    ORDER BY w.run_id, w.lane FOR UPDATE OF w
), given AS (
    UPDATE orchestrator.work w SET attempt = w.attempt - 1, fence = NULL, reserved_at = NULL, incarnation = NULL,
        child = NULL, due_at = greatest(w.due_at, w.begun_at), begun_at = NULL, deadline_at = NULL, expires_at = NULL
    FROM held h WHERE w.run_id = h.run_id AND w.lane = h.lane AND NOT h.stop RETURNING w.queue
), gone AS (
    DELETE FROM orchestrator.work w USING held h WHERE w.run_id = h.run_id AND w.lane = h.lane AND h.stop
    RETURNING w.run_id, w.key
), withdrawn AS (
    INSERT INTO orchestrator.arrivals (run_id, arrival)
    SELECT run_id, json_build_object('e', 'withdrawn', 'key', key) FROM gone
)
SELECT queue, NULL FROM given UNION ALL SELECT NULL, run_id FROM gone
"""


def give_back(connection: Connection, items: Sequence[Taken], now: datetime | None = None) -> list[str]:
    """Give back attempts that were begun and whose code has not run, as if they had never been begun.

    Returns the queues to ring, one per attempt, or per run that gave up some of them; one that has lost its fence is
    passed over.
    """
    values = {
        "runs": [item.run_id for item in items], "lanes": [item.lane for item in items],
        "fences": [item.fence for item in items],
    }  # fmt: skip
    failpoint("give_back_attempts.before", connection)
    with connection.transaction():
        rows = connection.execute(_GIVE_BACK, values).fetchall()
        owing = sorted({run_id for _, run_id in rows if run_id})
        owed = [owe_turn(connection, run_id, now) for run_id in owing]
    failpoint("give_back_attempts.after", connection)
    return [queue for queue in (*(queue for queue, _ in rows), *owed) if queue]


_REFENCE = """
UPDATE orchestrator.work SET fence = %(new)s
WHERE run_id = %(run_id)s AND lane = %(lane)s AND fence = ANY(%(fences)s) RETURNING 1
"""


def refence(connection: Connection, run_id: str, lane: int, fences: Sequence[int], new: int) -> bool:
    """Change an attempt's fence, waiting for whoever holds its row: after True the old one can never commit.

    `fences` are all that it may have: a change that was not answered may have been made.
    """
    values = {"run_id": run_id, "lane": lane, "fences": list(fences), "new": new}
    failpoint("refence.before", connection)
    changed = connection.execute(_REFENCE, values).fetchone() is not None
    failpoint("refence.after", connection)
    return changed


# What a probe has answered settles its step, or clears it, and names no attempt.  A success that was refused is late.
_RECORDED = """
SELECT EXISTS (
    SELECT FROM orchestrator.journal j CROSS JOIN LATERAL json_array_elements(j.entries) AS e (entry)
    WHERE j.run_id = ANY(%(links)s) AND e.entry ->> 'key' = %(key)s AND (
        %(role)s = 'probe' AND (e.entry ->> 'by' = 'probe' OR e.entry ->> 'e' = 'cleared')
        OR (e.entry ->> 'attempt')::int = %(attempt)s AND e.entry ->> 'worker' = %(worker)s
        AND %(role)s = CASE e.entry ->> 'e' WHEN 'settled' THEN 'do' WHEN 'late' THEN 'do'
            WHEN 'undone' THEN 'undo' WHEN 'attempted' THEN coalesce(e.entry ->> 'role', 'do') END)
) OR EXISTS (
    SELECT FROM orchestrator.arrivals
    WHERE run_id = %(run_id)s AND arrival ->> 'key' = %(key)s AND (arrival ->> 'attempt')::int = %(attempt)s
      AND arrival ->> 'worker' = %(worker)s AND arrival ->> 'role' = %(role)s
)
"""


def recorded(
    connection: Connection, run_id: str, key: str, role: str, attempt: int, worker: str, link: int = 0
) -> bool:
    """Tell whether an outcome that `worker` reported is in the journal or the inbox of the run (primary keys).

    Its turn may have ended the link that the attempt was of, which took its journal along.
    """
    links = [run_id, f"{run_id}~{link + 1}"]
    values = {"run_id": run_id, "links": links, "key": key, "role": role, "attempt": attempt, "worker": worker}
    row = connection.execute(_RECORDED, values).fetchone()
    failpoint("recorded.after", connection)
    return bool(row and row[0])
