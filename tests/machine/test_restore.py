"""A restore of the database: what may have been done in the time that is forgotten is found out, never done on a guess.

The worker's side is lost with that time: what was due is taken away before a run hears of the restore.
"""

from __future__ import annotations

import asyncio

import pytest

from orchestrator import saga
from orchestrator.machine import restore
from orchestrator.machine.fold import Fold
from orchestrator.machine.journal import AttemptEnded, Cancel, Operate, Restore, Withdrawn, decode_entry
from tests.machine.stage import Stage
from tests.machine.steps import charge, look, reserve, settle, wire


@saga.define
async def reading(n: int) -> int:
    return await saga.step(look, n)


@saga.define
async def wiring(n: int) -> str:
    return await saga.step(wire, n)


@saga.define
async def wiring_twice(n: int) -> str:
    await saga.step(wire, n)
    return await saga.step(wire, n)


@saga.define
async def charging(n: int) -> str:
    return await saga.step(charge, n)


@saga.define
async def settling(n: int) -> str:
    return await saga.step(settle, n)


@saga.define
async def three_at_once(n: int) -> None:
    await asyncio.gather(saga.step(look, n), saga.step(wire, n), saga.step(charge, n))


@saga.define
async def one_after_the_other(n: int) -> None:
    await saga.step(reserve, n)
    raise ValueError("no")


@saga.define
async def with_a_child(n: int) -> None:
    await saga.step(look, n)
    await saga.child(charging, n)


def restored(stage: Stage) -> None:
    """Take the work away and tell the run, as `orchestrator.engine.restore` does."""
    stage.work.clear()
    stage.begun.clear()
    stage.reload()
    stage.turn(Restore("ann"))


def _restored(definition: object, begun: str = "") -> Stage:
    stage = Stage(definition, 1)  # type: ignore[arg-type]
    stage.turn()
    if begun:
        stage.begin(begun)
    restored(stage)
    return stage


def test_a_read_only_step_is_done_again() -> None:
    stage = _restored(reading)
    assert stage.due == [("look", "do")]
    stage.succeed("look", 1)
    assert stage.state == "completed"


def test_a_step_with_a_probe_that_was_done_is_not_done_again() -> None:
    stage = _restored(wiring, begun="wire")
    assert stage.due == [("find_wire", "probe")]
    stage.succeed("find_wire", "wire-1")
    assert (stage.state, stage.due) == ("completed", [])


def test_a_step_of_which_the_probe_knows_nothing_is_done_as_if_it_were_new() -> None:
    stage = _restored(wiring)
    stage.succeed("find_wire", None)
    assert stage.due == [("wire", "do")]
    stage.reject("wire")  # which says: no effect; nothing is in doubt any more
    assert (stage.state, "undoing" in stage.tags()) == ("failed", False)


@pytest.mark.parametrize("definition", [charging, settling])
def test_a_step_without_a_probe_waits_for_a_person(definition: object) -> None:
    stage = _restored(definition)
    assert (stage.state, stage.due) == ("parked", [])
    ((key, parked),) = stage.execution.fold.parked_keys.items()
    assert parked.why == restore.WHY
    stage.turn(Operate("resolve", key, "ann", "it is on the statement", "c"))
    assert stage.state == "completed"


def test_whoever_says_retry_has_it_done_and_its_outcome_stays_in_doubt() -> None:
    stage = _restored(charging)
    (key,) = stage.execution.fold.parked_keys
    stage.turn(Operate("retry", key, "ann", "they know the key"))
    assert stage.due == [("charge", "do")]
    while stage.due == [("charge", "do")]:
        stage.reject("charge")
    assert stage.due == [("refund", "undo")]


def test_what_a_run_asks_for_after_the_restore_may_have_been_done_too() -> None:
    stage = _restored(wiring_twice)
    stage.succeed("find_wire", "wire-1")
    assert stage.due == [("find_wire", "probe")]
    stage.reload()
    stage.succeed("find_wire", None)
    stage.succeed("wire", "wire-2")
    assert stage.state == "completed"


