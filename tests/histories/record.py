"""Records the histories next to this file: ``python -m tests.histories.record`` on each supported Python.

A recorded history is a promise to the runs of users: never record one anew to make a test pass.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from orchestrator import saga, testing
from orchestrator.errors import Rejected, StepFailed
from tests.machine.chaos import World, cancel_at
from tests.machine.steps import charge, look, mail, reserve, settle, wire

DIRECTORY = Path(__file__).parent


@saga.define(name="histories.shop")
async def shop(n: int) -> list[Any]:
    """Use a bit of everything."""
    hold = await saga.step(reserve, n)
    rate = await saga.once("rate", lambda: 1.25)
    async with asyncio.TaskGroup() as group:
        looks = [group.create_task(_look(i)) for i in range(3)]
    await asyncio.wait_for(_look(n), 30)
    if saga.version("second look", 1, 2) == 2:
        await asyncio.gather(_look(n), saga.step(look, 8))
    await saga.sleep(timedelta(hours=1))
    try:
        async with asyncio.timeout(5):
            await saga.step(charge, n)
    except (TimeoutError, StepFailed) as error:
        return [hold, rate, type(error).__name__, str(saga.uuid4()), saga.random()]
    done, _ = await saga.wait([_look(i) for i in range(2)])
    await saga.step(mail.with_options(key="courtesy"), n)
    return [hold, rate, *(task.result() for task in [*looks, *done]), str(saga.now())]


async def _look(n: int) -> int:
    first = await saga.step(look, n)
    return first + await saga.step(look, n)


@saga.define(name="histories.payment")
async def payment(n: int) -> str:
    """Pass a point of no return."""
    await saga.step(wire, n)
    settled = await saga.step(settle, n)
    async for told in saga.as_completed([saga.step(mail, 1), saga.step(mail, 2)]):
        told.result()
    return settled


def _late(*, seconds: int) -> testing.After:
    return testing.After(timedelta(seconds=seconds), "late")


def _played(program: list[Any], seed: int, cancel: int | None = None) -> dict[str, Any]:
    world = World(program, seed, replays=True)
    cancel_at(world, cancel)
    world.play_out()
    return dict(world.history())


def _hurried() -> dict[str, Any]:
    """Fail, give up and wait in one instant: the order is the interpreter's, and has to be the same."""
    failing = ["tolerant", ["first", [["tolerant", ["group", [["fail"], ["fail"]]]], ["wait_for", 6, ["fail"]]]]]
    starting = ["first", [["fail"], ["step", "reserve", 3], ["first", [["fail"], ["step", "capture", 0]]]]]
    waiting = ["wait_for", 0, ["wait_for", 4, ["fail"]]]
    late = ["tolerant", ["first", [starting, ["wait_for", 6, ["step", "look", 1]], waiting]]]
    return _played(["tolerant", ["group", [failing, ["wait_for", 9, ["step", "wire", 1]], late]]], 774)


def _world(seed: int, cancel: int | None = None) -> dict[str, Any]:
    branch = ["sequence", [["step", "reserve", 1], ["tolerant", ["step", "charge", 2]], ["sleep", 3]]]
    program = [
        "sequence",
        [
            ["group", [branch, ["step", "wire", 1], ["timeout", 6, branch]]],
            ["first", [branch, ["wait_for", 4, branch], ["wait_for", 0, branch]]],
            ["gather", [["fickle", "reserve", 3, 2], ["background", "look", 1, 1], branch]],
        ],
    ]
    return _played(program, seed, cancel)


def _shop(**options: Any) -> dict[str, Any]:
    return dict(testing.run(shop, 7, **options).history)


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "shop-completed": _shop,
    "shop-charge-too-late": lambda: _shop(stubs={charge: _late(seconds=9)}),
    "shop-charge-in-doubt": lambda: _shop(stubs={charge: TimeoutError("no answer")}),
    "shop-look-rejected": lambda: _shop(stubs={look: [1, 2, 3, Rejected("no")]}),
    "shop-cancelled": lambda: _shop(cancel_at=timedelta(minutes=30)),
    "payment-completed": lambda: dict(testing.run(payment, 1).history),
    "payment-parked": lambda: dict(testing.run(payment, 1, stubs={settle: TimeoutError("who knows")}).history),
    **{f"chaos-{seed}": (lambda seed=seed: _world(seed)) for seed in range(1, 7)},  # type: ignore[misc]
    "chaos-hurried": _hurried,
    "chaos-cancelled": lambda: _world(7, cancel=9),
}


def without_tracebacks(value: Any) -> Any:
    """Return JSON without the texts that name files and lines."""
    if isinstance(value, dict):
        return {key: without_tracebacks(item) for key, item in value.items() if key != "traceback"}
    return [without_tracebacks(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Record every case that this Python has not recorded yet."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name, case in CASES.items():
        path = DIRECTORY / f"{name}-{python}.json"
        if not path.exists():
            path.write_text(json.dumps(without_tracebacks(case()), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
