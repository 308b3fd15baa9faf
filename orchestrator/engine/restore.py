"""After a restore of the database: every run of that moment hears of it, before any worker does anything again.

Owns who may do that when, page by page.  Must never decide what becomes of a step: that is the machine's
(`orchestrator.machine.restore`).  Told twice, or cut short and told again, it goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import sleep
from typing import Any

from orchestrator.engine.cache import Executions
from orchestrator.errors import UsageError
from orchestrator.failpoints import failpoint
from orchestrator.machine import restore as machine
from orchestrator.machine.journal import Restore, encode
from orchestrator.store import arrivals, liveness, restores
from orchestrator.store.connection import Connection

_PAGE = 200  # runs that are told with one commit
_LISTED = 1000
WATCH_S = 3.0  # a worker renews its lease every half a second or so
Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Aftermath:
    """What was found, and told: `runs`, `steps` as task -> fate -> how many, and the first of them as `listed`."""

    found: Found
    needed: bool = True


def nothing() -> Found:
    """Return what is found at first."""
    return {"runs": 0, "steps": {}, "listed": []}


def look_ahead(connection: Connection) -> Aftermath:
    """Return what a sweep would find, and whether anything asks for one; changes nothing."""
    sweep = restores.open_sweep(connection)
    found = sweep.found or nothing() if sweep else nothing()
    after = sweep.swept_to if sweep else ""
    while ids := restores.page(connection, after, _PAGE):
        _add(found, connection, ids)
        after = ids[-1]
    return Aftermath(found, sweep is not None or restores.lineage(connection).is_broken)


def look_after(connection: Connection, by: str, *, always: bool = False, watch_s: float = WATCH_S) -> Aftermath:
    """Tell every run that has not ended, and take away what was due of it; each page is a transaction.

    Does nothing if neither the lineage of the data nor a sweep that was cut short asks for it, unless `always`.
    Raises: UsageError while workers run.
    """
    if not (always or restores.open_sweep(connection) or restores.lineage(connection).is_broken):
        return Aftermath(nothing(), needed=False)
    bury(connection, watch_s)
    failpoint("restore.buried", connection)
    restores.begin(connection, by)
    failpoint("restore.begun", connection)
    sweep = restores.open_sweep(connection)
    last = (sweep and sweep.found) or nothing()
    while (found := _page(connection)) is not None:
        last = found
        failpoint("restore.told", connection)
    failpoint("restore.ended", connection)
    return Aftermath(last)


def bury(connection: Connection, watch_s: float) -> None:
    """Declare dead the workers of that moment, none of which renews its lease.  Raises: UsageError if one does."""
    before = {row[0]: row for row in liveness.alive(connection)}
    if before:
        sleep(watch_s)
    living = liveness.alive(connection)
    _refuse([row[2] for row in living if row[0] not in before or row[1] != before[row[0]][1]])
    for incarnation, beats, *_ in living:
        if not liveness.declare_dead(connection, incarnation, beats):
            _refuse(["one that has just renewed its lease"])


def _refuse(nodes: Sequence[str]) -> None:
    if nodes:
        raise UsageError(
            f"workers run on this database: {', '.join(nodes)}. They would go on from the past and do again what was "
            "done; stop all workers and beats, and ask again"
        )


def _page(connection: Connection) -> Found | None:
    """Tell a page of runs; returns what was found so far, None once the sweep has ended."""
    with connection.transaction():
        sweep = restores.open_sweep(connection, hold=True)
        if sweep is None:
            return None
        _refuse([row[2] for row in liveness.alive(connection)])
        found = sweep.found or nothing()
        ids = restores.page(connection, sweep.swept_to, _PAGE, hold=True)
        if not ids:
            restores.acknowledge(connection)
            restores.finish(connection, sweep.id)
            failpoint("restore.finishing", connection)
            return None
        _add(found, connection, ids)
        restores.take_away(connection, ids)
        failpoint("restore.taken", connection)
        restore = encode(Restore(sweep.by))
        arrivals.leave_many(connection, [(run_id, restore) for run_id in ids], anyone=True)
        restores.advance(connection, sweep.id, ids[-1], found)
        failpoint("restore.telling", connection)
    return found


def _add(found: Found, connection: Connection, ids: Sequence[str]) -> None:
    executions = Executions(lambda saga, version: None, 1)
    for loaded in executions.load_all(connection, ids).values():
        execution = executions.take(loaded)
        assert execution is not None
        found["runs"] += 1
        for step in machine.in_flight(execution.fold):
            fate = machine.fate(execution.fold, step)
            counts = found["steps"].setdefault(step.asked.task, {})
            counts[fate] = counts.get(fate, 0) + 1
            if len(found["listed"]) < _LISTED:
                found["listed"].append({"run": loaded.run.id, "key": step.key, "task": step.asked.task, "fate": fate})
