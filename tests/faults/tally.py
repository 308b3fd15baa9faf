"""What a session of fault tests has survived: counted here, told at its end, and quoted in docs/guarantees.md.

Owns the figures of this session.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.proof.report import Report


@dataclass(slots=True)
class Tally:
    """Faults by kind, and what the checker looked at."""

    faults: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    acknowledged: int = 0
    attempts_lost: int = 0
    late: int = 0
    violations: int = 0
    tests: int = 0

    def add(self, faults: Counter[str], report: Report) -> None:
        """Add one test."""
        self.faults += faults
        self.tests += 1
        self.runs += report.seen["runs"]
        self.acknowledged += report.seen["acknowledged"]
        self.attempts_lost += report.seen["redispatches"]
        self.late += report.seen["fenced"]
        self.violations += len(report.violations)

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.faults.most_common())
        return (
            f"{self.faults.total()} faults in {self.tests} tests ({kinds})\n"
            f"{self.runs} runs, {self.acknowledged} acknowledged starts, {self.attempts_lost} attempts lost and "
            f"dispatched again, {self.late} outcomes refused or late; broken promises: {self.violations}"
        )


TALLY = Tally()
