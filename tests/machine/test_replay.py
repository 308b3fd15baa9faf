"""What is drift and what is harmless when saga code changes under a run; version gates."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest

from orchestrator import Effect, RetryPolicy, saga, step
from orchestrator.codec import FunctionCodec
from orchestrator.errors import ChildFailed, DriftError, StepFailed
from orchestrator.machine.journal import AttemptEnded, Signal
from orchestrator.machine.turn import CodeError
from orchestrator.saga.mapping import run_page
from orchestrator.step import registry
from tests.machine.stage import Stage
from tests.machine.steps import charge, look, mail, reserve

Function = Callable[..., Coroutine[Any, Any, Any]]


async def recorded(n: int) -> list[Any]:
    first = await asyncio.gather(saga.step(reserve, n), saga.step(charge, n))
    await saga.step(look, n)
    return first


def _declared(function: Function) -> saga.Saga[Any, Any]:
    return saga.define(name="replayed")(function)


def _at_the_look() -> Stage:
    """A run of `recorded` that has asked for everything and waits for `look`."""
    stage = Stage(_declared(recorded), 1)
    stage.turn()
    stage.succeed("reserve", "h")
    stage.succeed("charge", "c")
    return stage


def _goes_on(stage: Stage, changed: Function) -> Stage:
    stage.reload(_declared(changed))
    stage.succeed("look", 1)
    return stage


def test_steps_asked_in_another_order_are_harmless() -> None:
    async def reordered(n: int) -> list[Any]:
        first = await asyncio.gather(saga.step(charge, n), saga.step(reserve, n))
        await saga.step(look, n)
        return first

    assert _goes_on(_at_the_look(), reordered).state == "completed"


def test_a_step_added_ahead_of_where_the_run_is_is_harmless() -> None:
    async def extended(n: int) -> None:
        await recorded(n)
        await saga.step(mail, n)

    assert _goes_on(_at_the_look(), extended).due == [("mail", "do")]


def test_awaiting_one_after_the_other_what_was_asked_for_together_is_harmless() -> None:
    async def started_early(n: int) -> list[Any]:
        hold, taken = saga.step(reserve, n), saga.step(charge, n)
        results = [await hold, await taken]
        await saga.step(look, n)
        return results

    assert _goes_on(_at_the_look(), started_early).state == "completed"


def test_a_new_step_before_recorded_ones_is_drift() -> None:
    async def inserted(n: int) -> None:
        await saga.step(mail, n)
        await recorded(n)

    with pytest.raises(DriftError, match=r"asks for 'tests\.machine\.steps\.mail#0'"):
        _goes_on(_at_the_look(), inserted)


def test_other_arguments_for_a_recorded_step_are_drift() -> None:
    async def other_arguments(n: int) -> None:
        await asyncio.gather(saga.step(reserve, n + 1), saga.step(charge, n))
        await saga.step(look, n)

    with pytest.raises(DriftError, match="other arguments"):
        _goes_on(_at_the_look(), other_arguments)


def _mapped(task: Any, items: Any = (1, 2), **options: Any) -> Function:
    async def maps(n: int) -> int:
        return (await saga.map(task, items, **options)).total

    return maps


def _maps_again(recorded: Function, changed: Function) -> Stage:
    """A run that has asked for a page and hears of it in a process with other code."""
    stage = Stage(_declared(recorded), 1)
    (page,) = stage.turn().children
    stage.reload(_declared(changed))
    done = {"total": 2, "failed": 0, "failures": [], "cursor": None}
    stage.turn(AttemptEnded(page.key, "do", 1, "succeeded", done))
    return stage


@step(effect=Effect.NONE)
def both(cursor: int | None) -> tuple[list[int], int | None]:
    return [1, 2], None


@pytest.mark.parametrize("items", [(1, 2), both])
def test_other_options_of_a_step_that_is_mapped_are_harmless(items: Any) -> None:
    changed = _mapped(charge.with_options(retry=RetryPolicy(maximum_attempts=9), queue="fast"), items, concurrency=2)
    assert _maps_again(_mapped(charge, items), changed).state == "completed"


@step(effect=Effect.NONE)
def weigh(item: dict[str, int]) -> int:
    return 1


@step(effect=Effect.NONE)
def items(cursor: int | None) -> tuple[list[dict[str, int]], int | None]:
    return [{"n": 1}], None


def test_a_page_of_a_paging_step_is_compared_with_what_todays_annotations_make_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass
    class Item:
        n: int
        note: str = ""

    def weigh_today(item): ...  # type: ignore[no-untyped-def]

    weigh_today.__annotations__ = {"item": Item}
    (child,) = Stage(_declared(_mapped(weigh, items)), 1).turn().children
    page = Stage(run_page, child.input["spec"])
    page.turn()
    page.succeed("items", [[{"n": 1}], None])
    monkeypatch.setattr(weigh, "codec", FunctionCodec(weigh_today))
    page.reload()
    page.succeed("weigh", 1)
    assert page.state == "completed"


@pytest.mark.parametrize("options", [{"concurrency": 2.5}, {"page": True}, {"tolerate": math.nan}])
def test_numbers_that_make_no_sense_are_refused_before_a_page_is_asked_for(options: Any) -> None:
    with pytest.raises(CodeError, match="must be whole numbers, 1 or more, tolerate= 0 or more"):
        Stage(_declared(_mapped(charge, **options)), 1).turn()


@pytest.mark.parametrize("unknown", [weigh, items])
def test_a_page_is_parked_with_the_reason_where_a_step_of_it_is_not_imported(
    unknown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (child,) = Stage(_declared(_mapped(weigh, items)), 1).turn().children
    monkeypatch.delitem(registry.steps, unknown.name)
    with pytest.raises(CodeError, match=f"{unknown.name} is a declared step that this worker does not import"):
        Stage(run_page, child.input["spec"]).turn()


@pytest.mark.parametrize("changed", [_mapped(charge, (1, 3)), _mapped(charge, both), _mapped(reserve)])
def test_other_items_to_be_mapped_are_drift(changed: Function) -> None:
    with pytest.raises(DriftError, match="other arguments"):
        _maps_again(_mapped(charge), changed)


def test_a_function_that_ends_early_is_drift() -> None:
    async def shorter(n: int) -> None:
        await asyncio.gather(saga.step(reserve, n), saga.step(charge, n))

    with pytest.raises(DriftError, match=r"the saga ended.*(\n.*)*not asked for again: .*look#0"):
        _goes_on(_at_the_look(), shorter)


def test_a_function_that_raises_early_is_drift_and_its_error_is_told() -> None:
    """A result that the annotation of today does not accept, say: that the saga ended was all that was told."""

    async def fails(n: int) -> None:
        await asyncio.gather(saga.step(reserve, n), saga.step(charge, n))
        raise KeyError("currency")

    with pytest.raises(DriftError, match=r"the saga function raised KeyError: 'currency'\.\n.*: .*look#0") as drift:
        _goes_on(_at_the_look(), fails)
    assert isinstance(drift.value.__cause__, KeyError)


def test_drift_is_reported_even_if_saga_code_catches_everything() -> None:
    async def catches_all(n: int) -> None:
        with contextlib.suppress(BaseException):
            await saga.step(mail, n)
        await recorded(n)

    with pytest.raises(DriftError):
        _goes_on(_at_the_look(), catches_all)


def test_a_step_keeps_its_place_with_a_key_of_its_own() -> None:
    async def keyed(n: int) -> None:
        await saga.step(look.with_options(key="tests.machine.steps.reserve#0"), n)

    async def renamed(n: int) -> None:
        await saga.step(reserve.with_options(key="hold"), n)

    stage = Stage(_declared(renamed), 1)
    stage.turn()
    assert list(stage.work) == ["hold"]
    stage.reload(_declared(keyed))
    with pytest.raises(DriftError):
        stage.turn()


def test_the_same_arguments_in_another_form_are_not_drift() -> None:
    async def by_keyword(n: int) -> None:
        await asyncio.gather(saga.step(reserve, n=n), saga.step(charge, n=n))
        await saga.step(look, n=n)

    assert _goes_on(_at_the_look(), by_keyword).state == "completed"


@step
def unhold(order: Any, result: Any) -> None: ...


@step(compensate=unhold)
def hold(order: Any) -> Any: ...


@pytest.mark.parametrize("reload", [False, True])
def test_saga_code_may_change_what_it_was_given_and_the_journal_stays_as_it_is(reload: bool) -> None:
    async def changing(order: Any) -> None:
        order["lines"].append("gift")
        held = await saga.step(hold, order)
        held["ids"].pop()
        fetched = await saga.once("fetch", dict)
        fetched["seen"] = True
        note = await saga.wait_signal("note")
        note["seen"] = True
        await saga.step(look, len(held["ids"]))

    stage = Stage(_declared(changing), {"lines": []})
    stage.turn()
    stage.succeed("hold", {"ids": ["a", "b"]})
    stage.succeed("fetch", {})
    stage.turn(Signal("note", "s1", {}))
    told = {key: each.result for key, each in stage.execution.fold.steps.items()}
    assert list(told.values()) == [{"ids": ["a", "b"]}, {}, {}, None]
    if reload:
        stage.reload()
    stage.reject("look")
    undo = stage.work[stage.key("unhold")].call["a"]
    assert undo == {"order": {"lines": ["gift"]}, "result": {"ids": ["a", "b"]}}
    assert stage.info.input == {"order": {"lines": []}}


@pytest.mark.parametrize("reload", [False, True])
def test_saga_code_may_change_the_error_that_it_caught_and_the_journal_stays_as_it_is(reload: bool) -> None:
    async def forgiving(n: int) -> None:
        try:
            await saga.step(look, n)
        except StepFailed as error:
            error.error["mro"].pop()
        try:
            await saga.child(booking, n)
        except ChildFailed as error:
            error.left[0].pop("key")
        await saga.step(mail, n)

    booking = _declared(recorded)
    stage = Stage(_declared(forgiving), 1)
    stage.turn()
    trouble = {"type": "Trouble", "message": "no", "mro": ["Trouble", "Exception"]}
    stage.turn(replace(stage.end("look", "rejected"), error=trouble))
    (child,) = (step.key for step in stage.execution.fold.children)
    left = [{"key": "book#0", "task": "book", "outcome": "succeeded"}]
    stage.turn(AttemptEnded(child, "do", 1, "rejected", error={"type": "Trouble", "left": left}))
    if reload:
        stage.reload()
    stage.succeed("mail", "m")
    steps = [step.error for step in stage.execution.fold.steps.values()]
    assert steps == [trouble, {"type": "Trouble", "left": left}, None]
    assert stage.state == "completed"


def test_a_key_cannot_be_used_twice() -> None:
    async def twice(n: int) -> None:
        await asyncio.gather(*(saga.step(look.with_options(key="same"), i) for i in range(2)))

    with pytest.raises(Exception, match="must be unique within its run"):
        Stage(_declared(twice), 1).turn()


# -- version gates -----------------------------------------------------------------------------------------------
def test_a_gate_answers_a_new_run_with_the_new_number_and_stays_with_it() -> None:
    async def gated(n: int) -> int:
        number = saga.version("look twice", 1, 2)
        await saga.step(look, n)
        return number

    async def gated_further(n: int) -> int:
        number = saga.version("look twice", 1, 3)
        await saga.step(look, n)
        return number

    stage = Stage(_declared(gated), 1)
    stage.turn()
    stage.reload(_declared(gated_further))
    stage.succeed("look", 1)
    fold = stage.execution.fold
    assert fold.returned and fold.returned.output == 2


def test_a_gate_before_the_point_reached_answers_the_old_number() -> None:
    async def gated(n: int) -> None:
        if saga.version("mail first", 1, 2) == 2:
            await saga.step(mail, n)
        await recorded(n)

    assert _goes_on(_at_the_look(), gated).state == "completed"


def test_a_gate_behind_the_point_reached_answers_the_new_number() -> None:
    async def gated(n: int) -> None:
        await recorded(n)
        if saga.version("mail last", 1, 2) == 2:
            await saga.step(mail, n)

    assert _goes_on(_at_the_look(), gated).due == [("mail", "do")]


def test_a_gate_in_a_loop_does_not_change_its_answer_between_two_rounds() -> None:
    async def looping(n: int) -> None:
        for _ in range(3):
            await saga.step(look, n)

    async def gated(n: int) -> None:
        for _ in range(3):
            if saga.version("mail too", 1, 2) == 2:
                await saga.step(mail, n)
            await saga.step(look, n)

    stage = Stage(_declared(looping), 1)
    stage.turn()
    stage.succeed("look", 1)
    for _ in range(2):
        stage.reload(_declared(gated))
        stage.succeed("look", 1)
    assert stage.state == "completed"


@pytest.mark.parametrize("range_", [(2, 1), ("1", "2"), (1, None), (True, 2)])
def test_a_gate_whose_numbers_make_no_sense_is_refused_before_one_is_recorded(range_: Any) -> None:
    """With the larger one first a new run went on with the smaller one, and drifted when it was replayed."""

    async def gated(n: int) -> None:
        saga.version("change", *range_)

    with pytest.raises(CodeError, match="the minimum comes first"):
        Stage(_declared(gated), 1).turn()


def test_code_that_no_longer_supports_a_recorded_number_is_drift() -> None:
    async def old(n: int) -> None:
        saga.version("change", 1, 1)
        await saga.step(look, n)

    async def new(n: int) -> None:
        saga.version("change", 2, 3)
        await saga.step(look, n)

    stage = Stage(_declared(old), 1)
    stage.turn()
    stage.reload(_declared(new))
    with pytest.raises(DriftError, match="recorded 1, this code supports 2 to 3"):
        stage.succeed("look", 1)


# -- time and chance -----------------------------------------------------------------------------------------------
def test_now_uuid_and_random_are_the_same_on_every_replay() -> None:
    async def fanciful(n: int) -> list[str]:
        drawn = [str(saga.now()), str(saga.uuid4()), str(saga.random())]
        await saga.step(look, n)
        return [*drawn, str(saga.now()), str(saga.uuid4()), str(saga.random())]

    def output(reload: bool) -> Any:
        stage = Stage(_declared(fanciful), 1)
        stage.turn()
        if reload:
            stage.reload()
        stage.turn(stage.end("look", "succeeded", 1), at_s=10)
        assert stage.execution.fold.returned
        return stage.execution.fold.returned.output

    drawn = output(reload=False)
    assert drawn == output(reload=True)
    assert len(set(drawn)) == 6


def test_a_run_that_waited_long_for_its_first_turn_has_all_of_its_timeouts_left() -> None:
    async def hurried(n: int) -> str:
        try:
            async with asyncio.timeout(5):
                await saga.step(look, n)
        except TimeoutError:
            return "timed out"
        return "in time"

    stage = Stage(_declared(hurried), 1)
    stage.turn(at_s=600)
    stage.turn(stage.end("look", "succeeded", 1), at_s=604)
    fold = stage.execution.fold
    assert fold.returned and fold.returned.output == "in time"


def test_a_late_timer_shifts_what_follows_alike_live_and_on_replay() -> None:
    async def sleepy(n: int) -> str:
        await saga.sleep(timedelta(seconds=1))
        await saga.sleep(timedelta(seconds=1))
        return str(saga.now())

    def wakes(reload: bool) -> list[str]:
        stage = Stage(_declared(sleepy), 1)
        seen = [str(stage.turn().wake), str(stage.turn(at_s=1.5).wake)]
        if reload:
            stage.reload()
        stage.turn(at_s=2.5)
        fold = stage.execution.fold
        assert fold.returned
        return [*seen, fold.returned.output]

    assert wakes(reload=False) == wakes(reload=True)
