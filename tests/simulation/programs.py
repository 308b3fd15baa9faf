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
_BRANCHES = (
    "leaf", "leaf", "sequence", "gather", "group", "first", "all", "tolerant", "tolerant", "timeout", "wait_for",
    "scope", "scope", "locked", "locked", "child", "child", "hurried", "stray", "disowned",
)  # fmt: skip
_LEAVES = ("leaf", "leaf", "leaf", "hear", "gate", "gated", "urgent", "mapped", "paged")


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

    # -- families ------------------------------------------------------------------------------------------------------
    def draw_family(self) -> Program:
        """Return a program that has children, blocks, maps, signals or further links as well."""
        random = self._random
        parts = [self._member(random.randint(1, 3)) for _ in range(random.randint(1, 3))]
        if random.random() < 0.15:
            parts += [self._step(sorted(steps.PIVOTS)), self._member(1)]
        if random.random() < 0.15:
            parts.append(["fail"])
        if random.random() < 0.2:
            parts.append(["again", self.draw_family()])
        return ["sequence", parts]

    def _member(self, depth: int) -> Program:
        random = self._random
        if depth == 0:
            return self._leaf_of_family()
        word = random.choice(_BRANCHES)
        match word:
            case "leaf":
                return self._leaf_of_family()
            case "sequence" | "gather" | "group" | "first" | "all":
                return [word, [self._member(depth - 1) for _ in range(random.randint(1, 3))]]
            case "timeout" | "wait_for":
                return [word, random.choice(_SECONDS), self._member(depth - 1)]
            case "locked":
                return [word, random.choice("ab"), random.choice((*_SECONDS, None)), self._member(depth - 1)]
            case "stray" | "disowned":
                return [word, self._member(depth - 1), random.choice(_SECONDS)]
            case "tolerant":
                within = random.choice(["child", "hurried", "scope", ""])
                return [word, [within, self._member(depth - 1)] if within else self._member(depth - 1)]
            case _:
                return [word, self._member(depth - 1)]

    def _leaf_of_family(self) -> Program:
        random = self._random
        match random.choice(_LEAVES):
            case "hear":
                return ["hear", random.choice((*_SECONDS, None))]
            case "gate":
                return ["gate", random.choice("ab")]
            case "gated":
                return self._step(sorted(steps.GATED))
            case "urgent":
                return ["urgent", *self._step(sorted(steps.UNDOABLE))[1:], random.randint(1, 9)]
            case "mapped" | "paged" as word:
                return self._map(word)
            case _:
                return self._leaf()

    def _map(self, word: str) -> Program:
        random = self._random
        task = random.choice([*steps.UNDOABLE, *steps.GATED, "look", "tell"])
        many = random.randint(1, 5)
        first, *_ = itertools.islice(self._numbers, 2 * many)
        options = {"tolerate": random.choice([0, 0.5, 9]), "concurrency": random.choice([1, 2, 100]), "page": 2}
        return [word, task, first, many, options]

    def _step(self, names: list[str]) -> Program:
        return ["step", self._random.choice(names), next(self._numbers)]
