"""Rules about runs as a whole: none is lost, each ends, its journal is complete and tells what its row tells.

Owns those rules.  The fold is the engine's, since the row is a copy of a part of it; all else here is worked out apart
from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from orchestrator.machine.fold import Fold, RunInfo
from orchestrator.machine.journal import CancelAsked, Operated, decode_entry
from orchestrator.machine.states import IllegalTransition
from tests.proof.rules import rule
from tests.proof.world import Run, World

Found = Iterator[tuple[str, str]]


@rule("an acknowledged start is lost")
def acknowledged_starts_exist(world: World) -> Found:
    for run_id in world.acknowledged:
        if run_id not in world.runs:
            yield run_id, "its start returned, and there is no such run"


@rule("a run has not ended", when_quiet=True)
def every_run_has_ended(world: World) -> Found:
    """Or is parked, and was told to be."""
    for run in world.runs.values():
        if not run.ended and not (run.state == "parked" and run.id in world.may_park):
            outstanding = [(row["key"], row["role"], row["attempt"], str(row["due_at"])) for row in run.work]
            yield run.id, f"it is {run.state}; outstanding: {outstanding}; parked: {run.row['parked']}"


@rule("an ended run has work or arrivals left", when_quiet=True)
def ended_runs_leave_nothing(world: World) -> Found:
    for run in world.runs.values():
        if run.ended and (run.work or run.arrivals):
            keys = [row["key"] or "its turn" for row in run.work]
            yield run.id, f"it is {run.state}, with work {keys} and {len(run.arrivals)} arrivals"


@rule("an ended run holds a lock", when_quiet=True)
def locks_are_freed(world: World) -> Found:
    for run_id, name in world.locks:
        if run_id not in world.runs or world.runs[run_id].ended:
            yield run_id, f"it has a place at lock {name}"


@rule("a child was kept without its root")
def children_end_with_their_root(world: World) -> Found:
    """What a child did stays only if the root of its family ended well."""
    for run in world.runs.values():
        root = world.runs.get(run.row["root_id"])
        if run.row["root_id"] != run.id and run.state == "completed":
            kept = root is not None and (root.state == "completed" or root.row["link"] > 0)
            if not kept:
                yield run.id, f"it is completed, and its root {run.row['root_id']} is {root.state if root else 'gone'}"


@rule("a row belongs to no run")
def rows_belong_to_runs(world: World) -> Found:
    for place, run_id in world.strays:
        yield run_id, f"it has rows in {place} and is no run"


@rule("a journal has a gap")
def journals_are_gapless(world: World) -> Found:
    for run in world.runs.values():
        if run.has_gap:
            yield run.id, f"rows {[seq for seq, _, _ in run.journal]} at position {run.row['position']}"


@rule("journal time went back")
def journal_time_goes_on(world: World) -> Found:
    for run in world.readable:
        instants = [at for _, at, _ in run.journal]
        if instants != sorted(instants):
            yield run.id, f"{[str(at) for at in instants]}"


@rule("journal time is ahead of the database's clock")
def journal_time_is_the_database_s(world: World) -> Found:
    """Between two statements a process carries it on by itself; a run that ends before its start is dated by that."""
    for run in world.runs.values():
        latest = max(world.now, run.row["started_at"]) + timedelta(seconds=1)
        if ahead := [(seq, str(at)) for seq, at, _ in run.journal if at > latest]:
            yield run.id, f"rows {ahead}, and it is {world.now}"


@rule("a journal does not fold to its row")
def journals_fold_to_the_row(world: World) -> Found:
    for run in world.readable:
        try:
            expected = _columns(_fold(run))
        except (IllegalTransition, LookupError, StopIteration, TypeError) as error:
            yield run.id, f"it does not fold at all: {error!r}"
            continue
        wrong = {name: (value, run.row[name]) for name, value in expected.items() if run.row[name] != value}
        if wrong:
            yield run.id, ", ".join(f"{name}: {a!r} by the journal, {b!r} in the row" for name, (a, b) in wrong.items())


def _fold(run: Run) -> Fold:
    row = run.row
    parent = row["parent_id"] if row["root_id"] != row["id"] else ""
    info = RunInfo(
        row["id"], row["saga"], row["version"], row["input"], row["started_at"], row["queue"], parent=parent,
        link=row["link"], since=row["since"],
    )  # fmt: skip
    fold = Fold(info)
    for _, at, entries in run.journal:
        fold.apply_row(at, [decode_entry(entry) for entry in entries])
    return fold


def _columns(fold: Fold) -> dict[str, Any]:
    """Return the columns that a journal decides; what a run ended in, only once it has."""
    parked = [{"key": key, "role": entry.role, "why": entry.why} for key, entry in fold.parked_keys.items()]
    if fold.parked is not None:
        parked.insert(0, {"key": "", "role": fold.parked.role, "why": fold.parked.why})
    columns: dict[str, Any] = {"state": str(fold.state), "parked": parked, "past_pivot": fold.past_pivot}
    if fold.ended is not None:
        completed = fold.ended.state == "completed"
        columns["output"] = fold.returned.output if completed and fold.returned else None
        columns["left_effects"] = list(fold.ended.left)
        columns["error"] = _error(fold)
    return columns


def _error(fold: Fold) -> Any:
    order = fold.terminated or (fold.stop if fold.rollback and fold.rollback.cause == "cancel" else None)
    if not isinstance(order, (CancelAsked, Operated)):
        return fold.raised or (fold.rollback.error if fold.rollback else None)
    kind = "Terminated" if fold.terminated else "Cancelled"
    reason = f": {order.reason}" if order.reason else ""
    return {"type": kind, "message": f"{kind.lower()} by {order.by or 'an unnamed caller'}{reason}"}


@rule("something was written after the end")
def nothing_follows_the_end(world: World) -> Found:
    """But late effects, which are noted and change nothing; a child says as often as it is asked how it has ended."""
    for run in world.readable:
        kinds = [entry["e"] for entry in run.entries]
        after = kinds[kinds.index("ended") + 1 :] if "ended" in kinds else []
        if set(after) - ({"late", "revoked"} if run.row["root_id"] != run.id else {"late"}):
            yield run.id, f"after its end: {after}"


def end_of(run: Run) -> str:
    """Return how an ended run looks, in a form to compare."""
    shown = {name: run.row[name] for name in ("state", "output", "error", "left_effects", "finished_at")}
    return json.dumps(shown, sort_keys=True, default=str)


@rule("an end has changed")
def ends_are_final(world: World) -> Found:
    """Compared with the check before this one."""
    for run_id, end in world.before.items():
        now = end_of(world.runs[run_id]) if run_id in world.runs else "gone"
        if now != end:
            yield run_id, f"it ended as {end} and is now {now}"


@rule("a total has changed")
def totals_are_conserved(world: World) -> Found:
    for name, expected, found in world.conserved:
        if found != expected:
            yield name, f"{expected} before, {found} now"
