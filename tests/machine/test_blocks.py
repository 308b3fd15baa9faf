"""Blocks of saga code in the machine alone: scopes that are being undone, locks that are waited for."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from orchestrator import saga
from orchestrator.errors import StepFailed
from orchestrator.machine.journal import AttemptEnded
from tests.machine.stage import Stage
from tests.machine.steps import charge, look, mail, reserve


# -- locks -------------------------------------------------------------------------------------------------------------
@saga.define
async def impatient(n: int) -> str:
    try:
        async with saga.lock("account", n, timeout=timedelta(seconds=5)):
            await saga.step(look, n)
            return "got it"
    except TimeoutError:
        await saga.step(look, n)
        return "gave up"


def _output(stage: Stage) -> object:
    returned = stage.execution.fold.returned
    return returned and returned.output


@pytest.mark.parametrize("replayed", [False, True])
def test_who_gave_up_waiting_for_a_lock_gives_up_on_replay(replayed: bool) -> None:
    stage = Stage(impatient, 7)
    stage.turn()
    stage.turn(at_s=5)
    if replayed:
        stage.reload()
    stage.succeed("look", 1)
    assert (stage.state, _output(stage)) == ("completed", "gave up")


@pytest.mark.parametrize("replayed", [False, True])
def test_a_lock_that_comes_with_the_timeout_is_had_on_replay_too(replayed: bool) -> None:
    stage = Stage(impatient, 7)
    (lock,) = stage.turn().locks
    stage.turn(AttemptEnded(lock.key, "do", 1, "succeeded"), at_s=5)
    if replayed:
        stage.reload()
    stage.succeed("look", 1)
    assert (stage.state, _output(stage)) == ("completed", "got it")
