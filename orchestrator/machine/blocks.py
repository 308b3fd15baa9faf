"""Blocks of saga code: partial rollback of a scope, locks that are held to the end of a block.

Owns what entering and leaving a block means.  Must never resume saga code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.machine.fold import Fold
from orchestrator.machine.journal import Parked, Settled, Unasked, Unlocked
from orchestrator.machine.record import Step
from orchestrator.machine.states import Backward

if TYPE_CHECKING:
    from orchestrator.machine.decide import Decisions

SEPARATOR = "|"  # between the keys of scopes, the outer one first


def undo_scope(decisions: Decisions, scope: Step) -> None:
    """Undo what was done inside a block that an exception leaves, youngest first; settle the request after the last."""
    fold = decisions.fold
    inside = _inside(fold, scope)
    if not can_be_undone(fold, scope):
        if fold.parked is None:
            why = "an exception left a scope in which the point of no return was passed, so that it cannot be undone"
            decisions.record(Parked("", "pivot", why, scope.asked.args.get("error")))
        return
    for step in inside:
        if not (step.settled or step.abandoned):
            decisions.give_up(step)
    if any(not step.settled or step.in_flight or step.backward is Backward.PARKED for step in inside):
        return
    owing = next((step for step in reversed(inside) if step.owes_undo), None)
    if owing is None:
        decisions.record(Settled(scope.key, "succeeded"))
    else:
        decisions.begin_undo(owing)


def take_back(decisions: Decisions) -> None:
    """Take back that blocks were left which cannot be undone: mended code need not leave them; if it does, they park.

    They would keep the run parked else, whatever its code does, and code that does not ask for them would be drift.
    """
    fold = decisions.fold
    for step in list(fold.waiting.values()):
        if step.asked.kind == "scope" and not can_be_undone(fold, step):
            decisions.record(Unasked(step.key))


def can_be_undone(fold: Fold, scope: Step) -> bool:
    """Tell whether no point of no return was passed inside a block."""
    return not any(step.key in fold.pivots_passed for step in _inside(fold, scope))


def _inside(fold: Fold, scope: Step) -> list[Step]:
    return [step for step in fold.steps.values() if _is_inside(step, scope.asked.task)]


def is_needed(fold: Fold, key: str) -> bool:
    """Tell whether what was done under a lock may still be under way, or be undone, although its block was left.

    That is inside a scope which is being undone, and as long as something that was asked for since is given up only.
    """
    lock = fold.steps[key]
    scopes = (step for step in fold.waiting.values() if step.asked.kind == "scope")
    being_undone = any(_is_inside(lock, scope.asked.task) for scope in scopes)
    return being_undone or any(step.order > lock.order for step in fold.given_up.values())


def _is_inside(step: Step, path: str) -> bool:
    return step.asked.scope == path or step.asked.scope.startswith(path + SEPARATOR)


def ask_for_lock(decisions: Decisions, step: Step) -> None:
    """Queue for a lock; one that was held when the run was continued as new is still held."""
    fold = decisions.fold
    if fold.locks[step.key] != fold.info.lock(step.key):
        decisions.record(Settled(step.key, "succeeded", by="carried"))
    else:
        decisions.locks.append(step)


def unlock(decisions: Decisions, key: str) -> None:
    """Give a lock back, or the place in its queue; nothing if that was done before."""
    row = decisions.fold.locks.get(key)
    if row is None:
        return
    decisions.record(Unlocked(key))
    step = decisions.fold.steps[key]
    if step in decisions.locks:
        decisions.locks.remove(step)  # asked for in this very turn: it never gets a place in the queue
    else:
        decisions.unlocks.append(row)


def carried(fold: Fold) -> dict[str, str]:
    """Return what goes along with a run that is continued as new: of each lock, by name, the place that came first."""
    held = {fold.steps[key].asked.task: row for key, row in reversed(fold.locks.items())}
    return held | fold.carried_locks


def unlock_doubles(decisions: Decisions) -> None:
    """Give back the places of locks that the run holds more than once: the next link would know of one only."""
    kept = carried(decisions.fold).values()
    decisions.unlocks.extend(row for row in decisions.fold.locks.values() if row not in kept)


def unlock_all(decisions: Decisions) -> None:
    """Free whatever the run still holds: it has ended."""
    fold = decisions.fold
    decisions.unlocks.extend([*fold.locks.values(), *fold.carried_locks.values()])
