"""Random families: what their runs are to do, and who meddles when, drawn from a seed.

Owns their grammar.  `families` plays them.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from random import Random
from typing import Any

from orchestrator import saga
from tests.machine.chaos import STEPS, UNDOABLE
from tests.machine.programs import Language, Program


async def _child(program: Program) -> Any:
    return await saga.child(member, program)


async def _hurried(program: Program) -> Any:
    return await saga.child(hurried, program)


async def _stray(program: Program, seconds: int) -> None:
    saga.child(member, program)
    await asyncio.sleep(seconds)


async def _disowned(program: Program, seconds: int) -> None:
    request = saga.child(member, program)
    await asyncio.sleep(seconds)
    request.cancel()


async def _again(program: Program) -> None:
    saga.continue_as_new(program)


async def _once(n: int) -> Any:
    return await saga.once("noted", lambda: n)


async def _gate(name: str) -> int:
    return saga.version(name, 1, 2)


async def _mapped(name: str, many: int, tolerate: int) -> int:
    done = await saga.map(STEPS[name], range(many), concurrency=2, page=2, tolerate=tolerate)
    return done.succeeded


LANGUAGE = Language(
    STEPS, child=_child, hurried=_hurried, stray=_stray, disowned=_disowned, again=_again, once=_once, gate=_gate,
    mapped=_mapped,
)  # fmt: skip


@saga.define(name="tests.family")
async def member(program: Any) -> Any:
    return await LANGUAGE.perform(program)


@saga.define(name="tests.family.hurried", deadline=timedelta(seconds=9), on_code_error="compensate")
async def hurried(program: Any) -> Any:
    return await LANGUAGE.perform(program)


Orders = list[tuple[int, str, int]]
_ORDERS = (
    "cancel", "cancel", "terminate", "pause", "resume", "pause the saga", "resume the saga", "news", "mend", "restore",
)  # fmt: skip
_LEAVES = ("step",) * 6 + ("sleep", "background", "fickle", "hear", "once", "gate", "mapped", "fail")
_BRANCHES = (
    "sequence", "gather", "group", "first", "tolerant", "tolerant", "timeout", "wait_for", "scope", "locked",
    "child", "child", "hurried", "tolerant child", "tolerant hurried", "stray", "disowned",
)  # fmt: skip
_THEMES = (sorted(STEPS), sorted(UNDOABLE), ["charge", "wire", "settle", "capture"])


class Drawn:
    """A family that a seed stands for: its program, who meddles and when, and its deadline."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._random = Random(seed)
        self._steps = self._random.choice(_THEMES)
        self.program = self._links(self._random.choice((1, 1, 1, 2, 3)))
        orders = self._random.choice((0, 1, 2, 4))
        self.orders: Orders = [self._order() for _ in range(orders)]
        self.deadline_s = self._random.choice((None, None, self._random.randint(0, 30)))

    def _links(self, many: int) -> Program:
        parts = [self._part(self._random.randint(1, 4)) for _ in range(self._random.randint(1, 3))]
        return ["sequence", [*parts, *([["again", self._links(many - 1)]] if many > 1 else [])]]

    def _order(self) -> tuple[int, str, int]:
        return self._random.randint(0, 25), self._random.choice(_ORDERS), self._random.randint(0, 5)

    def _part(self, depth: int) -> Program:
        random = self._random
        if depth == 0 or random.random() < 0.2:
            return self._leaf()
        word = random.choice(_BRANCHES)
        match word:
            case "sequence" | "gather" | "group" | "first":
                return [word, [self._part(depth - 1) for _ in range(random.randint(1, 3))]]
            case "timeout" | "wait_for":
                return [word, self._seconds(), self._part(depth - 1)]
            case "locked":
                return [word, random.choice("ab"), self._seconds(), self._part(depth - 1)]
            case "tolerant child" | "tolerant hurried":
                return ["tolerant", [word.removeprefix("tolerant "), self._part(depth - 1)]]
            case "stray" | "disowned":
                return [word, self._part(depth - 1), self._seconds()]
            case _:
                return [word, self._part(depth - 1)]

    def _leaf(self) -> Program:
        random = self._random
        match random.choice(_LEAVES):
            case "step":
                return ["step", self._step(), random.randint(0, 3)]
            case "background" | "fickle" as word:
                return [word, self._step(), random.randint(0, 3), self._seconds()]
            case "sleep" | "hear" as word:
                return [word, self._seconds()]
            case "once":
                return ["once", random.randint(0, 3)]
            case "gate":
                return ["gate", random.choice("ab")]
            case "mapped":
                return ["mapped", random.choice(("charge", "look", "wire")), random.randint(1, 4), random.randint(0, 4)]
            case word:
                return [word]

    def _step(self) -> str:
        return self._random.choice(self._steps)

    def _seconds(self) -> int:
        return self._random.randint(0, 12)
