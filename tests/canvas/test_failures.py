"""What a link that fails does to its canvas: who hears of it, what else runs, what is undone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from celery import chain, chord, group

from orchestrator import Rejected, RetryPolicy, SagaFailed, StepFailed, durable, saga, testing
from orchestrator.canvas import walking
from orchestrator.canvas.telling import FAILURE
from orchestrator.step import registry
from tests.canvas.tasks import (
    Order,
    add,
    fail,
    hear,
    hear_bound,
    hear_error,
    note,
    note_error,
    refuse,
    same,
    say,
    take,
    total,
)  # fmt: skip

ONCE = RetryPolicy(maximum_attempts=1)
PLACES: dict[str, Callable[[Any], Any]] = {
    "alone": lambda bad: bad,
    "first in a chain": lambda bad: chain(bad, say.s()),
    "in the middle of a chain": lambda bad: chain(same.s(1), bad, say.s()),
    "last in a chain": lambda bad: chain(same.s(1), bad),
    "in a group": lambda bad: group(same.s(1), bad, same.s(2)),
    "in a header": lambda bad: chord([same.s(1), bad], say.s()),
    "in a body": lambda bad: chord([same.s(1), same.s(2)], bad),
    "in a chain in a header": lambda bad: chord([chain(same.s(1), bad, say.s())], say.s()),
    "in a chain as a body": lambda bad: chord([same.s(1)], chain(same.s(), bad, say.s())),
    "in a group in a chain": lambda bad: chain(same.s(1), group(same.s(), bad), say.s()),
    "in a group in a group": lambda bad: group(same.s(1), group(same.s(2), bad)),
    "in a chord in a chain": lambda bad: chain(same.s(1), chord([same.s(), bad], say.s()), say.s()),
    "in a chord in a chord": lambda bad: chord([chord([bad], say.s()), same.s(1)], say.s()),
    "in a map": lambda bad: fail.map([1, 2]),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_failing_link_fails_the_canvas_with_its_error_and_nothing_follows_it(place: str, said: list[Any]) -> None:
    run = testing.run(durable(PLACES[place](fail.s()), retry=ONCE))
    assert run.state == "failed"
    with pytest.raises(SagaFailed, match=r"canvas\.fail#0 .* ValueError: boom"):
        run.result()
    assert said == []


@pytest.mark.parametrize("place", PLACES)
def test_a_handler_of_the_canvas_fires_exactly_once_and_hears_which_link_it_was(place: str, said: list[Any]) -> None:
    run = testing.run(durable(chain([PLACES[place](fail.s())]).on_error(hear.s()), retry=ONCE))
    assert run.state == "failed"
    (failed,) = {call.key for call in run.calls if call.name == "canvas.fail"}
    assert said == [f"test-run:{failed}"]


@pytest.mark.parametrize("place", PLACES)
def test_a_handler_given_at_the_start_fires_exactly_once(place: str, said: list[Any]) -> None:
    canvas = durable(PLACES[place](fail.s()), retry=ONCE)
    run = testing.run(canvas.with_callbacks(link_error=hear.s()))
    assert run.state == "failed" and len(said) == 1


def test_no_handler_fires_when_nothing_fails(said: list[Any]) -> None:
    run = testing.run(
        durable(chain([chord([same.s(1).on_error(hear.s())], total.s().on_error(hear.s()))]).on_error(hear.s()))
    )
    assert (run.result(), said) == (1, [])


def test_a_handler_gets_what_its_kind_expects(said: list[Any]) -> None:
    for handler in (hear.s(), hear_bound.s(), hear_error.s(), hear_error.s(1), hear.si("fixed"), note.s(),
                    note_error.s()):  # fmt: skip
        assert testing.run(durable(fail.s().on_error(handler), retry=ONCE)).state == "failed"
    name = "test-run:canvas.fail#0"
    assert said == [
        name, name, (name, ValueError, "boom", True), (name, ValueError, "boom", True, 1), "fixed",
        f"note {name}", ("canvas.fail", "ValueError", "boom"),
    ]  # fmt: skip


@pytest.mark.parametrize("forged", [1, {}, {"id": 1}, {"id": 1, "root_id": 1, "task": 1, "error": 1}])
def test_what_only_looks_like_a_failure_is_an_argument_like_any_other(forged: Any) -> None:
    assert testing.run(durable(same.s({FAILURE: forged}))).result() == {FAILURE: forged}
    assert testing.run(durable(note.s({FAILURE: forged}))).error["type"] == "PayloadError"  # type: ignore[index]


def test_an_error_whose_class_is_not_known_here_comes_as_one_of_its_name(said: list[Any]) -> None:
    class FormerError(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    testing.run(durable(fail.s().on_error(hear_error.s()), retry=ONCE), stubs={fail: FormerError(1, 2)})
    ((_, kind, message, _),) = said
    assert issubclass(kind, Exception) and kind.__name__.endswith("FormerError") and message == "1 and 2"


def test_a_handler_may_be_a_chain_or_a_group(said: list[Any]) -> None:
    both = fail.s().on_error(chain(same.s(), say.s()))
    both.link_error(group(say.si("a"), say.si("b")))
    testing.run(durable(both, retry=ONCE))
    assert sorted(map(str, said)) == ["a", "b", "test-run:canvas.fail#0"]


def test_the_handler_of_each_member_of_a_group_hears_of_its_own_member(said: list[Any]) -> None:
    members = group(fail.s(n).on_error(hear_error.s(n)) for n in range(3))
    testing.run(durable(members, retry=ONCE))
    assert sorted(more for *_, more in said) == [0, 1, 2]


def test_a_handler_of_a_body_hears_once_of_a_header_that_failed_in_many_places(said: list[Any]) -> None:
    testing.run(durable(chord([fail.s(n) for n in range(3)], same.s().on_error(hear.s())), retry=ONCE))
    assert len(said) == 1


def test_a_handler_of_a_body_does_not_hear_of_what_comes_after_it(said: list[Any]) -> None:
    testing.run(durable(chord([same.s(1)], same.s().on_error(hear.s())) | fail.s(), retry=ONCE))
    assert said == []


def test_a_handler_that_is_on_header_and_body_fires_once(said: list[Any]) -> None:
    header = fail.s().on_error(say.si("x"))
    testing.run(durable(chord([header, same.s(1)], same.s().on_error(say.s("x"))), retry=ONCE))
    assert said == ["x"]


def test_a_handler_that_fails_is_on_record_and_the_canvas_fails_with_the_error_of_its_link() -> None:
    run = testing.run(durable(chain(fail.s(), same.s()).on_error(refuse.s()), retry=ONCE))
    assert run.state == "failed" and "boom" in run.error["message"]  # type: ignore[index]
    assert [call.name for call in run.calls] == ["canvas.fail", "canvas.refuse"]


def test_a_handler_that_stumbles_is_tried_again_and_the_canvas_ends_after_it() -> None:
    run = testing.run(
        durable(chain(fail.s(), same.s()).on_error(hear.s())), stubs={hear: [ConnectionError("no"), None]}
    )
    assert run.state == "failed" and "boom" in run.error["message"]  # type: ignore[index]
    assert len({call.key for call in run.calls if call.name == "canvas.hear"}) == 1
    assert [call.error is None for call in run.calls if call.name == "canvas.hear"] == [False, True]


BODIES: dict[str, Callable[[], Any]] = {
    "a task": lambda: say.s(),
    "a chain": lambda: chain(same.s(), say.s()),
    "a group": lambda: group(say.s(), say.s()),
    "a chord": lambda: chord([say.s()], say.s()),
}


@pytest.mark.parametrize("body", BODIES)
def test_when_a_header_fails_nothing_of_the_body_runs_whatever_it_is(body: str, said: list[Any]) -> None:
    whole = chord([same.s(1), fail.s(), fail.s()], BODIES[body]())
    run = testing.run(durable(chain(same.s(1), whole).on_error(hear.s()), retry=ONCE))
    assert run.state == "failed" and len(said) == 1
    assert {call.name for call in run.calls} == {"canvas.same", "canvas.fail", "canvas.hear"}


def test_a_callback_gets_the_result_and_its_failure_changes_nothing(said: list[Any]) -> None:
    first = add.s(1, 1)
    first.link(say.s())
    first.link(fail.s())
    last = add.s(1)
    whole = chain(first, last)
    whole.link(say.s())
    run = testing.run(durable(whole, retry=ONCE))
    assert (run.result(), sorted(said)) == (3, [2, 3])
    assert [item["key"] for item in run.left] == ["1/canvas.fail#0"]  # type: ignore[index,call-overload]


def test_callbacks_are_told_the_result_of_what_they_are_attached_to(said: list[Any]) -> None:
    inner = chain(add.s(1), add.s(1))
    inner.link(say.s("inner chain"))
    members = group(same.s(7), same.s(8))
    for member in members.tasks:
        member.link(say.s("member"))
    members.link(say.s("group"))  # Celery puts it on the first member, and makes it immutable
    joined = chord([same.s(1), same.s(2)], total.s())
    joined.link(say.s("chord"))  # ... and this one on the body
    for canvas in (chain(same.s(1), inner, add.s(1)), members, joined):
        testing.run(durable(canvas))
    assert sorted(said, key=str) == [(3, "chord"), (3, "inner chain"), (7, "member"), (8, "member"), "group"]


def test_callbacks_end_before_a_canvas_that_fails() -> None:
    first = same.s(1)
    first.link(say.s())
    run = testing.run(durable(chain(first, fail.s()), retry=ONCE), stubs={say: testing.After(timedelta(minutes=1))})
    assert run.state == "failed" and run.duration >= timedelta(minutes=1)


def test_the_other_members_of_a_group_run_to_their_end(said: list[Any]) -> None:
    run = testing.run(durable(group(fail.s(), chain(same.s(1), same.s(), say.s()))), stubs={fail: Rejected("no")})
    assert run.state == "failed" and said == [1]


def test_of_several_failures_in_a_group_the_first_in_its_order_is_reported() -> None:
    slow = testing.After(timedelta(minutes=1), Rejected("slow"))
    run = testing.run(durable(group(fail.s(), refuse.s(1))), stubs={fail: slow, refuse: Rejected("fast")})
    assert "slow" in run.error["message"]  # type: ignore[index]


def test_steps_are_undone_and_plain_tasks_are_listed_as_left(said: list[Any]) -> None:
    order = Order(id="7", cents=1)
    run = testing.run(durable(chain(take.s(order), same.s(), refuse.s())))
    assert run.state == "compensated"
    assert said == ["take 7", "put back 7, 1 cents"]
    assert [item["key"] for item in run.left] == ["canvas.same#0"]  # type: ignore[index,call-overload]


def test_a_link_is_tried_again_by_its_policy_and_by_default_like_any_plain_task() -> None:
    assert len(testing.run(durable(fail.s())).calls) == 5
    assert len(testing.run(durable(fail.s(), retry=RetryPolicy(maximum_attempts=3))).calls) == 3
    run = testing.run(durable(chain(fail.s(), same.s())), stubs={fail: [ValueError("once"), 8]})
    assert run.result() == 8


def test_a_link_parks_on_demand_and_its_retry_lets_the_canvas_go_on() -> None:
    canvas = durable(chain(same.s(1), fail.s(), add.s(1)), retry=ONCE, on_unknown="park")
    run = testing.run(canvas, stubs={fail: [ValueError("down"), 41]})
    assert run.state == "parked"
    assert run.retry("canvas.fail#0").result() == 42
    assert [call.name for call in run.calls] == ["canvas.same", "canvas.fail", "canvas.fail", "canvas.add"]


def test_a_parked_link_that_is_skipped_has_failed_and_one_that_is_resolved_has_its_result(said: list[Any]) -> None:
    canvas = durable(chain(fail.s(), add.s(1)).on_error(hear.s()), retry=ONCE, on_unknown="park")
    assert testing.run(canvas).skip("canvas.fail#0").state == "failed"
    assert said == ["test-run:canvas.fail#0"]
    assert testing.run(canvas).resolve("canvas.fail#0", 1).result() == 2


def test_a_worker_that_does_not_import_a_declared_step_never_runs_it_without_its_undo(
    said: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    canvas = durable(chain(same.s({"id": "7", "cents": 1}), take.s()))
    with monkeypatch.context() as worker:
        worker.delitem(registry.steps, "canvas.take")
        run = testing.run(canvas)
        assert run.state == "parked" and "canvas.take is a declared step" in run.error["message"]  # type: ignore[index]
        assert said == []
    assert run.retry().state == "completed"
    assert said == ["take 7"]


def test_arguments_that_a_step_does_not_take_fail_its_link(said: list[Any]) -> None:
    run = testing.run(durable(chain(same.s(1), note.s(2)).on_error(say.si("told"))))
    assert run.state == "failed" and "canvas.note cannot be called like that" in run.error["message"]  # type: ignore[index]
    assert said == ["told"]


def test_what_a_handler_was_told_is_told_again_by_a_release_whose_lines_have_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history = testing.run(durable(chain(same.s(1), note.s(2)).on_error(hear.s()))).history
    value = walking._Walk._value

    async def moved(*args: Any, **kwargs: Any) -> Any:
        return await value(*args, **kwargs)  # a line more in every traceback

    monkeypatch.setattr(walking._Walk, "_value", moved)
    testing.replay(history)


def test_results_that_are_too_large_together_fail_the_body(said: list[Any]) -> None:
    canvas = durable(chord([same.s(n) for n in range(3)], same.s().on_error(say.si("told"))))
    run = testing.run(canvas, stubs={same: "x" * 100_000})
    assert run.state == "failed" and run.error["type"] == "PayloadError"  # type: ignore[index]
    assert said == ["told"]


# -- in a saga ---------------------------------------------------------------------------------------------------------
@saga.define(name="canvas.saga")
async def with_canvas(order: Order, fails: bool) -> Any:
    """Takes, then runs a canvas that may fail, then goes on."""
    taken = await saga.step(take.s(order).set(priority=3))
    assert isinstance(taken, Order)
    canvas = chord([same.s(taken), same.s(2)], (fail.s() if fails else same.s()).on_error(hear.s()))
    try:
        return await saga.step(canvas)
    except StepFailed as failure:
        return failure.error_type


@saga.define(name="canvas.unawaited")
async def unawaited(how: str) -> str:
    canvas = chain(take.s(Order(id="7", cents=1)), same.s().set(countdown=60), fail.s() if how == "fails" else say.s())
    running = saga.step(canvas)
    await saga.step(same.s("first"))
    if how == "given up":
        running.cancel()
    if how == "raises":
        raise RuntimeError("by itself")
    return "done"


def test_a_canvas_that_nobody_awaits_is_awaited_by_the_engine(said: list[Any]) -> None:
    assert testing.run(unawaited, "succeeds").result() == "done"
    assert said == ["take 7", {"id": "7", "cents": 1}]


def test_a_failure_of_a_canvas_that_nobody_saw_is_that_of_the_run(said: list[Any]) -> None:
    run = testing.run(unawaited, "fails")
    assert run.state == "compensated" and "boom" in run.error["message"]  # type: ignore[index]
    assert said == ["take 7", "put back 7, 1 cents"]


@pytest.mark.parametrize(("how", "state"), [("given up", "completed"), ("raises", "compensated")])
def test_a_canvas_that_is_given_up_stops_and_is_undone(said: list[Any], how: str, state: str) -> None:
    run = testing.run(unawaited, how)
    assert run.state == state and run.duration == timedelta(0)
    assert said == ["take 7", "put back 7, 1 cents"]


@saga.define(name="canvas.in_scope")
async def in_scope() -> str:
    await saga.step(take, Order(id="before", cents=1))
    try:
        async with saga.scope():
            await saga.step(chain(take.s(Order(id="within", cents=1)), refuse.s()))
    except StepFailed as failure:
        return failure.error_type
    return "not reached"


def test_a_canvas_that_fails_in_a_scope_is_undone_and_what_was_before_stays(said: list[Any]) -> None:
    assert testing.run(in_scope).result() == "Rejected"
    assert said == ["take before", "take within", "put back within, 1 cents"]


def test_a_canvas_is_a_step_of_a_saga() -> None:
    order = Order(id="7", cents=1)
    assert testing.run(with_canvas, order, False).result() == [{"id": "7", "cents": 1}, 2]


def test_saga_code_may_go_on_after_a_canvas_that_failed(said: list[Any]) -> None:
    run = testing.run(with_canvas, Order(id="7", cents=1), True)
    assert (run.result(), len(said)) == ("ValueError", 2)
