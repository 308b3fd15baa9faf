"""Parked: what cannot be decided waits for a person, visibly, and goes on as the person says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from orchestrator import saga
from orchestrator.errors import DriftError, StepFailed
from orchestrator.machine.journal import Cancel, Operate, Operated, Parked
from orchestrator.machine.turn import CodeError
from tests.machine.stage import Stage
from tests.machine.steps import careful, charge, look, reserve


@saga.define
async def two_effects(n: int) -> None:
    await saga.step(reserve, n)
    await saga.step(charge, n)
    raise ValueError("no")


@saga.define
async def one_careful(n: int) -> str:
    try:
        return await saga.step(careful, n)
    except StepFailed as error:
        return error.outcome


def _parked_at_the_refund() -> tuple[Stage, str]:
    stage = Stage(two_effects, 1)
    stage.turn()
    stage.succeed("reserve", "h")
    stage.succeed("charge", "c")
    key = stage.key("refund")
    stage.reject("refund")
    return stage, key


def _parked_at_careful() -> tuple[Stage, str]:
    stage = Stage(one_careful, 1)
    stage.turn()
    key = stage.key("careful")
    stage.doubt_until_given_up("careful")
    return stage, key


def test_a_rejected_undo_parks_the_run_and_the_next_undo_waits() -> None:
    stage, key = _parked_at_the_refund()
    assert (stage.state, stage.due) == ("parked", [])
    assert stage.execution.fold.parked_keys[key].why == "its undo was rejected"


def test_an_undo_that_keeps_failing_is_tried_for_a_day_and_then_parks() -> None:
    stage = Stage(two_effects, 1)
    stage.turn()
    stage.succeed("reserve", "h")
    stage.reject("charge")
    attempts = 0
    while stage.work:
        stage.doubt("release")
        attempts += 1
    assert (stage.state, attempts) == ("parked", 153)


def test_retrying_a_parked_undo_gives_it_a_fresh_budget() -> None:
    stage, key = _parked_at_the_refund()
    stage.turn(Operate("retry", key, "ann", "bank is up again"))
    assert (stage.state, stage.due) == ("compensating", [("refund", "undo")])
    stage.doubt("refund")
    stage.succeed("refund")
    stage.succeed("release")
    assert (stage.state, stage.left) == ("compensated", [])


def test_skipping_a_parked_undo_goes_on_and_leaves_its_effect_on_record() -> None:
    stage, key = _parked_at_the_refund()
    stage.turn(Operate("skip", key, "ann", "written off"))
    assert stage.due == [("release", "undo")]
    stage.succeed("release")
    assert (stage.state, stage.left) == ("failed", [("charge#0", "succeeded")])


def test_resolving_a_parked_undo_counts_as_undone() -> None:
    stage, key = _parked_at_the_refund()
    stage.turn(Operate("resolve", key, "ann", "refunded by hand"))
    stage.succeed("release")
    assert (stage.state, stage.left) == ("compensated", [])


def test_name_and_reason_of_the_operator_are_on_record() -> None:
    stage, key = _parked_at_the_refund()
    turn = stage.turn(Operate("skip", key, "ann", "written off"))
    assert turn.entries[0] == Operated("skip", key, "ann", "written off")


def test_an_operator_who_names_a_key_that_is_not_parked_changes_nothing() -> None:
    stage, _ = _parked_at_the_refund()
    turn = stage.turn(Operate("skip", "nonsense#0", "ann", "typo"))
    assert (turn.entries, stage.state) == ([], "parked")


def test_a_parked_do_is_tried_again() -> None:
    stage, key = _parked_at_careful()
    stage.turn(Operate("retry", key, "ann"))
    stage.succeed("careful", "ok")
    assert stage.state == "completed"


def test_a_parked_do_is_resolved_with_its_result() -> None:
    stage, key = _parked_at_careful()
    stage.turn(Operate("resolve", key, "ann", "found it", "from the statement"))
    fold = stage.execution.fold
    assert (stage.state, fold.returned and fold.returned.output) == ("completed", "from the statement")


def test_a_parked_do_is_resolved_as_without_effect() -> None:
    stage, key = _parked_at_careful()
    stage.turn(Operate("resolve", key, "ann", "not there", no_effect=True))
    fold = stage.execution.fold
    assert (stage.state, fold.returned and fold.returned.output) == ("completed", "rejected")


def test_a_skipped_do_stays_unknown_and_is_left() -> None:
    stage, key = _parked_at_careful()
    stage.turn(Operate("skip", key, "ann", "too small to care"))
    assert (stage.state, stage.left) == ("completed", [("careful#0", "unknown")])


def test_a_rollback_waits_for_a_parked_do_and_undoes_what_is_found() -> None:
    stage, key = _parked_at_careful()
    stage.turn(Cancel("bob"))
    assert (stage.state, stage.due) == ("parked", [])
    stage.turn(Operate("resolve", key, "ann", "found it", "x"))
    assert (stage.state, stage.due) == ("compensating", [("release", "undo")])
    stage.succeed("release")
    assert stage.state == "cancelled"


def test_a_parked_do_can_be_tried_again_while_the_run_rolls_back() -> None:
    stage, key = _parked_at_careful()
    stage.turn(Cancel("bob"))
    stage.turn(Operate("retry", key, "ann"))
    assert stage.due == [("careful", "do")]
    stage.succeed("careful", "x")
    assert stage.due == [("release", "undo")]


def test_a_run_that_rolls_back_does_not_try_a_step_in_doubt_again_by_itself() -> None:
    stage, key = _parked_at_careful()
    stage.turn(Cancel("bob"))
    stage.turn(Operate("retry", key, "ann"))
    stage.doubt("careful")
    assert (stage.state, stage.due) == ("parked", [])


def test_a_run_is_parked_only_when_nothing_of_it_is_in_flight() -> None:
    @saga.define(name="careful beside")
    async def careful_beside(n: int) -> None:
        await asyncio.gather(saga.step(careful, n), saga.step(look, n))

    stage = Stage(careful_beside, 1)
    stage.turn()
    stage.doubt_until_given_up("careful")
    assert stage.state == "running"
    stage.succeed("look", 1)
    assert stage.state == "parked"


# -- the run as a whole ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "mistake", [TypeError, NameError, AttributeError, ImportError, AssertionError, KeyError, IndexError]
)
def test_a_mistake_in_saga_code_is_a_code_error_and_not_a_rollback(mistake: type[Exception]) -> None:
    @saga.define(name="mistaken")
    async def mistaken(n: int) -> None:
        await saga.step(charge, n)
        raise mistake("oops")

    stage = Stage(mistaken, 1)
    stage.turn()
    with pytest.raises(CodeError, match="oops"):
        stage.succeed("charge", "c")


def test_a_saga_that_exits_does_not_take_the_worker_along() -> None:
    @saga.define(name="exits")
    async def exits(n: int) -> None:
        raise SystemExit(3)

    with pytest.raises(CodeError):
        Stage(exits, 1).turn()


def _runs() -> None:
    coroutine = asyncio.sleep(0)
    try:
        asyncio.run(coroutine)
    finally:
        coroutine.close()


def _runs_a_loop() -> None:
    loop, coroutine = asyncio.new_event_loop(), asyncio.sleep(0)
    try:
        loop.run_until_complete(coroutine)
    finally:
        coroutine.close()
        loop.close()


@pytest.mark.parametrize("misuse", [_runs, _runs_a_loop, lambda: asyncio.Lock().release()])
def test_what_asyncio_refuses_is_a_mistake_in_saga_code(misuse: Callable[[], object]) -> None:
    """It has no class of its own: a run was undone for it, though nothing had gone wrong but its code."""

    @saga.define(name="misuses")
    async def misuses(n: int) -> None:
        await saga.step(charge, n)
        misuse()

    stage = Stage(misuses, 1)
    stage.turn()
    with pytest.raises(CodeError):
        stage.succeed("charge", "c")


def test_a_runtime_error_of_ones_own_is_no_mistake_in_saga_code() -> None:
    @saga.define(name="raises itself")
    async def raises(n: int) -> None:
        await saga.step(charge, n)
        raise RuntimeError("no stock")

    stage = Stage(raises, 1)
    stage.turn()
    stage.succeed("charge", "c")
    assert stage.due == [("refund", "undo")]


def test_a_mistake_inside_a_task_group_is_a_code_error_too() -> None:
    @saga.define(name="mistaken group")
    async def mistaken_group(n: int) -> None:
        async def branch() -> None:
            raise KeyError("oops")

        async with asyncio.TaskGroup() as group:
            group.create_task(branch())

    with pytest.raises(CodeError):
        Stage(mistaken_group, 1).turn()


def test_a_saga_can_ask_for_mistakes_to_be_undone() -> None:
    @saga.define(name="strict", on_code_error="compensate")
    async def strict(n: int) -> None:
        await saga.step(charge, n)
        raise KeyError("oops")

    stage = Stage(strict, 1)
    stage.turn()
    stage.succeed("charge", "c")
    assert stage.due == [("refund", "undo")]


def _parked_by_code() -> Stage:
    @saga.define(name="parked by code")
    async def broken(n: int) -> None:
        await saga.step(charge, n)
        raise KeyError("oops")

    stage = Stage(broken, 1)
    stage.turn()
    outcome = stage.end("charge", "succeeded", "c")
    with pytest.raises(CodeError) as caught:
        stage.turn(outcome)
    stage.reload()
    stage.turn(outcome, park=Parked("", "code", "mistake", caught.value.error))
    return stage


def test_a_run_parked_by_a_code_error_keeps_the_outcome_that_arrived() -> None:
    stage = _parked_by_code()
    assert stage.state == "parked"
    assert stage.execution.fold.steps["tests.machine.steps.charge#0"].forward == "succeeded"


def test_a_run_parked_by_a_code_error_goes_on_with_mended_code() -> None:
    stage = _parked_by_code()

    @saga.define(name="parked by code")
    async def mended(n: int) -> str:
        return await saga.step(charge, n)

    stage.reload(mended)
    stage.turn(Operate("retry", by="ann", reason="deployed a fix"))
    assert stage.state == "completed"


def test_a_run_parked_by_a_code_error_can_go_on_as_new_at_once() -> None:
    stage = _parked_by_code()

    @saga.define(name="parked by code")
    async def mended(n: int) -> str:
        await saga.step(charge, n)
        saga.continue_as_new(n + 1)

    stage.reload(mended)
    stage.turn(Operate("retry", by="ann", reason="deployed a fix"))
    assert stage.state == "continued"


def test_a_parked_key_that_is_resolved_lets_its_run_go_on_as_new() -> None:
    @saga.define(name="careful and again")
    async def careful_and_again(n: int) -> None:
        await saga.step(careful, n)
        saga.continue_as_new(n + 1)

    stage = Stage(careful_and_again, 1)
    stage.turn()
    key = stage.key("careful")
    stage.doubt_until_given_up("careful")
    stage.turn(Operate("resolve", key, "ann", "found it", "from the statement"))
    assert stage.state == "continued"


def _parked_beside(other: Callable[[], Awaitable[Any]]) -> Stage:
    """A run that its code parks while it has asked for something else as well."""

    @saga.define(name="parked beside")
    async def beside(n: int) -> None:
        task = asyncio.create_task(other())
        await saga.step(charge, n)
        raise KeyError(str(task))

    stage = Stage(beside, 1)
    stage.turn()
    outcome = stage.end("charge", "succeeded", "c")
    with pytest.raises(CodeError) as caught:
        stage.turn(outcome)
    stage.reload()
    stage.turn(outcome, park=Parked("", "code", "mistake", caught.value.error))
    return stage


async def _told() -> None:
    await saga.wait_signal("never")


async def _reserved() -> None:
    await saga.step(reserve, 1)


async def _looked() -> None:
    await saga.step(look, 1)


def test_resolving_a_run_gives_up_what_it_waits_for() -> None:
    stage = _parked_beside(_told)
    assert stage.state == "parked"
    stage.turn(Operate("resolve", by="ann", value="by hand"))
    assert stage.state == "completed"


def test_resolving_a_run_waits_for_the_steps_that_are_under_way() -> None:
    stage = _parked_beside(_looked)
    stage.turn(Operate("resolve", by="ann", value="by hand"))
    assert stage.state == "running"
    stage.succeed("look", 1)
    fold = stage.execution.fold
    assert (stage.state, fold.returned and fold.returned.output) == ("completed", "by hand")


def test_a_step_that_is_rejected_after_its_run_was_resolved_does_not_undo_the_run() -> None:
    stage = _parked_beside(_reserved)
    stage.turn(Operate("resolve", by="ann", value="by hand"))
    stage.reject("reserve")
    fold = stage.execution.fold
    assert (stage.state, fold.returned and fold.returned.output, stage.due) == ("completed", "by hand", [])


def test_a_step_that_stays_in_doubt_after_its_run_was_resolved_is_undone_alone() -> None:
    stage = _parked_beside(_reserved)
    stage.turn(Operate("resolve", by="ann", value="by hand"))
    stage.doubt_until_given_up("reserve")
    assert stage.due == [("release", "undo")]
    stage.succeed("release")
    assert (stage.state, stage.due, stage.left) == ("completed", [], [])


def test_a_run_parked_by_a_code_error_can_be_cancelled_without_its_code() -> None:
    stage = _parked_by_code()
    stage.turn(Cancel("ann"))
    assert stage.due == [("refund", "undo")]
    stage.succeed("refund")
    assert stage.state == "cancelled"


def test_a_drifting_turn_raises_and_says_what_was_recorded() -> None:
    stage = Stage(two_effects, 1)
    stage.turn()

    @saga.define(name=two_effects.name)
    async def changed(n: int) -> None:
        await saga.step(charge, n)

    stage.reload(changed)
    with pytest.raises(DriftError, match=r"recorded and not asked for again: .*reserve#0"):
        stage.turn()
