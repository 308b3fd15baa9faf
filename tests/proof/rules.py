"""The rules by name: a rule takes the world and yields where it is broken, and what was found there.

Owns the list.  A rule has one name, and each name is planted once in the checker's own tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from tests.proof.report import Violation
from tests.proof.world import World

Rule = Callable[[World], Iterable[tuple[str, str]]]
RULES: dict[str, Rule] = {}
WHEN_QUIET: set[str] = set()
"""Rules that hold only once the last fault is over and everything has settled."""


def rule(name: str, *, when_quiet: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule under its name."""

    def register(function: Rule) -> Rule:
        assert name not in RULES
        RULES[name] = function
        if when_quiet:
            WHEN_QUIET.add(name)
        return function

    return register


def judge(world: World) -> Iterator[Violation]:
    """Apply every rule."""
    for name, function in RULES.items():
        if not (world.while_running and name in WHEN_QUIET):
            yield from (Violation(name, where, found) for where, found in function(world))
