"""What parent and child tell each other, message by message."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

from orchestrator import saga
from orchestrator.machine.journal import Arrival, AttemptEnded, Operate, Revoke, Terminate
from orchestrator.machine.turn import Turn
from tests.machine.stage import Stage
from tests.machine.steps import charge, look, reserve


@saga.define
async def idle(n: int) -> int:
    return n


@saga.define
async def hurrying(n: int) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(saga.child(idle, n), 5)
    await saga.step(look, n)
    if n == 1:
        saga.continue_as_new(2)


@saga.define
async def failing(n: int) -> None:
    await saga.step(charge, n)
    await saga.step(look, n)


@saga.define
async def with_a_child_that_fails(n: int) -> None:
    await saga.step(reserve, n)
    await saga.child(failing, n)


def _told(turn: Turn, run_id: str) -> list[Arrival]:
    return [post.arrival for post in turn.posts if post.run_id == run_id]


def _child_of(parent: Stage, turn: Turn, of: saga.Saga[Any, Any] = idle) -> Stage:
    (child,) = turn.children
    return _with_info(Stage(of, 1, run_id=child.id), parent=parent.info.id)


def _with_info(stage: Stage, **changed: Any) -> Stage:
    stage.info = replace(stage.info, **changed)
    stage.reload()
    return stage


def test_what_a_child_answers_after_its_parent_went_on_as_new_does_not_count_for_the_next_child_of_that_key() -> None:
    parent = Stage(hurrying, 1)
    child = _child_of(parent, parent.turn())
    (done,) = _told(child.turn(), "run-1")
    (revoked,) = _told(parent.turn(at_s=5), child.info.id)
    (revoked_again,) = _told(parent.turn(done), child.info.id)
    parent.turn(*_told(child.turn(revoked), "run-1"))
    parent.succeed("look", 1)
    assert (revoked, revoked_again, parent.state) == (Revoke(), Revoke(), "continued")

    parent = _with_info(Stage(hurrying, 2), link=1)
    other = _child_of(parent, parent.turn())
    parent.turn(*_told(other.turn(), "run-1"))
    (revoked,) = _told(parent.reject("look"), other.info.id)
    (late,) = _told(child.turn(revoked_again), "run-1")
    assert isinstance(late, AttemptEnded) and (late.role, late.verdict) == ("undo", "succeeded")
    parent.turn(late)
    assert parent.state == "compensating", "its own child has not answered"
    parent.turn(*_told(other.turn(revoked), "run-1"))
    assert parent.state == "compensated"


def _under_way() -> tuple[Stage, Stage]:
    """Return a parent that has done something, and its child, which has done something as well."""
    parent = Stage(with_a_child_that_fails, 1)
    parent.turn()
    child = _child_of(parent, parent.succeed("reserve", "hold"), failing)
    child.turn()
    child.succeed("charge", "taken")
    return parent, child


def _undone(parent: Stage, failed: Turn) -> Stage:
    """Tell a parent how its child has failed, and let it undo what it did itself."""
    parent.turn(*_told(failed, "run-1"))
    parent.succeed("release")
    return parent


def test_the_parent_of_a_child_that_failed_and_is_undone_is_compensated() -> None:
    parent, child = _under_way()
    child.reject("look")
    assert _undone(parent, child.succeed("refund")).state == "compensated"


def test_who_awaits_a_child_in_which_a_person_skips_an_undo_is_not_compensated() -> None:
    parent, child = _under_way()
    child.reject("look")
    child.reject("refund")
    _undone(parent, child.turn(Operate("skip", f"{charge.name}#0")))
    assert (child.state, parent.state, len(parent.left)) == ("failed", "failed", 1)


def test_who_awaits_a_child_that_is_terminated_is_not_compensated_if_something_is_left() -> None:
    parent, child = _under_way()
    _undone(parent, child.turn(Terminate()))
    assert (child.state, parent.state, len(parent.left)) == ("terminated", "failed", 1)
