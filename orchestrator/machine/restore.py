"""What follows for a run from a restore of its database to a moment in the past.

Owns which steps may have been done in the time that is forgotten, and how that is found out.  Must never take anything
for undone because the restored rows say so: they are from before.

What is due of a run was taken away before it hears of the restore, so that all of it is decided anew here:

- a step that stays when the database is set back (`Step.outlives_restore`) is asked for by its probe, or left to a
  person; so is every one that the run asks for later on, because it may have gone that way before;
- read-only and transactional steps, functions of ``saga.once``, undos and probes are done again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.machine import family
from orchestrator.machine.fold import Fold
from orchestrator.machine.journal import Restore, Restored
from orchestrator.machine.record import Step
from orchestrator.machine.states import Backward, Forward

if TYPE_CHECKING:
    from orchestrator.machine.decide import Decisions

WHY = "the database was restored to a moment before it was done, or not: its outcome is unknown"


def take(decisions: Decisions, restore: Restore) -> None:
    """Hear of a restore, and order again what was in flight."""
    fold = decisions.fold
    decisions.record(Restored(restore.by))
    decisions.work.clear()  # what was decided earlier in this turn is in flight too
    for step in list(in_flight(fold)):
        if step.backward is Backward.ASKED:
            decisions.work.append(decisions.undo_work(step))
        elif step.forward is Forward.PROBING:
            decisions.work.append(decisions.probe_work(step))
        elif fold.rollback or step.abandoned:
            decisions.settle_unknown(step)
        else:
            decisions.do(step)


def in_flight(fold: Fold) -> list[Step]:
    """Return the steps of which there is work, or was until the database was restored."""
    return [
        step
        for step in fold.steps.values()
        if step.in_flight and step.asked.kind in ("step", "once") and not family.waits_for_grant(fold, step)
    ]


def find_out(decisions: Decisions, step: Step) -> None:
    """Ask what became of a step that may have been done already; never do it twice on a guess."""
    if step.asked.probe:
        decisions.ask_provider(step)
    else:
        decisions.park(step, "do", WHY)


def fate(fold: Fold, step: Step) -> str:
    """Say what `take` does about a step that is in flight, in one word for people."""
    if step.backward is Backward.ASKED or fold.rollback or step.abandoned:
        return "undone"
    if step.forward is Forward.PROBING:
        return "probed"
    if not step.outlives_restore:
        return "repeated"
    return "probed" if step.asked.probe else "parked"
