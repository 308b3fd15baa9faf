"""What the checker says: violations by name, and what the run has seen of trouble.

Owns the shape of a report.  Must never judge: the rules do.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken: its name, the run (or file, or table) where, and what was found there."""

    name: str
    where: str
    found: str

    def __str__(self) -> str:
        return f"{self.name}: {self.where}: {self.found}"


@dataclass(slots=True)
class Seen:
    """What a test knows of the trouble that it made, beyond what the database tells.

    `faults` were injected; `redeliveries` are messages that came twice or again; `fenced` are writes that were refused;
    `redispatches` are rings and returns of work by a pump.
    """

    faults: int = 0
    redeliveries: int = 0
    fenced: int = 0
    redispatches: int = 0


@dataclass(slots=True)
class Report:
    """All violations that were found, and counters of what was looked at."""

    violations: list[Violation] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    """How each ended run looked, for the check after this one: terminal is final."""

    @property
    def ok(self) -> bool:
        return not self.violations

    @property
    def names(self) -> set[str]:
        """The names of the broken promises."""
        return {violation.name for violation in self.violations}

    def as_json(self) -> str:
        """Return the report for machines."""
        return json.dumps({"ok": self.ok, "seen": self.seen, "violations": [asdict(v) for v in self.violations]})

    def __str__(self) -> str:
        seen = ", ".join(f"{name} {count}" for name, count in self.seen.items())
        lines = [f"checked: {seen}"]
        for name, count in Counter(violation.name for violation in self.violations).most_common():
            lines.append(f"BROKEN: {name} ({count})")
            lines += [f"    {v.where}: {v.found}" for v in self.violations if v.name == name][:5]
        return "\n".join(lines if self.violations else [*lines, "no violation"])
