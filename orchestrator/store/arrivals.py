"""What is left for a run until its next turn takes it in, and that it owes this turn.

An arrival is an outcome that came beside the turns, or a wish of somebody outside (a cancel, a signal, an operator's
order).  Lock order: the run's row of work, then arrivals.  Must never decide anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from orchestrator.codec import Json, dumps
from orchestrator.failpoints import failpoint
from orchestrator.store.connection import CLOCK, Connection
from orchestrator.store.turns import ANYONE

# Deletes the attempts' rows whose fence is the expected one (primary key of work, in its order),
# and only then leaves the arrivals.
_ARRIVE = """
WITH given AS MATERIALIZED (
    SELECT * FROM unnest(%(lanes)s::bigint[], %(fences)s::bigint[], %(arrivals)s::text[]) WITH ORDINALITY
        AS g (lane, fence, arrival, n)
), held AS MATERIALIZED (
    SELECT w.lane FROM orchestrator.work w JOIN given g ON w.lane = g.lane AND w.fence = g.fence
    WHERE w.run_id = %(run_id)s ORDER BY w.lane FOR UPDATE OF w
), done AS (
    DELETE FROM orchestrator.work w USING held h WHERE w.run_id = %(run_id)s AND w.lane = h.lane RETURNING w.lane
), arrived AS (
    INSERT INTO orchestrator.arrivals (run_id, arrival)
    SELECT %(run_id)s, g.arrival::json FROM given g JOIN done USING (lane) ORDER BY g.n
)
SELECT lane FROM done
"""


def arrive(connection: Connection, run_id: str, outcomes: Sequence[tuple[int, int, Json]]) -> set[int]:
    """Leave outcomes of attempts, as (lane, fence, arrival), as arrivals; returns the lanes whose fence was theirs."""
    lanes, fences, texts = [], [], []
    for lane, fence, arrival in outcomes:
        lanes.append(lane)
        fences.append(fence)
        texts.append(dumps(arrival))
    values = {"run_id": run_id, "lanes": lanes, "fences": fences, "arrivals": texts}
    return {lane for (lane,) in connection.execute(_ARRIVE, values).fetchall()}


# One row of work per run says that it owes a turn; a reservation of it is lifted, so that its holder cannot delete it.
# A turn that resumes no saga code is for anyone who serves the queue: a run can be undone when its code is gone.
_OWE = f"""
INSERT INTO orchestrator.work AS w (run_id, key, role, target, queue, priority, due_at)
SELECT id, '', 'turn',
    CASE WHEN %(anyone)s OR state = 'compensating' OR finished_at IS NOT NULL THEN %(any)s
         ELSE saga || '@' || version END,
    queue, priority, {CLOCK}
FROM orchestrator.runs WHERE {{which}}
ON CONFLICT (run_id, lane) DO UPDATE SET
    target = CASE WHEN EXCLUDED.target = %(any)s THEN EXCLUDED.target ELSE w.target END,
    due_at = least(w.due_at, EXCLUDED.due_at), reserved_at = NULL, incarnation = NULL, child = NULL
RETURNING queue
"""
_OWE_TURN = _OWE.format(which="id = %(run_id)s")
_OWE_TURNS = _OWE.format(which="id = ANY(%(ids)s) ORDER BY id")


def owe_turn(connection: Connection, run_id: str, now: datetime | None = None, *, anyone: bool = False) -> str | None:
    """Make the run's turn due, for `anyone` or for who has its code.

    Returns the queue to ring, None without such a run.
    """
    row = connection.execute(_OWE_TURN, {"run_id": run_id, "now": now, "anyone": anyone, "any": ANYONE}).fetchone()
    return row[0] if row else None


_LEAVE = """
INSERT INTO orchestrator.arrivals (run_id, arrival) SELECT %(run_id)s, %(arrival)s::json
WHERE EXISTS (SELECT FROM orchestrator.runs WHERE id = %(run_id)s)
"""


def leave(
    connection: Connection, run_id: str, arrival: Json, now: datetime | None = None, *, anyone: bool = False
) -> str | None:
    """Leave an arrival that needs no fence and make the run's turn due; returns the queue to ring.

    Nothing is left for a run that does not exist, or was pruned: nobody would take it in.

    Two statements; the caller opens the transaction that holds them together.
    """
    connection.execute(_LEAVE, {"run_id": run_id, "arrival": dumps(arrival)})
    return owe_turn(connection, run_id, now, anyone=anyone)


_LEAVE_MANY = """
INSERT INTO orchestrator.arrivals (run_id, arrival)
SELECT run_id, arrival::json FROM unnest(%(ids)s::text[], %(arrivals)s::text[]) AS left_for (run_id, arrival)
"""


def leave_many(
    connection: Connection, arrivals: Sequence[tuple[str, Json]], now: datetime | None = None, *, anyone: bool = False
) -> list[str]:
    """Leave arrivals for many runs, as (run, arrival), and make their turns due, in the order of the runs' ids.

    Returns the queues to ring, one for each run.  Two statements; the caller opens the transaction that holds them
    together.
    """
    ids = [run_id for run_id, _ in arrivals]
    connection.execute(_LEAVE_MANY, {"ids": ids, "arrivals": [dumps(arrival) for _, arrival in arrivals]})
    values = {"ids": ids, "now": now, "anyone": anyone, "any": ANYONE}
    return [queue for (queue,) in connection.execute(_OWE_TURNS, values).fetchall()]


_WAITING = "SELECT EXISTS (SELECT FROM orchestrator.arrivals WHERE run_id = %(run_id)s)"


def waiting(connection: Connection, run_id: str) -> bool:
    """Tell whether somebody left something for the run (index arrivals_by_run)."""
    row = connection.execute(_WAITING, {"run_id": run_id}).fetchone()
    return bool(row and row[0])


# Primary key of runs, index arrivals_by_run; takes no lock.
_NOTICED = """
SELECT position, EXISTS (SELECT FROM orchestrator.arrivals a WHERE a.run_id = r.id)
FROM orchestrator.runs r WHERE id = %(run_id)s
"""


def noticed(connection: Connection, run_id: str) -> tuple[int, bool]:
    """Tell where a run stands, and whether it has unread arrivals."""
    row = connection.execute(_NOTICED, {"run_id": run_id}).fetchone()
    return row or (0, False)


# Primary keys of work and arrivals.
_IGNORE = """
WITH dropped AS (DELETE FROM orchestrator.work WHERE run_id = %(run_id)s AND lane = 0)
DELETE FROM orchestrator.arrivals WHERE run_id = %(run_id)s AND id = ANY(%(ids)s::bigint[])
"""


def ignore(connection: Connection, run_id: str, ids: Sequence[int]) -> None:
    """Delete the turn row of a run that has ended, and arrivals that came too late to matter."""
    failpoint("ignore.before", connection)
    connection.execute(_IGNORE, {"run_id": run_id, "ids": list(ids)})
    failpoint("ignore.after", connection)
