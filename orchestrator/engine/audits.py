"""The audits of the engine itself: is what is recorded whole, does it agree with itself, will every run move on?

Owns those judgements, as checks like those of an application.  Must never change anything.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from orchestrator.engine.commit import columns_of
from orchestrator.machine import family
from orchestrator.machine.fold import Fold, RunInfo
from orchestrator.machine.journal import Late, decode_entry
from orchestrator.machine.states import TERMINAL, IllegalTransition, RunState
from orchestrator.reconcile import Check, Looked
from orchestrator.store import audits as store
from orchestrator.store.audits import Audited
from orchestrator.store.connection import Connection

_UNFOLDABLE = (IllegalTransition, LookupError, StopIteration, TypeError, ValueError, AttributeError)
_ROLLED_BACK = {RunState.FAILED, RunState.COMPENSATED, RunState.CANCELLED}


def _runs(connection: Connection, after: str, limit: int) -> Iterator[Looked]:
    for run in store.runs(connection, after, limit):
        yield Looked(run["id"], _problem(connection, run))


def _problem(connection: Connection, run: Audited) -> str | None:
    """Return the first thing that is wrong with a run."""
    late: list[str] = []
    fold, wrong = _folded(run, late)
    if fold is None:
        return wrong
    return (
        _of_the_row(run, fold) or _of_the_undo(run, fold) or _of_late_effects(connection, late)
        or _of_the_family(run) or _stuck(connection, run, fold)
    )  # fmt: skip


def _folded(run: Audited, late: list[str]) -> tuple[Fold | None, str]:
    """Fold the journal of a run; `late` gets the runs that had to undo what landed after its end."""
    parent = run["parent_id"] or "" if run["root_id"] != run["id"] else ""
    fold = Fold(RunInfo(
        run["id"], run["saga"], run["version"], None, run["started_at"], run["queue"],  # its input is not looked at
        parent=parent, link=run["link"], since=run["since"],
    ))  # fmt: skip
    try:
        for seq, at, entries in run.journal:
            if seq != fold.position:
                return None, f"its journal has no row {fold.position}"
            for entry in map(decode_entry, entries):
                fold.apply(entry)
                if type(entry) is Late and fold.ended and fold.steps[entry.key].owes_late_undo:
                    late.append(f"{run['id']}/late/{entry.key}/{entry.attempt}")
            fold.close_row(at)
    except _UNFOLDABLE as error:
        return None, f"row {fold.position} of its journal contradicts those before it: {type(error).__name__}"
    if fold.position != run["position"]:
        return None, f"its journal ends at row {fold.position}, and it stands at {run['position']}"
    return fold, ""


def _of_the_row(run: Audited, fold: Fold) -> str | None:
    if run["state"] != str(fold.state):
        return f"it is {run['state']}, and {fold.state} by its journal"
    if (run["finished_at"] is not None) != (fold.state in TERMINAL):
        return f"it is {run['state']}, and its finished_at does not say so"
    told = columns_of(fold)
    compared = told if fold.ended else {name: told[name] for name in ("parked", "past_pivot")}
    differ = [name for name, value in compared.items() if run[name] != (None if value == [] else value)]
    return f"{', '.join(differ)} of its row and of its journal differ" if differ else None


def _of_the_undo(run: Audited, fold: Fold) -> str | None:
    if run["state"] not in _ROLLED_BACK:
        return None
    left = {item["key"] for item in run["left_effects"] or ()}
    owed = [step.key for step in fold.steps.values() if step.owes_undo and step.key not in left]
    return f"it ended {run['state']}, and {', '.join(owed)} was not undone" if owed else None


def _of_late_effects(connection: Connection, corrections: list[str]) -> str | None:
    missing = set(corrections) - store.known(connection, corrections) if corrections else ()
    return f"an effect landed after its end, and there is no run {min(missing)} to undo it" if missing else None


def _of_the_family(run: Audited) -> str | None:
    if run["parent_id"] and not run["has_parent"]:
        return f"it belongs to run {run['parent_id']}, which is not there"
    gone_back = run["root_state"] in TERMINAL - {RunState.COMPLETED, RunState.CONTINUED} and not run["root_link"]
    if run["state"] == RunState.COMPLETED and run["root_id"] != run["id"] and gone_back:
        return f"it is completed, and the run above it is {run['root_state']}"
    return None


def _stuck(connection: Connection, run: Audited, fold: Fold) -> str | None:
    """Return why no rule will ever move a run, or a step of it.

    What is due, or will be, is in work, timers as well; what came in is in arrivals.  Else it must wait for somebody.
    """
    if run["state"] in TERMINAL or run["unread"]:
        return None
    in_flight = [step for step in fold.steps.values() if step.in_flight]
    granted = [step for step in in_flight if not family.waits_for_grant(fold, step)]
    lost = [step.key for step in granted if step.asked.kind != "child" and step.key not in run["work"]]
    if lost:
        return f"{', '.join(lost)} was asked for, and nobody will ever do it"
    if run["work"] or len(granted) < len(in_flight) or run["state"] in (RunState.PARKED, RunState.PAUSED):
        return None
    if fold.reported and run["root_state"] and run["root_state"] not in TERMINAL:
        return None  # a child that is done waits for its root to keep it or to revoke it
    children = {fold.info.child(step.key): step.key for step in in_flight if step.asked.kind == "child"}
    locks = {step.key for step in fold.waiting.values() if step.asked.kind == "lock"}
    waits = children.keys() & store.still_open(connection, list(children)) or locks & set(run["in_line"])
    if waits or any(step.asked.kind == "signal" for step in fold.waiting.values()):
        return None
    return f"it is {run['state']}, and no rule will ever move it"


def _rows(table: str, connection: Connection, after: str, limit: int) -> Iterator[Looked]:
    for owner in store.owners(connection, table, after, limit):
        problem = None
        if owner.state is None:
            problem = f"it has rows in {table}, and there is no such run"
        elif owner.state in TERMINAL and not owner.may:
            problem = f"it is {owner.state}, and has rows in {table}"
        yield Looked(owner.run_id, problem)


AUDITS = {
    each.name: each
    for each in (
        Check("engine: runs", function=_runs),
        *(Check(f"engine: {table}", function=functools.partial(_rows, table)) for table in store.TABLES),
    )
}
