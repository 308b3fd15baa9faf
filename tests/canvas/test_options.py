"""Options of signatures are honoured or refused by name; what makes no sense is refused before anything is started."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

import pytest
from celery import chain, chord, group

from orchestrator import PayloadError, UsageError, durable, saga, testing
from orchestrator.canvas.starting import run_canvas
from orchestrator.machine.journal import Asked
from orchestrator.testing.result import STARTED
from tests.canvas.tasks import Order, add, fail, price, same, say, take, total


def asked(run: testing.TestRun) -> list[Asked]:
    return [entry for entry in run.entries if isinstance(entry, Asked)]


# -- honoured ----------------------------------------------------------------------------------------------------------
def test_a_link_has_its_queue_and_priority() -> None:
    run = testing.run(durable(chain(same.s(1).set(queue="fast", priority=7), same.s(), same.s().set(priority=0))))
    assert [(entry.queue, entry.priority) for entry in asked(run)] == [("fast", 7), ("celery", 0), ("celery", 0)]


def test_a_declared_step_in_a_canvas_has_the_queue_and_priority_of_its_signature() -> None:
    run = testing.run(durable(take.s(Order(id="7", cents=1)).set(queue="fast", priority=7)))
    assert [(entry.queue, entry.priority, entry.effect) for entry in asked(run)] == [("fast", 7, "compensatable")]


def test_queue_and_priority_of_a_canvas_are_those_of_the_links_that_name_none() -> None:
    canvas = chord([same.s(1), same.s(2).set(queue="own")], total.s()).set(queue="all", priority=2)
    run = testing.run(durable(canvas))
    assert [(entry.queue, entry.priority) for entry in asked(run)] == [("all", 2), ("own", 2), ("all", 2)]


def test_a_countdown_passes_before_a_link_begins_and_holds_up_nothing_else() -> None:
    run = testing.run(durable(group(chain(same.s(1), same.s().set(countdown=60)), say.s("at once"))))
    assert run.duration == timedelta(seconds=60)
    run = testing.run(durable(chord([same.s(1)], total.s()).set(countdown=timedelta(minutes=5))))
    assert run.duration == timedelta(minutes=5)


@pytest.mark.parametrize("form", [lambda at: at, datetime.isoformat])
def test_a_link_begins_at_its_eta(form: Any) -> None:
    run = testing.run(durable(same.s(1).set(eta=form(STARTED + timedelta(hours=2)))))
    assert (run.result(), run.duration) == (1, timedelta(hours=2))


def test_an_option_that_is_none_is_none() -> None:
    assert testing.run(durable(same.s(1).set(expires=None, queue=None))).result() == 1


# -- refused -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "option", ["expires", "time_limit", "soft_time_limit", "task_id", "serializer", "routing_key", "headers", "stamp"]
)
@pytest.mark.parametrize("where", [lambda sig: sig, lambda sig: chain(same.s(1), sig), lambda sig: group([sig])])
def test_any_other_option_is_refused_by_its_name(option: str, where: Any) -> None:
    with pytest.raises(UsageError, match=rf"option {option}= of canvas\.same has no meaning"):
        durable(where(same.s(1).set(**{option: 1})))


@pytest.mark.parametrize("make", [lambda: chain(same.s(1), same.s()), lambda: group(same.s(1)), lambda: same.s(1)])
def test_a_frozen_canvas_is_refused_because_its_ids_would_never_be_known(make: Any) -> None:
    frozen = make()
    frozen.freeze()
    with pytest.raises(UsageError, match=r"option task_id= .* give the run its id"):
        durable(frozen)


MALFORMED: dict[str, Any] = {
    "None": None,
    "text": "canvas.same",
    "a list": [same.s(1)],
    "a task": same,
    "no task": {"args": [1]},
    "a task that is no text": {"task": 7},
    "a name with a NUL": {"task": "a\0b"},
    "a name too long": {"task": "x" * 501},
    "an unknown type": {"task": "x", "subtask_type": "barrier"},
    "a task of Celery's own": {"task": "celery.accumulate"},
    "a task of this package": {"task": "orchestrator.drain"},
    "an empty chain": {"task": "celery.chain", "subtask_type": "chain", "kwargs": {"tasks": []}},
    "a chain without tasks": {"task": "celery.chain", "subtask_type": "chain"},
    "a chain of text": {"task": "celery.chain", "subtask_type": "chain", "kwargs": {"tasks": "abc"}},
    "a chain of numbers": {"task": "celery.chain", "subtask_type": "chain", "kwargs": {"tasks": [1]}},
    "a chord without a body": chord([same.s(1)]),
    "a chord with an empty body": chord([same.s(1)], chain()),
    "a chord without a header": {"task": "celery.chord", "subtask_type": "chord", "kwargs": {"body": same.s()}},
    "kwargs that are a list": {"task": "x", "kwargs": [1]},
    "args that are a number": {"task": "x", "args": 1},
    "options that are a list": {"task": "x", "options": [1]},
    "a queue that is a number": {"task": "x", "options": {"queue": 7}},
    "a priority out of range": {"task": "x", "options": {"priority": 10}},
    "a negative countdown": {"task": "x", "options": {"countdown": -1}},
    "a countdown without end": {"task": "x", "options": {"countdown": float("inf")}},
    "an eta that is text": {"task": "x", "options": {"eta": "soon"}},
    "an eta without a zone": {"task": "x", "options": {"eta": datetime(2026, 1, 1)}},
    "a callback that is no signature": {"task": "x", "options": {"link": [1]}},
    "chunks of nothing": {"task": "celery.chunks", "kwargs": {"task": same.s(), "it": [1], "n": 0}},
    "a map without items": {"task": "celery.map", "kwargs": {"task": same.s()}},
    "a starmap of numbers": {"task": "celery.starmap", "kwargs": {"task": same.s(), "it": [1]}},
}


@pytest.mark.parametrize("which", MALFORMED)
def test_what_makes_no_sense_is_refused(which: str) -> None:
    with pytest.raises((UsageError, PayloadError)):
        durable(MALFORMED[which])


@pytest.mark.parametrize(
    "value", [object(), float("nan"), iter([1]), "a\0b", "\ud800", 10**5000], ids=lambda value: type(value).__name__
)
def test_an_argument_that_cannot_be_stored_is_refused(value: Any) -> None:
    with pytest.raises(PayloadError):
        testing.run(durable(chain(same.s(1), same.si(value))))


def test_a_canvas_that_contains_itself_is_refused() -> None:
    circle: dict[str, Any] = {"task": "celery.chain", "subtask_type": "chain", "kwargs": {"tasks": []}}
    circle["kwargs"]["tasks"].append(circle)
    with pytest.raises(PayloadError, match="contains itself"):
        durable(circle)


def test_a_canvas_that_is_too_deep_or_too_large_is_refused() -> None:
    deep = same.s(1)
    for _ in range(60):
        deep = group(same.s(1), chain(same.s(1), deep))
    with pytest.raises(PayloadError, match="nests deeper"):
        testing.run(durable(deep))
    with pytest.raises(PayloadError, match="limit"):
        testing.run(durable(group(same.s("x" * 1000) for _ in range(300))))


@pytest.mark.timeout(30)  # it was exponential once
@pytest.mark.parametrize("depth", [55, 1000])
@pytest.mark.parametrize("kind", ["chain", "group", "each", "link", "link_error"])
def test_a_stored_form_that_is_too_deep_is_refused_at_once(kind: str, depth: int) -> None:
    form: dict[str, Any] = {"task": "x"}
    for _ in range(depth):
        form = {kind: [form]} if kind in ("chain", "group", "each") else {"task": "x", kind: [form]}
    with pytest.raises(PayloadError):
        run_canvas.codec.encode_call((form,), {}, from_json=True)


def test_many_groups_in_a_row_are_not_deep() -> None:
    canvas = same.s(1)
    for _ in range(20):  # Celery makes them 20 chords in each other, about 140 levels of JSON
        canvas = canvas | group(add.s(1), add.s(1)) | total.s()
    assert testing.run(durable(canvas), replay=False).state == "completed"


# -- where it is started -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("start", [run_canvas.delay, lambda form: testing.run(run_canvas, form)])
@pytest.mark.parametrize(
    "form",
    [
        1,
        {},
        {"chain": 1},
        {"task": 7},
        {"chain": [{}]},
        {"task": "x", "other": 1},
        {"task": "a\0b"},
        {"task": "orchestrator.drain"},
        {"task": "celery.backend_cleanup"},
    ],
)
def test_a_stored_form_that_makes_no_sense_starts_nothing(start: Any, form: Any) -> None:
    with pytest.raises(PayloadError):
        start(form)


def test_a_canvas_is_started_from_its_stored_form_by_a_message_of_any_language() -> None:
    form = json.loads('{"chain": [{"task": "canvas.add", "args": [1, 2]}, {"task": "canvas.same"}]}')
    encoded = run_canvas.codec.encode_call((form,), {}, from_json=True)
    assert encoded == {"canvas": durable(chain(add.s(1, 2), same.s())).form}


@saga.define(name="canvas.starts")
async def starts(how: str) -> Any:
    if how == "delay":
        return durable(same.s(1)).delay()
    return await saga.step(chain(same.s(1), same.s().set(expires=1)))


def test_saga_code_runs_a_canvas_as_a_step_and_is_told_so() -> None:
    run = testing.run(starts, "delay")
    assert run.state == "parked" and "await saga.step(signature)" in run.error["message"]  # type: ignore[index]


def test_a_refused_canvas_in_saga_code_is_an_error_of_the_code() -> None:
    run = testing.run(starts, "refused")
    assert run.state == "parked" and "option expires=" in run.error["message"]  # type: ignore[index]


@pytest.mark.parametrize("option", ["expires", "serializer", "chain", "nonsense"])
def test_an_option_of_a_start_that_would_be_ignored_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match=f"option {option}= has no meaning"):
        durable(same.s(1)).apply_async(**{option: 1})


@pytest.mark.parametrize("option", ["link", "link_error", "chain", "chord"])
def test_a_saga_still_refuses_canvas_options_and_names_durable(option: str, own_app: None) -> None:
    with pytest.raises(UsageError, match=r"orchestrator\.durable"):
        run_canvas.apply_async(({"task": "x"},), **{option: fail.s()})


# -- before an app is bound --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "join",
    [
        lambda: take.s(Order(id="7", cents=1)) | price.s(),
        lambda: chain(take.s(Order(id="7", cents=1)), price.s()),
        lambda: same.s(1) | price.s(),
        lambda: price.s(Order(id="7", cents=1)) | same.s(),
        lambda: chain(same.s(1), same.s(), price.s()),
    ],
)
def test_steps_that_belong_to_no_app_yet_are_not_joined_because_one_would_be_lost(
    join: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in (take, price):
        monkeypatch.setattr(each, "bound", None)
    with pytest.raises(UsageError, match=r"create `Orchestrator\(app\)` first"):
        join()
    assert testing.run(durable(group([take.s(Order(id="7", cents=1)), same.s(2)]))).state == "completed"
