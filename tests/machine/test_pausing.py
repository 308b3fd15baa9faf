"""Paused: saga code is left alone, everything else goes on; each who holds a run lets it go for itself."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from orchestrator import saga
from orchestrator.machine.journal import Cancel, Conclude, Operate, Operated, Signal, Terminate
from tests.machine.stage import T0, Stage
from tests.machine.steps import charge, look, reserve

PAUSE, RESUME = Operate("pause", by="ann", reason="the bank is closed"), Operate("resume", by="ann")
WITH_THE_SAGA = Operate("pause", by="bob", cause="saga")


@saga.define
async def two_steps(n: int) -> str:
    await saga.step(reserve, n)
    return await saga.step(charge, n)


@saga.define
async def not_awaited(n: int) -> str:
    saga.step(look, n)
    return "returned"


@saga.define
async def sleepy(n: int) -> str:
    await asyncio.sleep(60)
    return "rested"


@pytest.fixture
def paused() -> Stage:
    """A run that was paused while its first step ran."""
    stage = Stage(two_steps, 1)
    stage.turn()
    stage.begin("reserve")
    stage.turn(PAUSE)
    return stage


def test_what_runs_is_recorded_and_nothing_new_is_asked_for_until_it_is_resumed(paused: Stage) -> None:
    paused.succeed("reserve", "hold")
    assert (paused.state, paused.due) == ("paused", [])
    paused.reload()
    paused.turn(RESUME)
    assert (paused.state, paused.due) == ("running", [("charge", "do")])
    paused.succeed("charge", "c")
    assert paused.state == "completed"


def test_who_paused_it_and_why_is_known(paused: Stage) -> None:
    assert paused.execution.fold.pauses == {"": Operated("pause", "", "ann", "the bank is closed")}


def test_a_retry_of_a_step_goes_on_while_its_run_is_paused(paused: Stage) -> None:
    paused.doubt("reserve")
    assert (paused.state, paused.due) == ("paused", [("reserve", "do")])


def test_pausing_twice_and_resuming_twice_is_doing_it_once(paused: Stage) -> None:
    before = len(paused.tags())
    paused.turn(Operate("pause", by="bob"))
    assert len(paused.tags()) == before
    paused.turn(RESUME)
    paused.turn(RESUME)
    assert paused.tags().count("operator") == 2
    assert paused.state == "running"


def test_each_who_holds_it_lets_it_go_for_itself(paused: Stage) -> None:
    paused.turn(WITH_THE_SAGA)
    paused.turn(Operate("resume", cause="saga"))
    assert paused.state == "paused"
    paused.turn(RESUME)
    assert paused.state == "running"


def test_a_paused_run_can_be_cancelled(paused: Stage) -> None:
    paused.succeed("reserve", "hold")
    paused.turn(Cancel("ann"))
    assert (paused.state, paused.due) == ("compensating", [("release", "undo")])
    paused.succeed("release")
    assert paused.state == "cancelled"


def test_a_paused_run_can_be_terminated(paused: Stage) -> None:
    paused.turn(Terminate("ann"))
    assert paused.state == "terminated"


def test_what_goes_back_is_not_held_up(paused: Stage) -> None:
    paused.succeed("reserve", "hold")
    paused.turn(Cancel("ann"))
    paused.turn(WITH_THE_SAGA)
    assert paused.tags().count("operator") == 1
    paused.succeed("release")
    assert paused.state == "cancelled"


def test_a_child_that_is_done_is_not_held_up_by_a_pause_that_crosses_its_report() -> None:
    stage = Stage(two_steps, 1, run_id="r/two#0")
    stage.info = replace(stage.info, parent="r")
    stage.reload()
    stage.turn()
    stage.succeed("reserve", "hold")
    stage.succeed("charge", "c")
    stage.turn(PAUSE)
    stage.turn(Conclude())
    assert stage.state == "completed"


@saga.define
async def parent_of_a_sleeper(n: int) -> str:
    return await saga.child(sleepy, n)


def test_a_child_whose_own_saga_is_paused_is_not_let_go_with_its_parent() -> None:
    parent = Stage(parent_of_a_sleeper, 1)
    (new,) = parent.turn().children
    child = Stage(sleepy, 1, run_id=new.id)
    child.turn()
    child.turn(*(post.arrival for post in parent.turn(WITH_THE_SAGA).posts))
    child.turn(WITH_THE_SAGA)
    child.turn(*(post.arrival for post in parent.turn(replace(WITH_THE_SAGA, action="resume")).posts))
    assert (parent.state, child.state) == ("running", "paused")
    child.turn(replace(WITH_THE_SAGA, action="resume"))
    assert child.state == "running"


def test_a_run_that_has_returned_completes_when_it_is_resumed() -> None:
    stage = Stage(not_awaited, 1)
    stage.turn()
    stage.begin("look")
    stage.turn(PAUSE)
    stage.succeed("look", 1)
    assert stage.state == "paused"
    stage.turn(RESUME)
    assert stage.state == "completed"


def test_a_run_may_end_in_the_turn_that_resumes_it(paused: Stage) -> None:
    paused.turn(RESUME)
    paused.succeed("reserve", "hold")
    paused.begin("charge")
    paused.turn(PAUSE)
    paused.succeed("charge", "c")
    assert paused.state == "paused"
    paused.turn(RESUME)
    assert paused.state == "completed"


def test_a_timer_that_was_due_meanwhile_fires_when_it_is_resumed() -> None:
    stage = Stage(sleepy, 1)
    stage.turn()
    assert stage.turn(PAUSE, at_s=1).wake is None
    assert stage.turn(at_s=100).state == "paused"
    assert stage.turn(RESUME, at_s=200).state == "completed"


def test_a_run_whose_start_is_set_for_later_stays_so_when_it_is_paused_and_resumed() -> None:
    stage = Stage(two_steps, 1)
    stage.turn(PAUSE, at_s=-60)
    assert stage.state == "paused"
    turn = stage.turn(RESUME, at_s=-30)
    assert (stage.state, stage.due, turn.wake) == ("pending", [], T0)
    stage.reload()
    stage.turn(at_s=0)
    assert stage.due == [("reserve", "do")]


def test_a_run_that_is_told_something_before_its_start_is_pending_until_then() -> None:
    stage = Stage(two_steps, 1)
    assert stage.turn(Signal("news", "n1", "good"), at_s=-60).state == "pending"
    stage.reload()
    assert stage.turn(PAUSE, RESUME, at_s=-30).state == "pending"
    stage.reload()
    assert stage.turn(at_s=0).state == "running"


@pytest.mark.parametrize(("order", "ends"), [(Cancel("ann"), "cancelled"), (Terminate("ann"), "terminated")])
def test_a_run_may_end_before_its_start(order: Cancel | Terminate, ends: str) -> None:
    stage = Stage(two_steps, 1)
    stage.turn(PAUSE, RESUME, at_s=-60)
    assert stage.turn(order, at_s=-30).state == ends


def test_a_deadline_holds_while_a_run_is_paused() -> None:
    stage = Stage(two_steps, 1, deadline_s=60)
    stage.turn()
    assert stage.turn(PAUSE).wake == T0 + timedelta(seconds=60)
    stage.succeed("reserve", "hold")
    stage.turn(at_s=60)
    assert stage.due == [("release", "undo")]
