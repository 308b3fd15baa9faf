"""A run of n steps costs O(n): counted in function calls, which no busy machine changes."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import saga
from tests.machine.stage import Stage
from tests.machine.steps import charge, look, reserve

ROOT = Path(__file__).parents[2]


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
    """In a process of its own: CPython 3.11 was seen to spin under a profile function late in a long session."""
    names = f"t.{drive.__name__}, t.{shape.name.rpartition('.')[2]}"
    code = f"from tests.machine import test_cost as t; print(*t.costs({names}))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=True
    )
    short, long = map(int, ran.stdout.split())
    assert short > 0 and long < 4.4 * short


def costs(drive: Callable[[Stage], None], shape: saga.Saga[Any, Any]) -> tuple[int, ...]:
    """Return the calls that 60 and 240 steps take."""
    _calls(drive, Stage(shape, 5))  # whatever is built at first use is built
    return tuple(_calls(drive, Stage(shape, n)) for n in (60, 240))


def test_who_holds_many_runs_tells_their_tasks_apart() -> None:
    """asyncio keeps one set of all tasks, in which those with the same hash are compared with each other."""
    stages = [Stage(all_at_once, 1, run_id=f"run-{number % 300}") for number in range(301)]
    for stage in stages:
        stage.turn()
    *hashes, again = [hash(task) for stage in stages for task in stage.execution.code.loop.pending_tasks()]
    assert len(set(hashes)) == 300
    assert again == hashes[0], "every process keeps the sets of a run in the same order"


@pytest.mark.parametrize("shape", [one_by_one, all_at_once, many_effects])
def test_what_a_run_took_is_free_when_its_code_has_ended(shape: saga.Saga[Any, Any]) -> None:
    """And not only when garbage is collected, until when a busy child would hold a hundred runs that are over."""
    gc.disable()
    try:
        stage = Stage(shape, 3)
        stage.turn()
        code = weakref.ref(stage.execution.code)
        assert code() is not None
        while stage.work:
            stage.succeed(next(iter(stage.work)), 1 if shape is not many_effects else "done")
        assert code() is None
    finally:
        gc.enable()
