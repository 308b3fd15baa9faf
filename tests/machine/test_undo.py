"""What is undone, when, and what is not: rejected, unknown and succeeded steps, on every way out of a saga."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta

import pytest

from orchestrator import saga
from orchestrator.errors import StepFailed
from orchestrator.machine.journal import Cancel, LateSuccess, Operate, Terminate
from tests.machine.stage import T0, Stage
from tests.machine.steps import careful, charge, look, mail, reserve, tell, wire


@saga.define
async def three_in_a_row(n: int) -> None:
    await saga.step(reserve, n)
    await saga.step(charge, n)
    await saga.step(look, n)


@saga.define
async def one_charge(n: int) -> str:
    return await saga.step(charge, n)


@saga.define
async def forgiving(n: int) -> str:
    try:
        return await saga.step(charge, n)
    except StepFailed as error:
        return error.outcome


@saga.define
async def side_by_side(n: int) -> list[str]:
    return await asyncio.gather(saga.step(reserve, n), saga.step(charge, n))


def test_a_rejected_step_is_not_undone_and_the_run_has_failed() -> None:
    stage = Stage(one_charge, 1)
    stage.turn()
    stage.reject("charge")
    assert (stage.state, stage.due, stage.left) == ("failed", [], [])


def test_what_succeeded_is_undone_in_reverse_one_at_a_time() -> None:
    stage = Stage(three_in_a_row, 1)
    stage.turn()
    stage.succeed("reserve", "h")
    stage.succeed("charge", "c")
    stage.reject("look")
    assert (stage.state, stage.due) == ("compensating", [("refund", "undo")])
    stage.succeed("refund")
    assert stage.due == [("release", "undo")]
    stage.succeed("release")
    assert (stage.state, stage.due, stage.left) == ("compensated", [], [])


def test_the_undo_gets_the_arguments_and_the_result_of_its_step() -> None:
    stage = Stage(three_in_a_row, 7)
    stage.turn()
    stage.succeed("reserve", "h")
    stage.succeed("charge", "c-7")
    stage.reject("look")
    assert stage.work[stage.key("refund")].call["a"] == {"n": 7, "result": "c-7"}


def test_a_step_in_doubt_is_tried_again_and_its_success_counts() -> None:
    stage = Stage(one_charge, 1)
    stage.turn()
    stage.doubt("charge")
    assert stage.work[stage.key("charge")].attempt == 1
    stage.succeed("charge", "c")
    assert stage.state == "completed"


def test_a_step_that_stays_in_doubt_is_undone_before_the_saga_hears_of_it() -> None:
    stage = Stage(forgiving, 1)
    stage.turn()
    stage.doubt_until_given_up("charge")
    assert (stage.state, stage.due) == ("running", [("refund", "undo")])
    stage.succeed("refund")
    fold = stage.execution.fold
    assert (stage.state, fold.returned and fold.returned.output, stage.left) == ("completed", "unknown", [])


def test_in_doubt_and_then_rejected_is_unknown_and_therefore_undone() -> None:
    stage = Stage(one_charge, 1)
    stage.turn()
    stage.doubt("charge")
    stage.reject("charge")
    assert stage.due == [("refund", "undo")]
    stage.succeed("refund")
    assert stage.state == "compensated"


def test_attempts_that_certainly_had_no_effect_leave_nothing_to_undo() -> None:
    stage = Stage(one_charge, 1)
    stage.turn()
    stage.turn(stage.end("charge", "failed"))
    stage.turn(stage.end("charge", "failed"))
    assert (stage.state, stage.due) == ("failed", [])


def test_a_step_without_effect_is_never_in_doubt() -> None:
    stage = Stage(three_in_a_row, 1)
    stage.turn()
    stage.reject("reserve")
    assert stage.state == "failed"


def test_the_undo_of_an_attempt_that_may_still_run_waits_for_its_deadline() -> None:
    quiet = T0 + timedelta(minutes=5)
    stage = Stage(one_charge, 1)
    stage.turn()
    stage.doubt("charge", quiet=quiet.isoformat())
    stage.reject("charge")
    assert stage.work[stage.key("refund")].due == quiet


def test_the_undo_waits_for_the_siblings_that_still_run() -> None:
    stage = Stage(side_by_side, 1)
    stage.turn()
    stage.begin("reserve")
    stage.reject("charge")
    assert (stage.state, stage.due) == ("compensating", [("reserve", "do")])
    assert stage.told_to_stop == [stage.key("reserve")]
    stage.succeed("reserve", "h")
    assert stage.due == [("release", "undo")]


def test_a_sibling_that_has_not_begun_is_withdrawn() -> None:
    stage = Stage(side_by_side, 1)
    stage.turn()
    stage.reject("charge")
    assert (stage.state, stage.due) == ("failed", [])


def test_a_sibling_between_two_attempts_is_withdrawn_as_unknown_and_undone() -> None:
    stage = Stage(side_by_side, 1)
    stage.turn()
    stage.doubt("reserve")
    stage.reject("charge")
    assert (stage.state, stage.due) == ("compensating", [("release", "undo")])


def test_siblings_that_end_in_one_turn_are_all_undone() -> None:
    stage = Stage(side_by_side, 1)
    stage.turn()
    stage.turn(stage.end("charge", "rejected"), stage.end("reserve", "succeeded", "h"))
    assert stage.due == [("release", "undo")]


def test_a_step_asked_for_by_a_function_that_raises_never_begins() -> None:
    @saga.define(name="asks and raises")
    async def asks_and_raises(n: int) -> None:
        saga.step(charge, n)
        raise ValueError("changed my mind")

    stage = Stage(asks_and_raises, 1)
    turn = stage.turn()
    assert (turn.work, turn.withdraw, stage.state) == ([], [], "failed")


def test_a_retry_that_is_planned_in_the_turn_of_a_rollback_is_not_begun() -> None:
    stage = Stage(side_by_side, 1)
    stage.turn()
    turn = stage.turn(stage.end("reserve", "doubt"), stage.end("charge", "rejected"))
    assert [(work.task.rsplit(".", 1)[-1], work.role) for work in turn.work] == [("release", "undo")]
    assert turn.withdraw == []


# -- abandoned steps ---------------------------------------------------------------------------------------------
@saga.define
async def impatient(n: int) -> str:
    try:
        async with asyncio.timeout(5):
            return await saga.step(charge, n)
    except TimeoutError:
        return "too late"


def test_an_abandoned_step_that_has_not_begun_is_withdrawn() -> None:
    stage = Stage(impatient, 1)
    stage.turn()
    stage.turn(at_s=5)
    assert (stage.state, stage.due, stage.left) == ("completed", [], [])


def test_an_abandoned_step_that_has_begun_is_told_to_stop_and_undone_when_it_succeeds() -> None:
    stage = Stage(impatient, 1)
    stage.turn()
    stage.begin("charge")
    stage.turn(at_s=5)
    assert (stage.state, stage.told_to_stop) == ("running", [stage.key("charge")])
    stage.succeed("charge", "c")
    assert stage.due == [("refund", "undo")]
    stage.succeed("refund")
    assert (stage.state, stage.left) == ("completed", [])


def test_an_abandoned_step_that_ends_in_doubt_is_not_tried_again_but_undone() -> None:
    stage = Stage(impatient, 1)
    stage.turn()
    stage.begin("charge")
    stage.turn(at_s=5)
    stage.doubt("charge")
    assert stage.due == [("refund", "undo")]


def test_a_success_that_arrives_together_with_the_timeout_is_not_lost_but_undone() -> None:
    stage = Stage(impatient, 1)
    stage.turn()
    stage.turn(stage.end("charge", "succeeded", "c"), at_s=6)
    assert (stage.state, stage.due) == ("running", [("refund", "undo")])


def test_a_step_given_up_while_it_is_being_undone_keeps_its_undo() -> None:
    stage = Stage(impatient, 1)
    stage.turn()
    stage.doubt_until_given_up("charge")
    turn = stage.turn(at_s=5)
    assert (turn.withdraw, stage.due) == ([], [("refund", "undo")])
    stage.succeed("refund")
    assert stage.state == "completed"


def test_a_step_given_up_while_its_probe_runs_keeps_its_probe_and_is_undone_if_found() -> None:
    @saga.define(name="impatient wire")
    async def impatient_wire(n: int) -> str:
        try:
            return await asyncio.wait_for(saga.step(wire, n), 5)
        except TimeoutError:
            return "too late"

    stage = Stage(impatient_wire, 1)
    stage.turn()
    stage.doubt_until_given_up("wire")
    turn = stage.turn(at_s=5)
    assert (turn.withdraw, stage.due) == ([], [("find_wire", "probe")])
    stage.succeed("find_wire", "w")
    assert stage.due == [("release", "undo")]


def test_an_abandoned_effect_without_an_undo_is_listed_as_left() -> None:
    @saga.define(name="impatient mail")
    async def impatient_mail(n: int) -> None:
        try:
            async with asyncio.timeout(5):
                await saga.step(mail, n)
        except TimeoutError:
            pass

    stage = Stage(impatient_mail, 1)
    stage.turn()
    stage.begin("mail")
    stage.turn(at_s=5)
    stage.succeed("mail", "sent")
    assert (stage.state, stage.left) == ("completed", [("mail#0", "succeeded")])


def test_a_link_that_goes_on_as_new_leaves_nothing_that_succeeded() -> None:
    @saga.define(name="goes on")
    async def goes_on(n: int) -> None:
        await saga.step(charge, n)
        saga.continue_as_new(n + 1)

    stage = Stage(goes_on, 1)
    stage.turn()
    stage.succeed("charge", "c")
    assert (stage.state, stage.left) == ("continued", [])


def test_cancelling_the_awaitable_gives_the_step_up() -> None:
    @saga.define(name="fickle")
    async def fickle(n: int) -> None:
        request = saga.step(charge, n)
        await saga.step(look, n)
        request.cancel()

    stage = Stage(fickle, 1)
    stage.turn()
    stage.begin("charge")
    stage.succeed("look", 1)
    stage.succeed("charge", "c")
    assert stage.due == [("refund", "undo")]


# -- steps nobody awaits -------------------------------------------------------------------------------------------
@saga.define
async def forgetful(n: int) -> str:
    saga.step(charge, n)
    return "done"


def test_a_step_that_nobody_awaits_is_awaited_by_the_engine() -> None:
    stage = Stage(forgetful, 1)
    stage.turn()
    assert (stage.state, stage.due) == ("running", [("charge", "do")])
    stage.succeed("charge", "c")
    assert stage.state == "completed"


def test_the_failure_of_a_step_that_nobody_awaits_is_the_failure_of_the_run() -> None:
    stage = Stage(forgetful, 1)
    stage.turn()
    stage.reject("charge")
    assert stage.state == "failed"


def test_a_failure_that_came_before_the_end_and_was_never_looked_at_fails_the_run() -> None:
    @saga.define(name="looks away")
    async def looks_away(n: int) -> None:
        saga.step(reserve, n)
        await saga.step(charge, n)

    stage = Stage(looks_away, 1)
    stage.turn()
    stage.reject("reserve")
    stage.succeed("charge", "c")
    assert (stage.state, stage.due) == ("compensating", [("refund", "undo")])


# -- probes --------------------------------------------------------------------------------------------------------
@saga.define
async def one_wire(n: int) -> str:
    return await saga.step(wire, n)


def test_a_step_in_doubt_with_a_probe_is_asked_for_at_the_provider() -> None:
    stage = Stage(one_wire, 3)
    stage.turn()
    stage.doubt_until_given_up("wire")
    assert stage.due == [("find_wire", "probe")]
    assert stage.work[stage.key("find_wire")].call["a"] == {"n": 3}


def test_an_effect_that_the_probe_finds_makes_the_step_succeed() -> None:
    stage = Stage(one_wire, 1)
    stage.turn()
    stage.doubt_until_given_up("wire")
    stage.succeed("find_wire", "w")
    fold = stage.execution.fold
    assert (stage.state, fold.returned and fold.returned.output) == ("completed", "w")


def test_a_probe_that_finds_nothing_makes_the_step_rejected() -> None:
    stage = Stage(one_wire, 1)
    stage.turn()
    stage.doubt_until_given_up("wire")
    stage.succeed("find_wire", None)
    assert (stage.state, stage.due) == ("failed", [])


def test_a_failing_probe_is_asked_again_and_never_parks_early() -> None:
    stage = Stage(one_wire, 1)
    stage.turn()
    stage.doubt_until_given_up("wire")
    for _ in range(20):
        stage.doubt("find_wire")
    assert (stage.state, stage.due) == ("running", [("find_wire", "probe")])


def test_a_probe_waits_for_an_attempt_that_may_still_run() -> None:
    quiet = T0 + timedelta(minutes=5)
    stage = Stage(one_wire, 1)
    stage.turn()
    stage.doubt("wire")
    stage.doubt("wire", quiet=quiet.isoformat())
    assert stage.work[stage.key("find_wire")].due == quiet


def test_a_rollback_waits_for_the_probe_and_undoes_what_it_finds() -> None:
    stage = Stage(one_wire, 1)
    stage.turn()
    stage.doubt_until_given_up("wire")
    stage.turn(Cancel("ann", "no more"))
    assert (stage.state, stage.due) == ("compensating", [("find_wire", "probe")])
    stage.succeed("find_wire", "w")
    assert stage.due == [("release", "undo")]
    stage.succeed("release")
    assert stage.state == "cancelled"


# -- what declares nothing -----------------------------------------------------------------------------------------
def test_a_step_that_declares_nothing_raises_as_unknown_and_is_left() -> None:
    @saga.define(name="undeclared")
    async def undeclared(n: int) -> str:
        try:
            return await saga.step(mail, n)
        except StepFailed as error:
            return error.outcome

    stage = Stage(undeclared, 1)
    stage.turn()
    stage.doubt_until_given_up("mail")
    assert (stage.state, stage.left) == ("completed", [("mail#0", "unknown")])


def test_an_effect_without_undo_is_left_when_the_run_is_rolled_back() -> None:
    @saga.define(name="mails and charges")
    async def mails_and_charges(n: int) -> None:
        await saga.step(mail, n)
        await saga.step(tell, n)
        await saga.step(charge, n)

    stage = Stage(mails_and_charges, 1)
    stage.turn()
    stage.succeed("mail", "sent")
    stage.succeed("tell", "told")
    stage.reject("charge")
    assert (stage.state, stage.left) == ("failed", [("mail#0", "succeeded"), ("tell#0", "succeeded")])


# -- cancel, deadline, terminate -----------------------------------------------------------------------------------
def test_cancelling_undoes_what_was_done() -> None:
    stage = Stage(three_in_a_row, 1)
    stage.turn()
    stage.succeed("reserve", "h")
    stage.turn(Cancel("ann", "customer asked"))
    assert (stage.state, stage.due) == ("compensating", [("release", "undo")])
    stage.succeed("release")
    assert stage.state == "cancelled"


def test_cancelling_while_a_step_runs_waits_for_it_and_undoes_it() -> None:
    stage = Stage(one_charge, 1)
    stage.turn()
    stage.begin("charge")
    stage.turn(Cancel())
    assert (stage.state, stage.due) == ("compensating", [("charge", "do")])
    stage.succeed("charge", "c")
    stage.succeed("refund")
    assert stage.state == "cancelled"


def test_cancelling_never_resumes_saga_code() -> None:
    resumed: list[str] = []

    @saga.define(name="with a finally")
    async def with_a_finally(n: int) -> None:
        try:
            await saga.step(charge, n)
        finally:
            await saga.step(mail, n)
            resumed.append("past the mail")

    stage = Stage(with_a_finally, 1)
    stage.turn()
    stage.turn(Cancel())
    assert (stage.state, stage.tags().count("asked"), resumed) == ("cancelled", 1, [])


def test_cancelling_a_run_before_its_first_turn_does_nothing_at_all() -> None:
    stage = Stage(one_charge, 1)
    stage.turn(Cancel())
    assert (stage.state, stage.due) == ("cancelled", [])


def test_cancelling_twice_is_cancelling_once() -> None:
    stage = Stage(one_charge, 1)
    stage.turn()
    stage.begin("charge")
    stage.turn(Cancel("ann"))
    stage.turn(Cancel("bob"))
    stage.succeed("charge", "c")
    stage.succeed("refund")
    assert (stage.state, stage.tags().count("cancel")) == ("cancelled", 1)


def test_the_deadline_undoes_what_was_done_and_says_so() -> None:
    stage = Stage(three_in_a_row, 1, deadline_s=60)
    stage.turn()
    stage.succeed("reserve", "h")
    assert stage.execution.wake == stage.info.deadline
    stage.turn(at_s=60)
    assert (stage.state, stage.due) == ("compensating", [("release", "undo")])
    stage.succeed("release")
    rollback = stage.execution.fold.rollback
    assert stage.state == "compensated"
    assert rollback and rollback.error and rollback.error["type"] == "DeadlineExceeded"


def test_terminating_undoes_nothing_and_lists_what_is_left() -> None:
    stage = Stage(three_in_a_row, 1)
    stage.turn()
    stage.succeed("reserve", "h")
    stage.begin("charge")
    stage.turn(Terminate("ann", "now"))
    assert stage.state == "terminated"
    assert stage.left == [("reserve#0", "succeeded"), ("charge#0", "unknown")]


@pytest.mark.parametrize("undoing", [False, True])
def test_what_failed_just_when_the_run_is_terminated_is_not_tried_again(undoing: bool) -> None:
    stage = Stage(three_in_a_row, 1)
    stage.turn()
    if undoing:
        stage.succeed("reserve", "h")
        stage.reject("charge")
    ((step, _),) = stage.due
    stage.turn(stage.end(step, "doubt"), Terminate("ann", "now"))
    assert (stage.state, stage.due) == ("terminated", [])


def test_what_came_in_with_the_order_to_terminate_is_known() -> None:
    stage = Stage(three_in_a_row, 1)
    stage.turn()
    stage.succeed("reserve", "h")
    stage.begin("charge")
    stage.turn(Terminate("ann", "now"), stage.end("charge", "succeeded", "c"))
    assert stage.state == "terminated"
    assert stage.left == [("reserve#0", "succeeded"), ("charge#0", "succeeded")]


# -- late effects ----------------------------------------------------------------------------------------------------
def _undone(stage: Stage) -> str:
    stage.turn()
    stage.doubt("charge")
    key = stage.key("charge")
    stage.reject("charge")
    return key


def test_an_effect_that_shows_up_after_its_undo_is_undone_again_with_its_result() -> None:
    stage = Stage(forgiving, 1)
    key = _undone(stage)
    stage.begin("refund")
    stage.turn(LateSuccess(key, "do", 1, "late-c"))
    stage.succeed("refund")
    work = stage.work[stage.key("refund")]
    assert work.call["a"] == {"n": 1, "result": "late-c"}
    assert work.call["l"] == 1
    stage.succeed("refund")
    assert stage.state == "completed"


@saga.define
async def used_in_a_scope(n: int) -> None:
    with contextlib.suppress(StepFailed):
        async with saga.scope():
            charged = await saga.step(charge, n)
            await saga.step(look, len(charged))
    await saga.step(mail, n)


def test_the_result_of_a_late_effect_is_for_its_undo_and_not_for_saga_code_that_is_replayed() -> None:
    stage = Stage(used_in_a_scope, 1)
    stage.turn()
    stage.doubt("charge")
    key = stage.key("charge")
    stage.succeed("charge", "c")
    stage.reject("look")
    stage.succeed("refund")
    stage.turn(LateSuccess(key, "do", 1, "late-c"))
    stage.reload()
    stage.succeed("mail", "sent")
    assert stage.work[stage.key("refund")].call["a"] == {"n": 1, "result": "late-c"}
    stage.succeed("refund")
    assert stage.state == "completed"


def test_an_effect_that_is_reported_while_its_probe_looks_is_undone_although_that_finds_nothing() -> None:
    @saga.define(name="wires and goes on")
    async def wires_and_goes_on(n: int) -> str:
        try:
            return await saga.step(wire, n)
        except StepFailed as error:
            return error.outcome

    stage = Stage(wires_and_goes_on, 1)
    stage.turn()
    key = stage.key("wire")
    stage.doubt_until_given_up("wire")
    stage.begin("find_wire")
    stage.turn(LateSuccess(key, "do", 1, "late-w"))
    stage.succeed("find_wire", None)
    assert (stage.state, stage.due) == ("running", [("release", "undo")])
    stage.succeed("release")
    fold = stage.execution.fold
    assert (stage.state, fold.returned and fold.returned.output) == ("completed", "rejected")


def test_a_late_effect_whose_undo_a_person_skips_is_left() -> None:
    @saga.define(name="wires once")
    async def wires_once(n: int) -> None:
        with contextlib.suppress(StepFailed):
            await saga.step(wire, n)
        await saga.step(mail, n)

    stage = Stage(wires_once, 1)
    stage.turn()
    key = stage.key("wire")
    stage.doubt_until_given_up("wire")
    stage.succeed("find_wire", None)
    stage.turn(LateSuccess(key, "do", 1, "late-w"))
    stage.reject("release")
    stage.turn(Operate("skip", key, "ann", "written off"))
    stage.succeed("mail", "sent")
    assert (stage.state, stage.left) == ("completed", [("wire#0", "succeeded")])


def test_two_late_effects_of_one_step_are_each_undone() -> None:
    stage = Stage(forgiving, 1)
    key = _undone(stage)
    stage.turn(LateSuccess(key, "do", 1, "first"), LateSuccess(key, "do", 2, "second"))
    results = []
    for _ in range(3):
        results.append(stage.work[stage.key("refund")].call["a"]["result"])
        stage.succeed("refund")
    assert (results, stage.state) == ([None, "first", "second"], "completed")


def test_a_late_effect_after_the_end_is_handed_out_for_correction_once() -> None:
    stage = Stage(one_charge, 1)
    key = _undone(stage)
    stage.succeed("refund")
    stage.turn(LateSuccess(key, "do", 1, "late-c"))
    stage.turn()
    assert stage.state == "compensated"
    assert [(late.key, late.attempt, late.result) for late in stage.corrections] == [(key, 1, "late-c")]


def test_a_late_success_of_a_step_that_succeeded_anyway_changes_nothing() -> None:
    stage = Stage(three_in_a_row, 1)
    stage.turn()
    stage.doubt("reserve")
    key = stage.key("reserve")
    stage.succeed("reserve", "h")
    stage.turn(LateSuccess(key, "do", 1, "h"))
    assert (stage.state, stage.due) == ("running", [("charge", "do")])


def test_on_unknown_park_asks_a_person_before_anything_is_undone() -> None:
    @saga.define(name="one careful")
    async def one_careful(n: int) -> str:
        return await saga.step(careful, n)

    stage = Stage(one_careful, 1)
    stage.turn()
    stage.doubt_until_given_up("careful")
    assert (stage.state, stage.due) == ("parked", [])
