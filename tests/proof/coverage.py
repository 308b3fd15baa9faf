"""What a run must have seen to prove anything: a test in which nothing went wrong is no test of what goes wrong.

Owns the demands; the default is strict, and a test that asks for less says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from tests.proof.report import Seen, Violation
from tests.proof.world import World

GIVEN_BACK = ("WorkerLost", "LeaseLost", "AttemptExpired")
"""Errors of attempts that a pump or a companion took from a worker, and that were dispatched again."""


@dataclass(frozen=True, slots=True)
class Demand:
    """How many of each must have been seen, at least, and in which states runs must have ended."""

    acknowledged: int = 1
    effects: int = 1
    faults: int = 1
    redeliveries: int = 1
    fenced: int = 1
    redispatches: int = 1
    states: frozenset[str] = frozenset({"completed", "failed", "compensated", "cancelled", "terminated"})


STRICT = Demand()
NOTHING = Demand(0, 0, 0, 0, 0, 0, frozenset())

_WORDS = {
    "acknowledged": "no acknowledged start",
    "effects": "no effect",
    "faults": "no fault",
    "redeliveries": "no redelivery",
    "fenced": "no fenced write",
    "redispatches": "no re-dispatch",
}


def count(world: World, seen: Seen) -> dict[str, int]:
    """Return what was seen, by the test itself and by the journals."""
    entries = Counter(entry["e"] for run in world.runs.values() for entry in run.entries)
    given_back = sum(
        entry["error"].get("type") in GIVEN_BACK for run in world.runs.values() for entry in run.of("attempted")
    )
    return {
        "runs": len(world.runs),
        "entries": entries.total(),
        "acknowledged": len(world.acknowledged),
        "effects": len(world.effects),
        "faults": seen.faults,
        "redeliveries": seen.redeliveries,
        "fenced": seen.fenced + max(len(set(world.refused)), entries["late"]),
        "redispatches": seen.redispatches + given_back,
        **{f"state {state}": n for state, n in Counter(run.state for run in world.runs.values()).items()},
    }


def missing(counted: dict[str, int], demand: Demand) -> Iterator[Violation]:
    """Yield what was asked for and not seen."""
    wanted = asdict(demand)
    for name, words in _WORDS.items():
        if counted[name] < wanted[name]:
            yield Violation(f"saw {words}", "coverage", f"{counted[name]} {name}, {wanted[name]} wanted")
    for state in sorted(demand.states):
        if not counted.get(f"state {state}"):
            yield Violation(f"saw no run that is {state}", "coverage", "a state that was to be reached")
