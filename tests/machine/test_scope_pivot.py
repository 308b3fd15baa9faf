"""A scope that an exception leaves after the pivot: it cannot be undone, and a person has ways out."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator import saga
from orchestrator.errors import StepFailed
from orchestrator.machine.journal import Cancel, Operate, Terminate
from orchestrator.testing import replay
from tests.machine.stage import Stage
from tests.machine.steps import look, mail, settle

RETRY = Operate("retry", by="ann")


@saga.define
async def breaks(n: int) -> str:
    async with saga.scope():
        await saga.step(settle, n)
        raise ValueError("after all")


@saga.define
async def mended(n: int) -> str:
    async with saga.scope():
        await saga.step(settle, n)
    await saga.step(mail, n)
    return "mended"


@saga.define
async def breaks_beside(n: int) -> None:
    async def in_a_scope() -> None:
        async with saga.scope():
            await saga.step(settle, n)
            raise ValueError("after all")

    async def beside() -> None:
        await saga.step(look, n)
        await saga.step(look, n)

    await asyncio.gather(in_a_scope(), beside())


@saga.define
async def mended_beside(n: int) -> str:
    async def in_a_scope() -> None:
        async with saga.scope():
            await saga.step(settle, n)

    async def beside() -> None:
        await saga.step(look, n)
        await saga.step(look, n)

    await asyncio.gather(in_a_scope(), beside())
    return "mended"


@saga.define
async def fails_beside(n: int) -> str:
    async with saga.scope():
        await asyncio.gather(saga.step(settle, n), saga.step(look, n))
    return "done"


@saga.define
async def looked_after(n: int) -> str:
    async with saga.scope():
        settled, looked = await asyncio.gather(saga.step(settle, n), saga.step(look, n), return_exceptions=True)
    assert isinstance(looked, StepFailed)
    return str(settled)


@pytest.fixture
def parked() -> Stage:
    """A run that settled, and whose scope its code has left by a mistake after that."""
    stage = Stage(breaks, 1)
    stage.turn()
    stage.succeed("settle", "s")
    assert stage.state == "parked"
    return stage


def _output(stage: Stage) -> object:
    returned = stage.execution.fold.returned
    return returned and returned.output


def _history(stage: Stage) -> dict[str, object]:
    info = stage.info
    return {
        "saga": info.saga, "version": info.version, "id": info.id, "input": info.input, "deadline": None,
        "started": info.started.isoformat(), "journal": [[at.isoformat(), forms] for at, forms in stage.rows],
    }  # fmt: skip


def test_it_says_by_which_error_the_scope_was_left(parked: Stage) -> None:
    why = parked.execution.fold.parked
    assert why is not None and why.error is not None
    assert (why.error["type"], why.error["message"]) == ("ValueError", "after all")


@pytest.mark.parametrize("tries", [1, 2])
def test_mended_code_goes_on_when_it_is_tried_again(parked: Stage, tries: int) -> None:
    for _ in range(tries - 1):
        parked.turn(RETRY)
    parked.reload(mended)
    parked.turn(RETRY)
    assert (parked.state, parked.due) == ("running", [("mail", "do")])
    parked.reload(mended)
    parked.succeed("mail", "m")
    assert (parked.state, _output(parked)) == ("completed", "mended")
    replay(_history(parked), mended)


def test_code_that_is_not_mended_parks_again_and_says_so_again(parked: Stage) -> None:
    parked.turn(RETRY)
    parked.reload()
    parked.turn(RETRY)
    assert (parked.state, parked.tags().count("parked")) == ("parked", 3)
    replay(_history(parked), breaks)


def test_it_is_resolved_by_hand(parked: Stage) -> None:
    parked.turn(RETRY)
    parked.turn(Operate("resolve", by="ann", value="by hand"))
    assert (parked.state, _output(parked)) == ("completed", "by hand")


def test_it_is_terminated_and_what_is_left_is_said(parked: Stage) -> None:
    parked.turn(RETRY)
    parked.turn(Terminate("ann"))
    assert (parked.state, parked.left) == ("terminated", [("settle#0", "succeeded")])


def test_it_cannot_be_cancelled(parked: Stage) -> None:
    parked.turn(Cancel("ann"))
    assert (parked.state, parked.tags()[-1]) == ("parked", "cancel refused")


def test_a_branch_beside_the_scope_goes_on_with_mended_code() -> None:
    stage = Stage(breaks_beside, 1)
    stage.turn()
    stage.turn(stage.end("settle", "succeeded", "s"), stage.end("look", "succeeded", 1))
    assert stage.due == [("look", "do")]
    stage.succeed("look", 1)
    assert stage.state == "parked"
    stage.reload(mended_beside)
    stage.turn(RETRY)
    assert (stage.state, _output(stage)) == ("completed", "mended")


def test_mended_code_hears_of_a_pivot_that_was_given_up_with_its_scope() -> None:
    stage = Stage(fails_beside, 1)
    stage.turn()
    stage.begin("settle")
    stage.reject("look")
    stage.succeed("settle", "s")
    assert stage.state == "parked"
    stage.reload(looked_after)
    stage.turn(RETRY)
    assert (stage.state, _output(stage)) == ("completed", "s")


def test_a_run_that_a_release_before_has_parked_and_tried_again_has_the_same_ways_out(parked: Stage) -> None:
    """There the error was not said, and each retry parked it with the request as it was."""
    asked, why = parked.rows[-1][1][-2:]
    del asked["args"], why["error"]
    again = [{"e": "operator", "action": "retry", "by": "ann"}, dict(why)]
    parked.rows += [(parked.now, again), (parked.now, again)]
    parked.reload(mended)
    assert parked.state == "parked"
    parked.turn(RETRY)
    parked.succeed("mail", "m")
    assert (parked.state, _output(parked)) == ("completed", "mended")
