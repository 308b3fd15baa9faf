"""What may go wrong with an attempt, as an order that is carried out when the attempt comes.

Owns the kinds of faults and how each reads to a person.  Must never carry one out: `worker` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from orchestrator.store.turns import Taken


class Kind(StrEnum):
    """Kinds of faults, by what is known afterwards and by what really happened."""

    REJECTED = "rejected"
    LOST = "answer lost"
    SILENT = "no effect, no answer"
    DIED_BEFORE = "crash before"
    DIED_AFTER = "crash after the effect"
    DIED_COMMITTED = "crash after the commit"
    CANCELLED = "cancelled"
    MEANWHILE = "meanwhile"
    LATE = "late effect"


WORDS: Final[Mapping[Kind, str]] = {
    Kind.REJECTED: "was rejected: it had no effect, and said so",
    Kind.LOST: "took effect, and its answer was lost (unknown)",
    Kind.SILENT: "had no effect, and nobody was told (unknown)",
    Kind.DIED_BEFORE: "had begun when its process died, before its code ran",
    Kind.DIED_AFTER: "took effect, and its process died before the outcome was committed",
    Kind.DIED_COMMITTED: "took effect, its outcome was committed, and then its process died",
    Kind.CANCELLED: "was about to run when somebody cancelled the run",
    Kind.MEANWHILE: "was about to run when something else happened (meanwhile=)",
    Kind.LATE: "was so slow that it was given up as unknown, and took effect after its run had ended (late=)",
}
EVERY: Final = 0  # as an attempt: each of them


@dataclass(frozen=True, slots=True)
class Fault:
    """An order: let this happen to attempt `attempt` of `task` (EVERY: to each).

    `role` is do, undo, probe or once, `run` and `key` name one request; left empty they fit any.
    """

    kind: Kind
    task: str
    attempt: int = EVERY
    key: str = ""
    role: str = ""
    run: str = ""

    def fits(self, taken: Taken) -> bool:
        """Tell whether this attempt is meant."""
        return (
            self.task == taken.task
            and self.attempt in (EVERY, taken.attempt)
            and self.key in ("", taken.key)
            and self.role in ("", taken.role)
            and self.run in ("", taken.run_id)
        )

    def __str__(self) -> str:
        which = "every attempt" if self.attempt == EVERY else f"attempt {self.attempt}"
        what = {"undo": f", the undo of {self.key}", "probe": f", the probe of {self.key}"}.get(self.role, "")
        return f"{self.task} ({which}{what or (f', {self.key}' if self.key else '')}) {WORDS[self.kind]}"


def of(faults: Iterable[Fault], taken: Taken) -> Fault | None:
    """Return the fault that is meant for an attempt, the one ordered last if there are several."""
    return next((fault for fault in reversed(list(faults)) if fault.fits(taken)), None)
