"""The point of no return: awaited by everything, never guessed, and after it only forward."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from datetime import timedelta

import pytest

from orchestrator import saga
from orchestrator.errors import StepFailed
from orchestrator.machine.journal import Arrival, AttemptEnded, Cancel, LateSuccess, Operate, PivotNews, Revoke
from tests.machine.stage import Stage
from tests.machine.steps import capture, charge, look, mail, reserve, settle, tell


@saga.define
async def paying(n: int) -> str:
    await saga.step(charge, n)
    settled = await saga.step(settle, n)
    await saga.step(tell, n)
    return settled


@saga.define
async def capturing(n: int) -> str:
    await saga.step(charge, n)
    return await saga.step(capture, n)


@saga.define
async def settles_and_raises(n: int) -> None:
    await saga.step(settle, n)
    raise ValueError("after all")


def _before_the_pivot() -> Stage:
    stage = Stage(paying, 1, deadline_s=60)
    stage.turn()
    stage.succeed("charge", "c")
    return stage


def _after_the_pivot() -> Stage:
    stage = _before_the_pivot()
    stage.succeed("settle", "s")
    return stage


def test_before_the_pivot_cancelling_undoes() -> None:
    stage = Stage(paying, 1)
    stage.turn()
    stage.begin("charge")
    stage.turn(Cancel())
    stage.succeed("charge", "c")
    stage.succeed("refund")
    assert stage.state == "cancelled"


def test_cancelling_waits_for_a_pivot_in_flight_and_is_refused_when_it_succeeds() -> None:
    stage = _before_the_pivot()
    stage.begin("settle")
    stage.turn(Cancel())
    assert (stage.state, stage.due) == ("running", [("settle", "do")])
    stage.succeed("settle", "s")
    assert "cancel refused" in stage.tags()
    stage.succeed("tell", "t")
    assert stage.state == "completed"


def test_cancelling_waits_for_a_pivot_in_flight_and_undoes_when_it_is_rejected() -> None:
    stage = _before_the_pivot()
    stage.begin("settle")
    stage.turn(Cancel())
    stage.reject("settle")
    assert stage.due == [("refund", "undo")]
    stage.succeed("refund")
    assert stage.state == "cancelled"


def test_after_the_pivot_cancelling_is_refused_on_record() -> None:
    stage = _after_the_pivot()
    stage.turn(Cancel("ann"))
    assert (stage.state, stage.tags()[-2:]) == ("running", ["cancel", "cancel refused"])


def test_after_the_pivot_the_deadline_only_alarms() -> None:
    stage = _after_the_pivot()
    stage.turn(at_s=61)
    assert (stage.state, stage.tags()[-2:]) == ("running", ["deadline", "cancel refused"])
    stage.succeed("tell", "t")
    assert stage.state == "completed"


@saga.define
async def settles_and_goes_on(n: int) -> str:
    if n == 1:
        await saga.step(settle, n)
        await saga.sleep(timedelta(seconds=90))
    else:
        await saga.step(look, n)
    if n < 3:
        saga.continue_as_new(n + 1)
    return "all of it"


def test_a_deadline_that_has_only_alarmed_does_not_end_the_links_after_it() -> None:
    stage = Stage(settles_and_goes_on, 1, deadline_s=60)
    stage.turn()
    stage.succeed("settle", "s")
    stage.turn(at_s=60)
    stage.turn(at_s=90)
    stage.go_on()
    assert stage.turn(at_s=91).wake is None
    stage.succeed("look", 1)
    stage.go_on()
    stage.turn(at_s=92)
    stage.succeed("look", 1)
    assert stage.state == "completed"
    assert "deadline" not in stage.tags()


def test_a_deadline_that_is_still_to_come_ends_a_link_after_the_one_with_the_pivot() -> None:
    stage = Stage(settles_and_goes_on, 1, deadline_s=100)
    stage.turn()
    stage.succeed("settle", "s")
    stage.turn(at_s=90)
    stage.go_on()
    stage.turn(at_s=91)
    stage.begin("look")
    stage.turn(at_s=100)
    assert stage.tags()[-1] == "abandoned"
    stage.succeed("look", 1)
    assert stage.state == "failed"


def test_a_failing_sibling_waits_for_the_pivot() -> None:
    @saga.define(name="pivot beside")
    async def pivot_beside(n: int) -> None:
        await asyncio.gather(saga.step(settle, n), saga.step(charge, n))

    stage = Stage(pivot_beside, 1)
    stage.turn()
    stage.begin("settle")
    stage.reject("charge")
    assert (stage.state, stage.due) == ("running", [("settle", "do")])
    stage.reject("settle")
    assert stage.state == "failed"


@saga.define
async def hurrying_after_the_pivot(n: int) -> None:
    await saga.step(settle, n)
    for step in (charge, tell):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(saga.step(step, n), 5)


@pytest.mark.parametrize(("verdict", "in_time"), [("failed", False), ("failed", True), ("rejected", False)])
def test_a_step_after_the_pivot_that_had_no_effect_and_nobody_waits_for_is_neither_undone_nor_parked(
    verdict: str, in_time: bool
) -> None:
    stage = Stage(hurrying_after_the_pivot, 1)
    stage.turn()
    stage.succeed("settle", "s")
    for step, at_s in (("charge", 6), ("tell", 12)):
        stage.begin(step)
        if in_time:
            stage.turn(stage.end(step, verdict))  # and is to be tried again
        stage.turn(at_s=at_s)
        if not in_time:
            stage.turn(stage.end(step, verdict))
    assert (stage.state, stage.due, stage.left) == ("completed", [], [])


def test_raising_after_the_pivot_parks_instead_of_undoing() -> None:
    stage = Stage(settles_and_raises, 1)
    stage.turn()
    stage.succeed("settle", "s")
    parked = stage.execution.fold.parked
    assert stage.state == "parked"
    assert parked and parked.role == "pivot"


def test_a_run_parked_after_the_pivot_goes_on_with_mended_code() -> None:
    stage = Stage(settles_and_raises, 1)
    stage.turn()
    stage.succeed("settle", "s")

    @saga.define(name=settles_and_raises.name)
    async def mended(n: int) -> None:
        await saga.step(settle, n)

    stage.reload(mended)
    stage.turn(Operate("retry", by="ann"))
    assert stage.state == "completed"


def _settles_and_holds(**how: bool) -> saga.Saga[[int], None]:
    async def holds(n: int) -> str:
        return await saga.step(reserve, n)

    @saga.define(name="settles and holds")
    async def settles_and_holds(n: int) -> None:
        await saga.step(settle, n)
        await asyncio.gather(holds(n), saga.step(mail, n), **how)

    return settles_and_holds


def test_what_runs_beside_an_error_after_the_pivot_is_not_given_up_and_counts_once_the_code_is_mended() -> None:
    stage = Stage(_settles_and_holds(), 1)
    stage.turn()
    stage.succeed("settle", "s")
    stage.begin("reserve")
    stage.reject("mail")
    assert (stage.state, stage.told_to_stop) == ("running", [])
    stage.succeed("reserve", "h")
    assert (stage.state, stage.due) == ("parked", [])
    stage.reload(_settles_and_holds(return_exceptions=True))
    stage.turn(Operate("retry", by="ann"))
    assert (stage.state, stage.due) == ("completed", [])


def test_what_runs_beside_an_error_is_given_up_once_the_pivot_is_rejected() -> None:
    @saga.define(name="settles beside")
    async def settles_beside(n: int) -> None:
        async def holds() -> None:
            await saga.step(reserve, n)

        await asyncio.gather(holds(), saga.step(settle, n), saga.step(mail, n))

    stage = Stage(settles_beside, 1)
    stage.turn()
    stage.begin("reserve")
    stage.begin("settle")
    stage.reject("mail")
    stage.reject("settle")
    assert stage.told_to_stop == [stage.key("reserve")]
    stage.succeed("reserve", "h")
    assert (stage.state, stage.due) == ("compensating", [("release", "undo")])


def test_a_run_parked_after_the_pivot_can_be_resolved_with_an_output() -> None:
    stage = Stage(settles_and_raises, 1)
    stage.turn()
    stage.succeed("settle", "s")
    stage.turn(Operate("resolve", by="ann", value="by hand"))
    fold = stage.execution.fold
    assert (stage.state, fold.returned and fold.returned.output) == ("completed", "by hand")


def test_an_unknown_pivot_without_a_probe_parks_and_nothing_is_guessed() -> None:
    stage = _before_the_pivot()
    stage.doubt_until_given_up("settle")
    assert (stage.state, stage.due) == ("parked", [])


def test_cancelling_waits_for_a_parked_pivot() -> None:
    stage = _before_the_pivot()
    key = stage.key("settle")
    stage.doubt_until_given_up("settle")
    stage.turn(Cancel())
    assert (stage.state, stage.due) == ("parked", [])
    stage.turn(Operate("resolve", key, "ann", "asked the bank", no_effect=True))
    assert (stage.state, stage.due) == ("compensating", [("refund", "undo")])


def test_an_unknown_pivot_with_a_probe_is_asked_for() -> None:
    stage = Stage(capturing, 1)
    stage.turn()
    stage.succeed("charge", "c")
    stage.doubt_until_given_up("capture")
    assert stage.due == [("find_capture", "probe")]
    stage.succeed("find_capture", "k")
    assert stage.state == "completed"


def test_a_pivot_that_its_probe_does_not_find_is_rejected_and_the_run_undone() -> None:
    stage = Stage(capturing, 1)
    stage.turn()
    stage.succeed("charge", "c")
    stage.doubt_until_given_up("capture")
    stage.succeed("find_capture", None)
    assert (stage.state, stage.due) == ("compensating", [("refund", "undo")])


def test_a_pivot_whose_attempts_certainly_had_no_effect_is_rejected() -> None:
    stage = _before_the_pivot()
    stage.turn(stage.end("settle", "failed"))
    stage.turn(stage.end("settle", "failed"))
    assert stage.due == [("refund", "undo")]


def test_after_the_pivot_a_step_that_keeps_failing_parks() -> None:
    stage = _after_the_pivot()
    stage.doubt_until_given_up("tell")
    assert (stage.state, stage.due) == ("parked", [])


def test_after_the_pivot_a_rejected_retriable_step_parks() -> None:
    stage = _after_the_pivot()
    key = stage.key("tell")
    stage.reject("tell")
    assert stage.state == "parked"
    stage.turn(Operate("retry", key, "ann"))
    stage.succeed("tell", "t")
    assert stage.state == "completed"


def test_after_the_pivot_a_look_may_fail_and_be_caught() -> None:
    @saga.define(name="settles and looks")
    async def settles_and_looks(n: int) -> str:
        await saga.step(settle, n)
        try:
            return str(await saga.step(look, n))
        except StepFailed as error:
            return error.outcome

    stage = Stage(settles_and_looks, 1)
    stage.turn()
    stage.succeed("settle", "s")
    stage.doubt_until_given_up("look")
    assert stage.state == "completed"


@saga.define
async def paid_by_child(n: int) -> str:
    return await saga.step(settle, n)


@saga.define
async def paid_by_children(n: int) -> None:
    await asyncio.gather(saga.child(paid_by_child, 1), saga.child(paid_by_child, 2), saga.step(settle, n))


def _asks(stage: Stage, child: int, *before: Arrival) -> list[str]:
    """The pivot of a child is asked for: what its parent answers."""
    key = stage.execution.fold.children[child].key
    turn = stage.turn(*before, PivotNews(f"{stage.info.child(key)} pivot#0", "asked", key))
    return [post.arrival.phase for post in turn.posts if isinstance(post.arrival, PivotNews)]


def test_a_cancel_that_comes_too_late_refuses_no_further_pivot() -> None:
    stage = Stage(paid_by_children, 1)
    stage.turn()
    stage.succeed("settle", "s")
    assert _asks(stage, 0, Cancel()) == ["granted"]


def test_no_further_pivot_begins_in_a_family_that_is_to_be_undone() -> None:
    stage = Stage(paid_by_children, 1)
    stage.turn()
    stage.begin("settle")
    failed = AttemptEnded(stage.execution.fold.children[1].key, "do", 1, "rejected", error={"type": "Trouble"})
    stage.turn(failed)
    assert (stage.execution.fold.raised is not None, stage.state) == (True, "running")
    assert _asks(stage, 0) == ["refused"]


@saga.define
async def pays_another_way(n: int) -> str:
    try:
        return await asyncio.wait_for(saga.child(paid_by_child, 1), 5)
    except TimeoutError:
        return await saga.child(paid_by_child, 2)


def test_no_pivot_begins_in_a_child_that_was_given_up() -> None:
    stage = Stage(pays_another_way, 1)
    stage.turn()
    stage.turn(at_s=5)
    assert _asks(stage, 0) == ["refused"]
    assert _asks(stage, 1) == ["granted"]


def test_a_child_that_was_given_up_after_its_pivot_may_pass_the_next_one() -> None:
    stage = Stage(pays_another_way, 1)
    stage.turn()
    key = stage.execution.fold.children[0].key
    assert _asks(stage, 0) == ["granted"]
    stage.turn(PivotNews(f"{stage.info.child(key)} pivot#0", "succeeded", key))
    stage.turn(at_s=5)
    assert _asks(stage, 0) == ["granted"]


def test_a_pivot_that_is_granted_to_a_child_which_was_given_up_meanwhile_does_not_begin() -> None:
    """By who stands between it and the root, which does not know yet."""
    stage = Stage(paid_by_child, 1, run_id="r/paid#0")
    stage.info = replace(stage.info, parent="r")
    stage.reload()
    (asked,) = stage.turn().posts
    assert isinstance(asked.arrival, PivotNews)
    stage.turn(Revoke())
    turn = stage.turn(PivotNews(asked.arrival.origin, "granted"))
    assert (stage.state, stage.due) == ("cancelled", [])
    assert [post.arrival.phase for post in turn.posts if isinstance(post.arrival, PivotNews)] == ["failed"]


def test_after_the_pivot_an_abandoned_effect_is_still_undone() -> None:
    @saga.define(name="settles and hurries")
    async def settles_and_hurries(n: int) -> None:
        await saga.step(settle, n)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(saga.step(reserve, n), 5)

    stage = Stage(settles_and_hurries, 1)
    stage.turn()
    stage.succeed("settle", "s")
    stage.begin("reserve")
    stage.turn(at_s=5)
    stage.succeed("reserve", "h")
    assert stage.due == [("release", "undo")]
    stage.succeed("release")
    assert stage.state == "completed"


def test_a_late_report_of_a_pivot_that_was_decided_is_on_record() -> None:
    stage = _after_the_pivot()
    stage.turn(LateSuccess("tests.machine.steps.settle#0", "do", 1, "s"))
    assert (stage.state, stage.tags()[-1]) == ("running", "late")
