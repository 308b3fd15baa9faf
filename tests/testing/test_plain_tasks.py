"""Plain Celery tasks in a rehearsal and in an environment: called, retried and undone with as by a worker."""

from __future__ import annotations

from typing import Any

import pytest
from celery import shared_task
from celery.exceptions import Ignore, Reject

from orchestrator import Rejected, StepFailed, saga, step, testing
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


@shared_task(name="plainly.ignore")
def ignore() -> None:
    raise Ignore


@shared_task(name="plainly.mail", ignore_result=True)
def mail() -> object:
    return object()


@shared_task(name="plainly.reject")
def reject() -> None:
    raise Reject("not wanted", requeue=False)


@shared_task(name="plainly.again", bind=True)
def again(self: Any, succeed_at: int) -> list[Any]:
    if self.request.retries + 1 < succeed_at:
        raise self.retry(exc=ConnectionError("not yet"), countdown=1)
    return [self.request.id, self.request.root_id, self.request.retries]


@shared_task(name="plainly.again_without_a_reason", bind=True)
def again_without_a_reason(self: Any) -> None:
    raise self.retry(countdown=1)


@saga.define(name="plainly.run")
async def one(task: str, args: list[Any]) -> Any:
    try:
        return await saga.step({"task": task, "args": args})
    except StepFailed as failure:
        return [failure.outcome, failure.error["message"]]


@saga.define(name="plainly.undone")
async def undone(n: int) -> None:
    await saga.step(take, {"n": n})
    await saga.step(refuse)


@pytest.fixture(autouse=True)
def said() -> list[Any]:
    SAID.clear()
    return SAID


# -- as a step ---------------------------------------------------------------------------------------------------------
def test_a_task_that_is_ignored_has_succeeded_with_none() -> None:
    run = testing.run(one, ignore.name, [])
    assert (run.state, run.output, len(run.calls)) == ("completed", None, 1)


def test_a_task_whose_result_nobody_wants_need_not_return_what_can_be_stored() -> None:
    run = testing.run(one, mail.name, [])
    assert (run.state, run.output, len(run.calls)) == ("completed", None, 1)


def test_a_task_that_rejects_is_rejected_and_not_tried_again() -> None:
    run = testing.run(one, reject.name, [])
    assert (run.output, len(run.calls)) == (["rejected", "not wanted"], 1)


def test_a_bound_task_sees_its_request_and_may_ask_for_another_attempt() -> None:
    run = testing.run(one, again.name, [3], task_id="r")
    assert (run.output, len(run.calls)) == (["r:plainly.again#0", "r", 2], 3)
    assert isinstance(run.calls[0].error, ConnectionError)


def test_a_task_that_retries_too_often_fails_with_its_own_error() -> None:
    run = testing.run(one, again.name, [99])
    assert (run.output, len(run.calls)) == (["unknown", "not yet"], 5)


def test_a_task_that_retries_without_a_reason_is_in_doubt() -> None:
    run = testing.run(one, again_without_a_reason.name, [])
    assert run.output[0] == "unknown" and len(run.calls) == 5


def test_plain_tasks_behave_so_in_an_environment_as_well(saga_environment: Environment) -> None:
    env = saga_environment
    assert env.run(one, ignore.name, []).get() is None
    assert env.run(one, reject.name, []).get() == ["rejected", "not wanted"]
    run = env.run(one, again.name, [3], task_id="r")
    assert (run.get(), len(run.calls)) == (["r:plainly.again#0", "r", 2], 3)


# -- as an undo --------------------------------------------------------------------------------------------------------
def test_a_plain_task_undoes_with_the_parameters_of_the_step_and_its_result(said: list[Any]) -> None:
    run = testing.run(undone, 7)
    assert run.state == "compensated"
    assert said == [({"n": 7}, "took 7")]


def test_a_plain_task_undoes_in_an_environment_as_well(saga_environment: Environment, said: list[Any]) -> None:
    assert saga_environment.run(undone, 7).state == "compensated"
    assert said == [({"n": 7}, "took 7")]
