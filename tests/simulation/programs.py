"""Random programs for the simulated saga, drawn from the seed.

Owns their grammar.  Every request of a seed has a number of its own, which is the thing that it is about.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from random import Random
from typing import Any

from tests.machine.programs import Program
from tests.simulation import steps

_SECONDS = (0, 0, 1, 2, 5, 3600)
_PAUSES = (1, 2, 4000, 9000)


class Programs:
    """Draws programs of a bounded size."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._numbers: Iterator[int] = itertools.count(1)

    def draw(self, *, short: bool = False) -> Program:
        """Return a program with a handful of requests; some have a point of no return."""
        shape = 0.0 if short else self._random.random()
        if shape < 0.25:  # short steps in a row, which share commits with others like them
            return ["sequence", [self._step(["look", "charge", "charge"]) for _ in range(self._random.randint(1, 4))]]
        parts = [self._part(2) for _ in range(self._random.randint(1, 3))]
        if shape > 0.8:
            parts += [self._step(sorted(steps.PIVOTS)), self._step(["tell", "look", "jot"])]
        if shape < 0.45:
            parts.append(["fail"])
        return ["sequence", parts]

    def _part(self, depth: int) -> Program:
        random = self._random
        if depth == 0 or random.random() < 0.5:
            return self._leaf()
        word = random.choice(["sequence", "gather", "group", "first", "tolerant", "tolerant", "timeout", "wait_for"])
        if word == "tolerant":
            return [word, self._part(depth - 1)]
        if word in ("timeout", "wait_for"):
            return [word, random.choice(_SECONDS), self._part(depth - 1)]
        return [word, [self._part(depth - 1) for _ in range(random.randint(1, 3))]]

    def _leaf(self) -> Program:
        random = self._random
        word = random.choice(["step"] * 6 + ["sleep", "background", "fickle", "once"])
        if word == "sleep":
            return [word, random.choice(_PAUSES)]
        if word == "once":
            return [word, next(self._numbers)]
        step: Any = self._step(sorted(steps.UNDOABLE) * 2 + ["look", "jot", "haul", "mail", "tell"])
        return step if word == "step" else [word, *step[1:], random.choice(_SECONDS)]

    def _step(self, names: list[str]) -> Program:
        return ["step", self._random.choice(names), next(self._numbers)]
