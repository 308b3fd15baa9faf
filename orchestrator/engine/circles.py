"""Looks for runs that wait for each other by way of children, and tells one of each circle.

A circle of locks alone is refused where it would be closed, by who asks for the last of them.  One that passes through
a parent which awaits its child can be closed by any turn of that parent, so somebody has to look.  Who is in it stays
in it: a snapshot is enough.  Owns the looking; what is a circle is the machine's to say.
"""

from __future__ import annotations

import logging
from collections import defaultdict

from orchestrator.engine.folding import fold_of
from orchestrator.machine.circles import Node, Place, awaited_by, lines, refusals, standing
from orchestrator.machine.journal import AttemptEnded, encode
from orchestrator.machine.states import RunState
from orchestrator.store import circles as store
from orchestrator.store import runs
from orchestrator.store.connection import Connection

logger = logging.getLogger(__name__)

_RUNS = 50  # whose journals are read in one look
_ROWS = 2_000  # a longer journal is not read: its run is taken for one that may move


def break_circles(connection: Connection) -> int:
    """Refuse a lock to one run of each circle; returns to how many.  Each is a transaction of its own."""
    with runs.snapshot(connection):
        places = {place.number: place for place in store.places(connection)}
        found = refusals(_waits(connection, places), places) if places else []
    refused = 0
    for place, error in found:
        told = AttemptEnded(place.key, "do", 1, "rejected", error=error)
        if store.refuse(connection, place, encode(told)):
            logger.warning("run %s was refused lock %s: %s", place.run_id, place.name, error["message"])
            refused += 1
    return refused


def _waits(connection: Connection, places: dict[int, Place]) -> dict[Node, list[frozenset[Node]]]:
    waits = lines(places.values())
    suspects = _suspects(connection, places, waits)
    for run_id in suspects[:_RUNS]:
        own = {place.key: place.number for place in places.values() if place.run_id == run_id and not place.holds}
        waits[run_id] = _awaited(connection, run_id, own)
    return waits


def _suspects(connection: Connection, places: dict[int, Place], waits: dict[Node, list[frozenset[Node]]]) -> list[str]:
    """Return who might be in a circle, should each run wait for all of its children and locks.

    This needs no journal, and in the ordinary course of things finds nobody.
    """
    might: dict[Node, set[Node]] = defaultdict(set)
    for place in places.values():
        if not place.holds:
            might[place.run_id].add(place.number)
    for parent, child in store.children(connection, {place.run_id for place in places.values()}):
        might[parent].add(child)
    stand = standing(waits | {run: [frozenset(things)] for run, things in might.items()})
    awaited: dict[Node, set[Node]] = defaultdict(set)
    for node, things in stand.items():
        for other in frozenset().union(*things):
            awaited[other].add(node)
    stand = standing({node: [frozenset(awaited[node])] for node in stand})  # the other way: nobody waits for the rest
    return sorted(node for node in stand if isinstance(node, str))


def _awaited(connection: Connection, run_id: str, places: dict[str, int]) -> list[frozenset[Node]]:
    run = runs.run(connection, run_id)
    if run is None or run["state"] != RunState.RUNNING or run["position"] - run["since"] > _ROWS:
        return []
    if runs.inbox(connection, run_id).unread:
        return []
    due = [(item.role, item.due_at) for item in runs.outstanding(connection, run_id)]
    if due and due != [("turn", run["deadline_at"])]:  # a deadline undoes the run: that is no way on
        return []
    return awaited_by(fold_of(run, runs.history(connection, run_id)), places)
