"""Blocks of saga code in the machine alone: scopes that are being undone, locks that are waited for."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta

import pytest

from orchestrator import saga
from orchestrator.errors import StepFailed
from orchestrator.machine.journal import AttemptEnded, LateSuccess, Operate, Parked
from orchestrator.machine.turn import CodeError
from tests.machine.stage import Stage
from tests.machine.steps import careful, charge, look, mail, reserve, settle


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


@saga.define
async def late_inside(n: int) -> str:
    async with saga.lock("account", n):
        try:
            async with asyncio.timeout(10):
                await saga.step(charge, n)
        except TimeoutError:
            pass
    await saga.step(look, n)
    return "late"


@saga.define
async def late_outside(n: int) -> str:
    try:
        async with asyncio.timeout(10), saga.lock("account", n):
            await saga.step(charge, n)
    except TimeoutError:
        await saga.step(look, n)
    return "late"


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("definition", [late_inside, late_outside])
def test_a_lock_is_kept_until_what_was_given_up_under_it_is_undone(
    definition: saga.Saga[[int], str], replayed: bool
) -> None:
    stage = Stage(definition, 7)
    (lock,) = stage.turn().locks
    stage.turn(AttemptEnded(lock.key, "do", 1, "succeeded"), at_s=1)
    stage.begin("charge")
    turns = [stage.turn(at_s=12)]
    for step, result in (("charge", "c"), ("refund", None), ("look", 1)):
        if replayed:
            stage.reload()
        turns.append(stage.succeed(step, result))
    assert [turn.unlocks for turn in turns] == [[], [], [lock.key], []]
    assert (stage.state, _output(stage)) == ("completed", "late")


@pytest.mark.parametrize("replayed", [False, True])
def test_a_lock_is_kept_until_the_late_effect_of_what_was_given_up_under_it_is_undone(replayed: bool) -> None:
    stage = Stage(late_inside, 7)
    (lock,) = stage.turn().locks
    stage.turn(AttemptEnded(lock.key, "do", 1, "succeeded"), at_s=1)
    key = stage.begin("charge").key
    stage.turn(at_s=12)
    stage.doubt(key)
    stage.turn(LateSuccess(key, "do", 1, "c"))
    turns = []
    for _ in range(2):
        if replayed:
            stage.reload()
        turns.append(stage.succeed("refund"))
    assert [turn.unlocks for turn in turns] == [[], [lock.key]]


def test_a_lock_is_kept_until_a_step_that_had_not_begun_is_withdrawn() -> None:
    stage = Stage(late_outside, 7)
    (lock,) = stage.turn().locks
    stage.turn(AttemptEnded(lock.key, "do", 1, "succeeded"), at_s=1)
    assert stage.turn(at_s=12).unlocks == [lock.key]
    assert stage.due == [("look", "do")]


@saga.define
async def one_account_after_the_other(n: int) -> None:
    with contextlib.suppress(StepFailed):
        async with saga.lock("account", n):
            await saga.step(look, n)
    saga.continue_as_new(n + 1)


@pytest.mark.parametrize("verdict", ["succeeded", "rejected"])
def test_a_lock_whose_block_was_left_does_not_go_along_with_a_run_that_is_continued_as_new(verdict: str) -> None:
    stage = Stage(one_account_after_the_other, 7)
    (lock,) = stage.turn().locks
    stage.turn(AttemptEnded(lock.key, "do", 1, "succeeded"))
    turn = stage.turn(stage.end("look", verdict, 7))
    assert (stage.state, turn.unlocks, turn.seed) == ("continued", [lock.key], [])


# -- scopes ------------------------------------------------------------------------------------------------------------
@saga.define
async def in_a_hurry(n: int) -> str:
    try:
        async with asyncio.timeout(60), saga.scope():
            await saga.step(reserve, n)
            await saga.step(charge, n)
            await saga.step(look, n)
    except TimeoutError:
        return "too late"
    except StepFailed:
        return "failed"
    return "done"


@saga.define
async def beside_one_that_fails(n: int) -> str:
    async def in_a_scope() -> None:
        async with saga.scope():
            await saga.step(reserve, n)
            await saga.step(charge, n)
            await saga.step(look, n)

    async def fails() -> None:
        await saga.step(mail, n)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(in_a_scope())
            group.create_task(fails())
    except* StepFailed:
        pass
    return "went on"


def _undoing(definition: saga.Saga[[int], str]) -> Stage:
    """A run whose scope is being undone, the charge first."""
    stage = Stage(definition, 1)
    stage.turn()
    stage.succeed("reserve", "h")
    stage.succeed("charge", "c")
    stage.reject("look")
    assert ("refund", "undo") in stage.due
    return stage


@pytest.mark.parametrize("replayed", [False, True])
def test_a_timeout_while_a_scope_is_being_undone_comes_after_the_last_undo(replayed: bool) -> None:
    stage = _undoing(in_a_hurry)
    stage.turn(at_s=61)
    if replayed:
        stage.reload()
    stage.succeed("refund")
    assert (stage.state, stage.due) == ("running", [("release", "undo")])
    stage.succeed("release")
    assert (stage.state, _output(stage), stage.left) == ("completed", "too late", [])


@pytest.mark.parametrize("replayed", [False, True])
def test_a_sibling_that_fails_while_a_scope_is_being_undone_lets_it_be_undone(replayed: bool) -> None:
    stage = _undoing(beside_one_that_fails)
    stage.reject("mail")
    if replayed:
        stage.reload()
    stage.succeed("refund")
    assert (stage.state, stage.due) == ("running", [("release", "undo")])
    stage.succeed("release")
    assert (stage.state, _output(stage)) == ("completed", "went on")


def test_a_function_that_returns_while_a_scope_beside_it_is_being_undone_waits_for_that() -> None:
    @saga.define(name="returns beside a scope")
    async def returns(n: int) -> str:
        async def in_a_scope() -> None:
            async with saga.scope():
                await saga.step(reserve, n)
                await saga.step(charge, n)
                await saga.step(look, n)

        task = asyncio.create_task(in_a_scope())
        await saga.step(mail, n)
        return f"not done: {not task.done()}"

    stage = _undoing(returns)
    stage.succeed("mail", "sent")
    stage.succeed("refund")
    assert (stage.state, stage.due) == ("running", [("release", "undo")])
    stage.succeed("release")
    assert (stage.state, _output(stage)) == ("completed", "not done: True")


def test_a_scope_that_is_being_undone_is_undone_although_its_run_is_resolved_by_hand() -> None:
    @saga.define(name="breaks beside a scope")
    async def breaks(n: int) -> str:
        async def in_a_scope() -> None:
            async with saga.scope():
                await saga.step(reserve, n)
                await saga.step(charge, n)
                await saga.step(look, n)

        task = asyncio.create_task(in_a_scope())
        await saga.step(mail, n)
        raise KeyError(task)

    stage = _undoing(breaks)
    sent = stage.end("mail", "succeeded", "sent")
    with pytest.raises(CodeError):
        stage.turn(sent)
    stage.reload()
    stage.turn(sent, park=Parked("", "code", "mistake"))
    stage.turn(Operate("resolve", by="ann", value="by hand"))
    stage.succeed("refund")
    assert (stage.state, stage.due) == ("running", [("release", "undo")])
    stage.succeed("release")
    assert (stage.state, _output(stage)) == ("completed", "by hand")


def test_an_effect_in_a_scope_whose_undo_a_person_skips_is_left() -> None:
    stage = _undoing(in_a_hurry)
    key = stage.key("refund")
    stage.reject("refund")
    assert (stage.state, stage.due) == ("parked", [])
    stage.turn(Operate("skip", key, "ann", "written off"))
    stage.succeed("release")
    assert (stage.state, _output(stage), stage.left) == ("completed", "failed", [("charge#0", "succeeded")])


@saga.define
async def careful_in_a_scope(n: int) -> str:
    try:
        async with saga.scope():
            await asyncio.gather(saga.step(careful, n), saga.step(look, n))
    except StepFailed:
        return "failed"
    return "done"


@pytest.mark.parametrize("first", ["careful", "look"])
def test_a_step_that_parked_in_a_scope_that_is_being_undone_is_tried_again_when_a_person_says_so(first: str) -> None:
    stage = Stage(careful_in_a_scope, 1)
    stage.turn()
    key = stage.begin("careful").key
    if first == "careful":
        stage.doubt_until_given_up("careful")
        stage.reject("look")
    else:
        stage.reject("look")
        stage.doubt("careful")
    assert (stage.state, stage.due) == ("parked", [])
    stage.turn(Operate("retry", key, "ann"))
    assert (stage.state, stage.due) == ("running", [("careful", "do")])
    stage.succeed("careful", "x")
    stage.succeed("release")
    assert (stage.state, _output(stage)) == ("completed", "failed")


def test_a_scope_in_which_the_pivot_has_passed_does_not_keep_its_run_from_being_resolved() -> None:
    @saga.define(name="settles in a scope")
    async def settles(n: int) -> None:
        async with saga.scope():
            await saga.step(settle, n)
            raise ValueError("after all")

    stage = Stage(settles, 1)
    stage.turn()
    stage.succeed("settle", "s")
    assert stage.state == "parked"
    stage.turn(Operate("resolve", by="ann", value="by hand"))
    assert (stage.state, _output(stage)) == ("completed", "by hand")


@saga.define
async def gathered(n: int) -> str:
    async def looks_and_charges() -> str:
        await saga.step(look, n)
        try:
            await saga.step(charge, n)
        except StepFailed:
            return "given up"
        return "charged"

    beside: list[asyncio.Task[str]] = []
    try:
        async with saga.scope():
            await saga.step(reserve, n)
            beside.append(asyncio.create_task(looks_and_charges()))
            await asyncio.gather(saga.step(mail, n), *beside)
    except StepFailed:
        pass
    return await beside[0]


@pytest.mark.parametrize("first", ["mail", "look"])
def test_what_a_branch_asks_for_in_the_turn_in_which_its_scope_is_left_keeps_nobody_waiting(first: str) -> None:
    stage = Stage(gathered, 1)
    stage.turn()
    stage.succeed("reserve", "h")
    ended = [stage.end("mail", "rejected"), stage.end("look", "succeeded", 1)]
    stage.turn(*(ended if first == "mail" else ended[::-1]))
    assert (stage.state, stage.due) == ("running", [("release", "undo")])
    stage.succeed("release")
    assert (stage.state, _output(stage)) == ("completed", "given up")


@pytest.mark.parametrize("replayed", [False, True])
def test_what_a_branch_asks_for_in_a_scope_that_is_being_undone_is_refused_to_it(replayed: bool) -> None:
    stage = Stage(gathered, 1)
    stage.turn()
    stage.succeed("reserve", "h")
    stage.begin("look")
    stage.reject("mail")
    stage.succeed("look", 1)
    if replayed:
        stage.reload()
    stage.succeed("release")
    assert (stage.state, _output(stage)) == ("completed", "given up")


@saga.define
async def scopes_beside(n: int) -> str:
    async def in_a_scope_of_its_own() -> None:
        async with saga.scope():
            await saga.step(look, n)
            raise ValueError("me too")

    try:
        async with saga.scope():
            await saga.step(reserve, n)
            await asyncio.gather(saga.step(mail, n), in_a_scope_of_its_own())
    except StepFailed:
        return "failed"
    return "done"


def test_a_scope_that_is_left_within_one_that_is_being_undone_is_undone_with_it() -> None:
    stage = Stage(scopes_beside, 1)
    stage.turn()
    stage.succeed("reserve", "h")
    stage.begin("look")
    stage.reject("mail")
    stage.succeed("look", 1)
    assert (stage.state, stage.due) == ("running", [("release", "undo")])
    stage.succeed("release")
    assert (stage.state, _output(stage)) == ("completed", "failed")
