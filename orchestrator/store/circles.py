"""What runs that stand in the queue of a lock wait for, and telling one of them that it waits in vain.

Statements of `engine.circles`.  Reads are for a snapshot; `refuse` is a transaction of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.codec import Json, dumps
from orchestrator.failpoints import failpoint
from orchestrator.machine.circles import Place
from orchestrator.store.arrivals import owe_turn
from orchestrator.store.connection import Connection

MOST = 2_000  # places that are looked at together; whoever stands behind them is for a later look

# All of locks is read, and what it holds is short: who waits, and what is held.
_PLACES = """
SELECT id, run_id, key, name, granted_at IS NOT NULL FROM orchestrator.locks
WHERE name IN (SELECT name FROM orchestrator.locks WHERE granted_at IS NULL) ORDER BY id LIMIT %(most)s
"""


def places(connection: Connection) -> list[Place]:
    """Return the queues in which somebody waits, in the order of coming."""
    return [Place(*row) for row in connection.execute(_PLACES, {"most": MOST}).fetchall()]


# Index runs_by_parent.  A correcting run and an ended link have a parent and are no children.
_CHILDREN = """
WITH RECURSIVE down (id, parent_id) AS (
    SELECT unnest(%(ids)s::text[]), NULL
    UNION
    SELECT r.id, r.parent_id FROM down JOIN orchestrator.runs r ON r.parent_id = down.id
    WHERE r.finished_at IS NULL AND r.root_id <> r.id
)
SELECT parent_id, id FROM down WHERE parent_id IS NOT NULL LIMIT %(most)s
"""


def children(connection: Connection, run_ids: Iterable[str]) -> list[tuple[str, str]]:
    """Return the open children of runs, and theirs, as (parent, child)."""
    return connection.execute(_CHILDREN, {"ids": list(run_ids), "most": MOST}).fetchall()


# One transaction at a time for the queue, as in locks_1 of migration 0006, whose order this keeps: first the name.
_ALONE = "SELECT pg_advisory_xact_lock(hashtextextended('orchestrator.lock ' || %(name)s, 0))"
_LEAVE = "DELETE FROM orchestrator.locks WHERE id = %(id)s AND granted_at IS NULL RETURNING run_id"
_TELL = "INSERT INTO orchestrator.arrivals (run_id, arrival) VALUES (%(run_id)s, %(arrival)s::json)"


def refuse(connection: Connection, place: Place, arrival: Json) -> bool:
    """Take a run out of a queue and leave it an arrival; False if it does not wait there any more.

    A transaction of its own.
    """
    failpoint("refuse.before", connection)
    with connection.transaction():
        connection.execute(_ALONE, {"name": place.name})
        failpoint("refuse.begun", connection)
        left = connection.execute(_LEAVE, {"id": place.number}).fetchone() is not None
        if left:
            connection.execute(_TELL, {"run_id": place.run_id, "arrival": dumps(arrival)})
            owe_turn(connection, place.run_id)
            failpoint("refuse.told", connection)
    failpoint("refuse.after", connection)
    return left
