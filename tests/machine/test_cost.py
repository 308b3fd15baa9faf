"""A run of n steps costs O(n): counted in function calls, which no busy machine changes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator import saga
from tests.machine.stage import Stage
from tests.machine.steps import charge, look, reserve


@saga.define
async def one_by_one(n: int) -> None:
    for _ in range(n):
        await saga.step(look, 1)


@saga.define
async def all_at_once(n: int) -> None:
    await asyncio.gather(*(saga.step(look, i) for i in range(n)))


@saga.define
async def many_effects(n: int) -> None:
    for _ in range(n):
        await saga.step(reserve, 1)
    raise ValueError("undo it all")


@saga.define
async def many_given_up(n: int) -> None:
    for _ in range(n):
        request = saga.step(charge, 1)
        await saga.step(look, 1)
        request.cancel()


def _work_off(stage: Stage) -> None:
    stage.turn()
    while stage.work:
        key, work = next(iter(stage.work.items()))
        stage.succeed(key, 1 if work.task.endswith("look") else "done")


def _give_up(stage: Stage) -> None:
    stage.turn()
    for number in range(stage.info.input["n"]):
        stage.begin(f"tests.machine.steps.charge#{number}")
        stage.succeed(f"tests.machine.steps.look#{number}", 1)
    for role in ("do", "undo"):
        for key in list(stage.work):
            assert stage.work[key].role == role
            stage.succeed(key, "done")


def _catch_up(stage: Stage) -> None:
    _work_off(stage)
    stage.rows = stage.rows[:-1]
    stage.reload()
    stage.turn()


def _calls(drive: Callable[[Stage], None], stage: Stage) -> int:
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        drive(stage)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    ("drive", "shape"),
    [
        (_work_off, one_by_one),
        (_work_off, all_at_once),
        (_work_off, many_effects),
        (_give_up, many_given_up),
        (_catch_up, one_by_one),
        (_catch_up, all_at_once),
    ],
)
def test_twice_the_steps_cost_twice_as_much(drive: Callable[[Stage], None], shape: saga.Saga[Any, Any]) -> None:
    _calls(drive, Stage(shape, 5))  # whatever is built at first use is built
    short, long = (_calls(drive, Stage(shape, n)) for n in (60, 240))
    assert long < 4.4 * short
