"""Signals: kept when early, dropped when double, given in order, and given back when nobody waits any more."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from orchestrator import saga
from orchestrator.machine.journal import Cancel, Signal
from tests.machine.stage import Stage
from tests.machine.steps import charge, look, reserve


@dataclass
class Approval:
    by: str


@saga.define
async def approved(n: int) -> str:
    await saga.step(reserve, n)
    approval = await saga.wait_signal("approved", Approval)
    await saga.step(charge, n)
    return approval.by


@saga.define
async def patient(n: int) -> list[str]:
    heard = []
    for _ in range(n):
        try:
            heard.append(await saga.wait_signal("news", str, timeout=timedelta(seconds=10)))
        except TimeoutError:
            heard.append("nothing")
    return heard


@saga.define
async def hasty(seconds: float) -> list[str]:
    await saga.step(look, 1)
    heard = []
    try:
        while True:
            heard.append(await saga.wait_signal("news", str, timeout=seconds))
    except TimeoutError:
        await saga.step(look, 2)
        return heard


@saga.define
async def two_ears(n: int) -> list[str]:
    return await asyncio.gather(saga.wait_signal("news", str), saga.wait_signal("news", str))


@saga.define
async def two_patient_ears(n: int) -> list[str]:
    async def listen() -> str:
        try:
            return await saga.wait_signal("news", str, timeout=10)
        except TimeoutError:
            return "nothing"

    heard = await asyncio.gather(listen(), listen())
    return [*heard, await saga.wait_signal("news", str), await saga.wait_signal("news", str)]


@saga.define
async def first_come(n: int) -> list[str]:
    heard: list[str] = []

    async def listen(name: str) -> None:
        heard.append(f"{name} {await saga.wait_signal('news', str)}")

    one, other = asyncio.create_task(listen("one")), asyncio.create_task(listen("other"))
    await saga.step(look, n)
    one.cancel()
    await other
    return heard


def output(stage: Stage) -> Any:
    returned = stage.execution.fold.returned
    assert returned is not None
    return returned.output


def test_a_run_waits_until_it_is_told() -> None:
    stage = Stage(approved, 1)
    stage.turn()
    stage.succeed("reserve", "h")
    assert (stage.state, stage.due) == ("running", [])
    stage.turn(Signal("approved", "s1", {"by": "ann"}))
    assert stage.due == [("charge", "do")]
    stage.reload()
    stage.succeed("charge", "c")
    assert (stage.state, output(stage)) == ("completed", "ann")


def test_a_signal_that_comes_before_anybody_waits_is_kept() -> None:
    stage = Stage(approved, 1)
    stage.turn(Signal("approved", "s1", {"by": "ann"}))
    stage.succeed("reserve", "h")
    assert stage.due == [("charge", "do")]


def test_several_early_ones_are_heard_in_one_turn_and_replayed_alike() -> None:
    stage = Stage(patient, 3)
    stage.turn(*(Signal("news", f"s{n}", f"news {n}") for n in range(3)))
    assert (stage.state, output(stage)) == ("completed", ["news 0", "news 1", "news 2"])


def test_a_second_one_with_the_same_id_is_dropped() -> None:
    stage = Stage(patient, 2)
    stage.turn(Signal("news", "s1", "first"))
    stage.turn(Signal("news", "s1", "first"))
    assert stage.state == "running"
    stage.turn(Signal("news", "s2", "second"))
    assert output(stage) == ["first", "second"]


def test_a_wait_ends_at_its_timeout_and_the_next_one_hears_what_comes_later() -> None:
    stage = Stage(patient, 2)
    turn = stage.turn()
    assert turn.wake is not None
    stage.turn(at_s=10)
    stage.reload()
    stage.turn(Signal("news", "s1", "late"), at_s=11)
    assert output(stage) == ["nothing", "late"]


def test_a_signal_that_comes_with_the_timeout_is_left_for_the_next_wait() -> None:
    stage = Stage(patient, 2)
    stage.turn()
    stage.turn(Signal("news", "s1", "just late"), at_s=10)
    assert output(stage) == ["nothing", "just late"]
    again = stage.loaded()
    assert again.fold.state == "completed"


def test_two_that_come_with_the_timeouts_are_left_for_the_next_waits_in_the_order_in_which_they_came() -> None:
    stage = Stage(two_patient_ears, 1)
    stage.turn()
    stage.turn(Signal("news", "s1", "first"), Signal("news", "s2", "second"), at_s=10)
    assert output(stage) == ["nothing", "nothing", "first", "second"]
    again = stage.loaded()
    assert again.fold.state == "completed"


@pytest.mark.parametrize("seconds", [0, -1, 1e-9, 1e-6])
def test_signals_that_are_there_already_are_heard_by_who_does_not_wait(seconds: float) -> None:
    stage = Stage(hasty, seconds)
    stage.turn(Signal("news", "s1", "one"), Signal("news", "s2", "two"))
    stage.succeed("look", 1)
    stage.turn()
    stage.reload()
    stage.succeed("look", 2)
    assert (stage.state, output(stage)) == ("completed", ["one", "two"])


def test_two_who_wait_get_one_each_in_the_order_in_which_they_asked() -> None:
    stage = Stage(two_ears, 1)
    stage.turn()
    stage.turn(Signal("news", "s1", "first"))
    stage.reload()
    stage.turn(Signal("news", "s2", "second"))
    assert output(stage) == ["first", "second"]


def test_who_stopped_waiting_takes_nothing() -> None:
    stage = Stage(first_come, 1)
    stage.turn()
    stage.succeed("look", 1)
    stage.reload()
    stage.turn(Signal("news", "s1", "hello"))
    assert output(stage) == ["other hello"]


def test_a_payload_that_does_not_fit_is_passed_over() -> None:
    stage = Stage(approved, 1)
    stage.turn(Signal("approved", "s1", ["what?"]))
    stage.succeed("reserve", "h")
    assert (stage.state, stage.due) == ("running", [])
    stage.reload()
    stage.turn(Signal("approved", "s2", {"by": "bob"}))
    stage.succeed("charge", "c")
    assert output(stage) == "bob"


def test_a_run_that_waits_can_be_cancelled() -> None:
    stage = Stage(approved, 1)
    stage.turn()
    stage.succeed("reserve", "h")
    stage.turn(Cancel("ann"))
    assert stage.due == [("release", "undo")]
    stage.succeed("release")
    assert (stage.state, stage.left) == ("cancelled", [])


def test_a_signal_to_a_run_that_ended_changes_nothing() -> None:
    stage = Stage(patient, 0)
    stage.turn()
    turn = stage.turn(Signal("news", "s1", "hello"))
    assert (turn.entries, stage.state) == ([], "completed")
