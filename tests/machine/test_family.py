"""What parent and child tell each other, message by message."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Any

from orchestrator import saga
from orchestrator.machine.journal import Arrival, AttemptEnded, Revoke
from orchestrator.machine.turn import Turn
from tests.machine.stage import Stage
from tests.machine.steps import look


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


def _told(turn: Turn, run_id: str) -> list[Arrival]:
    return [post.arrival for post in turn.posts if post.run_id == run_id]


def _child_of(parent: Stage, turn: Turn) -> Stage:
    (child,) = turn.children
    return _with_info(Stage(idle, 1, run_id=child.id), parent=parent.info.id)


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