def test_only_what_was_in_flight_is_decided_anew() -> None:
    stage = Stage(three_at_once, 1)
    stage.turn()
    stage.succeed("wire", "wire-1")
    restored(stage)
    assert stage.due == [("look", "do")]
    assert [step.parked for step in stage.execution.fold.steps.values()] == ["", "", "do"]


def test_an_undo_is_done_again() -> None:
    stage = Stage(one_after_the_other, 1)
    stage.turn()
    stage.succeed("reserve", "h")
    restored(stage)
    assert stage.due == [("release", "undo")]
    stage.succeed("release")
    assert stage.state == "compensated"


def test_what_a_run_that_goes_back_had_in_flight_is_settled_as_unknown_and_undone() -> None:
    stage = Stage(charging, 1)
    stage.turn()
    stage.begin("charge")
    stage.turn(Cancel("ann"))
    restored(stage)
    assert stage.due == [("refund", "undo")]


def test_an_attempt_that_ended_badly_just_before_is_not_tried_again_on_a_guess() -> None:
    stage = Stage(charging, 1)
    stage.turn()
    ended = stage.end("charge", "doubt")
    stage.turn(ended, Restore("ann"))
    assert (stage.state, stage.due) == ("parked", [])


def test_work_that_was_never_begun_is_not_taken_for_undone() -> None:
    stage = _restored(charging)
    (key,) = stage.execution.fold.parked_keys
    stage.turn(Operate("retry", key, "ann", ""))
    stage.turn(Cancel("ann"))
    assert not [form for _, forms in stage.rows for form in forms if form.get("outcome") == "withdrawn"]
    assert stage.due == [("refund", "undo")]


def test_a_second_restore_does_no_harm() -> None:
    stage = _restored(wiring)
    restored(stage)
    stage.succeed("find_wire", None)
    restored(stage)
    assert stage.due == [("find_wire", "probe")]
    stage.succeed("find_wire", "wire-1")
    assert stage.state == "completed"


def test_a_child_that_is_born_later_hears_of_it_first() -> None:
    stage = _restored(with_a_child)
    turn = stage.succeed("look", 1)
    (child,) = turn.children
    assert [(post.run_id, post.arrival, post.anyone) for post in turn.posts] == [(child.id, Restore("ann"), True)]


def test_a_run_that_has_ended_does_not_mind() -> None:
    stage = Stage(reading, 1)
    stage.turn()
    stage.succeed("look", 1)
    assert stage.turn(Restore("ann")).entries == []


def test_the_journal_alone_tells_it() -> None:
    stage = _restored(wiring_twice)
    stage.succeed("find_wire", None)
    stage.succeed("wire", "wire-1")
    fold = Fold(stage.info)
    for at, forms in stage.rows:
        fold.apply_row(at, map(decode_entry, forms))
    assert [(step.forward, step.forgotten, step.doubt) for step in fold.steps.values()] == [
        (step.forward, step.forgotten, step.doubt) for step in stage.execution.fold.steps.values()
    ]


@pytest.mark.parametrize("begun", [False, True])
def test_what_is_said_beforehand_is_what_is_done(begun: bool) -> None:
    stage = Stage(three_at_once, 1)
    stage.turn()
    fold = stage.execution.fold
    fates = {step.asked.task.rpartition(".")[2]: restore.fate(fold, step) for step in restore.in_flight(fold)}
    assert fates == {"look": "repeated", "wire": "probed", "charge": "parked"}
    restored(stage)
    assert stage.due == [("look", "do"), ("find_wire", "probe")]


def test_an_outcome_that_comes_from_the_forgotten_time_changes_nothing() -> None:
    stage = _restored(charging)
    (key,) = stage.execution.fold.parked_keys
    stage.turn(AttemptEnded(key, "do", 1, "succeeded", "c"), Withdrawn(key))
    assert stage.state == "parked"
