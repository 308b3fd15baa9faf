"""When saga code begins: with the first turn that runs it, whatever its run was told before that."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from orchestrator import saga
from orchestrator.machine.journal import Arrival, AttemptEnded, CodeBegan, Operate, Parked, Signal
from tests.machine.stage import T0, Stage
from tests.machine.steps import look

PAUSE, RESUME = Operate("pause"), Operate("resume")
NEWS = Signal("news", "n1", "good")


@saga.define
async def if_free(n: int) -> str:
    if n == 0:
        saga.continue_as_new(1)
    try:
        async with saga.lock("account", n, timeout=0):
            return "got it"
    except TimeoutError:
        return "gave up"


@saga.define
async def within_a_minute(n: int) -> str:
    begun = saga.now()
    try:
        async with asyncio.timeout(60):
            await saga.step(look, n)
    except TimeoutError:
        await saga.step(look, n)
    return f"begun {(begun - T0).total_seconds():.0f} s after the start"


def _output(stage: Stage) -> object:
    returned = stage.execution.fold.returned
    return returned and returned.output


def _grant(stage: Stage, *arrivals: Arrival, at_s: float) -> None:
    """Take the turn in which the lock is asked for, and grant it a little later."""
    (lock,) = stage.turn(*arrivals, at_s=at_s).locks
    stage.turn(AttemptEnded(lock.key, "do", 1, "succeeded"), at_s=at_s + 0.1)


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize(
    "told",
    [
        pytest.param([(NEWS, -60)], id="a signal before the start"),
        pytest.param([(PAUSE, -60), (RESUME, -30)], id="a pause and its end before the start"),
        pytest.param([(PAUSE, -60), (NEWS, 30)], id="a pause before the start, a signal after it"),
        pytest.param([(PAUSE, 0), (NEWS, 30)], id="a pause before the first turn"),
    ],
)
def test_a_lock_that_is_free_is_had_whatever_a_run_was_told_before(
    told: list[tuple[Arrival, float]], replayed: bool
) -> None:
    stage = Stage(if_free, 7)
    for arrival, at_s in told:
        stage.turn(arrival, at_s=at_s)
    if replayed:
        stage.reload()
    _grant(stage, *([RESUME] if stage.state == "paused" else []), at_s=90)
    assert (stage.state, _output(stage)) == ("completed", "got it")


@pytest.mark.parametrize("replayed", [False, True])
def test_a_timeout_counts_from_the_first_turn(replayed: bool) -> None:
    stage = Stage(within_a_minute, 7)
    stage.turn(NEWS, at_s=-10)
    assert stage.turn(at_s=100).wake == T0 + timedelta(seconds=160)
    if replayed:
        stage.reload()
    stage.turn(stage.end("look", "succeeded", 1), at_s=159)
    assert (stage.state, _output(stage)) == ("completed", "begun 100 s after the start")


def test_code_that_was_parked_before_it_began_begins_when_it_is_mended() -> None:
    stage = Stage(if_free, 7)
    stage.turn(park=Parked("", "code", "it did not come to rest"))
    _grant(stage, Operate("retry"), at_s=3600)
    assert _output(stage) == "got it"


def test_a_link_that_takes_over_a_signal_begins_with_its_first_turn() -> None:
    stage = Stage(if_free, 0)
    stage.turn(NEWS)
    stage.go_on()
    _grant(stage, at_s=30)
    assert _output(stage) == "got it"


def test_what_comes_before_the_start_is_on_record_at_its_own_time_and_the_begin_once() -> None:
    stage = Stage(within_a_minute, 7)
    stage.turn(NEWS, at_s=-60)
    stage.turn(PAUSE, at_s=-30)
    stage.turn(RESUME, at_s=5)
    stage.succeed("look", 1)
    assert [(at - T0).total_seconds() for at, _ in stage.rows] == [-60, -30, 5, 5]
    assert stage.tags().count(CodeBegan.tag) == 1


def test_of_a_run_that_was_told_nothing_the_begin_goes_without_saying() -> None:
    stage = Stage(within_a_minute, 7)
    stage.turn(at_s=5)
    stage.succeed("look", 1)
    assert CodeBegan.tag not in stage.tags()


def test_a_run_that_a_release_before_has_begun_goes_on_as_it_was_recorded() -> None:
    """There what came before the start bears its instant, and the code began with that."""
    stage = Stage(within_a_minute, 7)
    look_ = {"args": {"n": 7}, "e": "asked", "effect": "none", "retry": [1.0, 2.0, 60.0, 2, []]}
    first, second = "tests.machine.steps.look#0", "tests.machine.steps.look#1"
    begun = [
        {**look_, "key": first},
        {"e": "abandoned", "key": first},
        {**look_, "key": second},
        {"e": "settled", "key": first, "outcome": "withdrawn"},
    ]
    signalled = [{"e": "signal", "name": "news", "id": "n1", "payload": "good"}]
    stage.rows = [(T0, signalled), (T0 + timedelta(seconds=90), begun)]
    stage.reload()
    stage.turn(AttemptEnded(second, "do", 1, "succeeded", 1), at_s=91)
    assert (stage.state, _output(stage)) == ("completed", "begun 0 s after the start")
