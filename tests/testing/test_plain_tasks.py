"""Plain Celery tasks in a rehearsal and in an environment: called, retried and undone with as by a worker."""

from __future__ import annotations

from typing import Any

import pytest
from celery import shared_task

from orchestrator import Rejected, saga, step, testing
from orchestrator.testing import Environment

SAID: list[Any] = []


@shared_task(name="plainly.give_back")
def give_back(order: dict[str, int], result: str | None) -> None:
    SAID.append((order, result))


@step(name="plainly.take", compensate=give_back)
def take(order: dict[str, int]) -> str:
    return f"took {order['n']}"


@step(name="plainly.refuse")
def refuse() -> None:
    raise Rejected("not today")


@saga.define(name="plainly.undone")
async def undone(n: int) -> None:
    await saga.step(take, {"n": n})
    await saga.step(refuse)


@pytest.fixture(autouse=True)
def said() -> list[Any]:
    SAID.clear()
    return SAID


# -- as an undo --------------------------------------------------------------------------------------------------------
def test_a_plain_task_undoes_with_the_parameters_of_the_step_and_its_result(said: list[Any]) -> None:
    run = testing.run(undone, 7)
    assert run.state == "compensated"
    assert said == [({"n": 7}, "took 7")]


def test_a_plain_task_undoes_in_an_environment_as_well(saga_environment: Environment, said: list[Any]) -> None:
    assert saga_environment.run(undone, 7).state == "compensated"
    assert said == [({"n": 7}, "took 7")]
