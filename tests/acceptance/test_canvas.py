"""Celery's canvas on real workers: results, failures, handlers, kills, and what an operator can do."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest
from celery import chain, chord, group

from orchestrator import ConflictError, RetryPolicy, SagaFailed, UsageError, durable
from orchestrator.canvas.starting import run_canvas
from tests.acceptance.app import app, orchestrator
from tests.acceptance.links import (
    act,
    add,
    adds_to_chord,
    canvas_between,
    elsewhere,
    hear,
    hear_error,
    hear_slowly,
    kinds,
    last,
    replaced,
    total,
)
from tests.acceptance.running import Worker, World, until
from tests.acceptance.steps import QUICK, Plan

ONCE = RetryPolicy(maximum_attempts=1)
TYPED = [Decimal("9.90"), datetime(2026, 1, 31, tzinfo=UTC), UUID(int=7), b"\xff"]


@pytest.fixture(autouse=True)
def canvas_bound(bound: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_canvas, "starter", orchestrator)


def heard(world: World, run: Any) -> list[str]:
    return [effect.name for effect in world.effects(run) if effect.what == "heard"]


# -- results -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: chain(add.s(1, 1), add.s(2), add.s(3)), 7),
        (lambda: group(add.s(n, n) for n in range(4)), [0, 2, 4, 6]),
        (lambda: chord([add.s(1, 2), add.s(3, 4)], total.s()), 10),
        (lambda: chain(add.s(1, 1), group(add.s(1), add.s(2)), total.s(), add.s(10)), 17),
        (lambda: chain(add.s(1, 1), chord([add.s(1), chain(add.s(2), add.s(3))], total.s()), add.s(1)), 11),
        (lambda: group(group(add.s(1), add.s(2)), add.s(3)), [1, 2, 3]),
        (lambda: group(add.s(1, 2) | group(add.s(1), add.s(2))), [4, 5]),
        (lambda: chord([add.s(2, 5)], total.s()), 7),
        (lambda: chord([group(add.s(1), add.s(2)), add.s(3)], total.s()), 6),
        (lambda: add.starmap([(1, 2), (3, 4)]), [3, 7]),
        (lambda: chain(kinds.s(TYPED, more=TYPED[0])), [TYPED, ["Decimal", "datetime", "UUID", "bytes", "Decimal"]]),
        (lambda: chain(kinds.s(TYPED), last.s(), kinds.s()), [["Decimal", "datetime", "UUID", "bytes"], ["str"] * 4]),
    ],
    ids=[
        "chain",
        "group",
        "chord",
        "group in chain",
        "chord in chain",
        "group in group",
        "group of one chain",
        "header of one",
        "group in header",
        "starmap",
        "values that JSON has no words for",
        "what becomes of them",
    ],
)
def test_a_canvas_gives_what_celery_gives(worker: Worker, make: Callable[[], Any], expected: Any) -> None:
    assert durable(make()).delay().get(timeout=60) == expected
    assert make().apply_async().get(timeout=60) == expected, "by Celery itself, on the same worker"


def test_a_group_of_a_thousand_tasks(worker: Worker) -> None:
    canvas = group(add.s(n) for n in range(1000)) | total.s()
    assert durable(canvas).delay().get(timeout=60) == 499_500


def test_options_of_the_start_are_those_of_a_saga(worker: Worker, sql_of: psycopg.Connection[Any]) -> None:
    canvas = durable(add.s(1))
    result = canvas.apply_async((2,), task_id="canvas-1", priority=7)
    assert result.id == "canvas-1" and result.get(timeout=30) == 3
    assert canvas.AsyncResult("canvas-1").status == "completed"
    assert canvas.apply_async((2,), task_id="canvas-1").id == "canvas-1"
    with pytest.raises(ConflictError):
        canvas.apply_async((3,), task_id="canvas-1")


def test_a_canvas_starts_with_the_transaction_of_its_caller(worker: Worker, sql_of: psycopg.Connection[Any]) -> None:
    sql_of.autocommit = False
    rolled_back = durable(add.s(1, 2)).apply_async(transaction=sql_of)
    sql_of.rollback()
    committed = durable(add.s(1, 2)).apply_async(transaction=sql_of)
    sql_of.commit()
    assert committed.get(timeout=30) == 3
    found = sql_of.execute("SELECT count(*) FROM orchestrator.runs WHERE id = %s", [rolled_back.id]).fetchone()
    assert found == (0,)


def test_a_message_starts_a_canvas(worker: Worker) -> None:
    form = {"chain": [{"task": "links.add", "args": [1, 2]}, {"task": "links.add", "args": [3]}]}
    message = app.send_task("orchestrator.canvas", [form], queue=worker.queue)
    result = run_canvas.AsyncResult(message.id)
    until(lambda: message.id in _runs(message.id), "the run")
    assert result.get(timeout=30) == 6


def _runs(run_id: str) -> set[str]:
    with orchestrator.client.pool.connection() as connection:
        return {row[0] for row in connection.execute("SELECT id FROM orchestrator.runs WHERE id = %s", [run_id])}


# -- tasks that change their canvas ------------------------------------------------------------------------------------
REPLACED = {"a task": 3, "a chain": 4, "a group": [3, 4], "a chord": 7, "itself": 3, "a step": "2 done"}


@pytest.mark.parametrize("by", REPLACED)
@pytest.mark.parametrize(
    "place",
    [
        lambda link: chain(add.s(1, 1), link),
        lambda link: chain(add.s(1, 1), group(add.s(1), link), last.s()),
        lambda link: chord([add.s(1, 1)], chain(last.s(), link)),
    ],
    ids=["in a chain", "in a header", "in a body"],
)
def test_what_replaces_a_link_gives_its_result(worker: Worker, place: Callable[[Any], Any], by: str) -> None:
    assert durable(place(replaced.s(by))).delay().get(timeout=30) == REPLACED[by]


def test_a_replacement_that_fails_is_a_failed_attempt_of_its_link(worker: Worker, world: World) -> None:
    result = durable(chain(add.s(1, 1), replaced.s("what fails"), add.s(1)), retry=ONCE).apply_async(
        link_error=hear.s()
    )
    with pytest.raises(SagaFailed, match=r"links\.replaced#0 .* RuntimeError: do of bad failed"):
        result.get(timeout=30)
    assert heard(world, result) == [f"{result}:links.replaced#0"]


def test_no_link_can_be_added_to_a_header_that_runs(worker: Worker) -> None:
    result = durable(chord([adds_to_chord.s()], total.s()), retry=ONCE).delay()
    with pytest.raises(SagaFailed, match="ValueError: Current task is not member of any chord"):
        result.get(timeout=30)


# -- tasks that are not there, and queues ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make",
    [
        lambda missing: chain(add.s(1, 1), missing),
        lambda missing: chord([add.s(1, 1)], missing),
        lambda missing: chain([add.s(1, 1)]).on_error(missing),
    ],
)
def test_an_unregistered_task_is_refused_by_its_name_and_nothing_is_started(
    worker: Worker, sql_of: psycopg.Connection[Any], make: Callable[[Any], Any]
) -> None:
    before = sql_of.execute("SELECT count(*) FROM orchestrator.runs").fetchone()
    with pytest.raises(UsageError, match=r"no task named links\.missing is registered"):
        durable(make(app.signature("links.missing"))).delay()
    assert sql_of.execute("SELECT count(*) FROM orchestrator.runs").fetchone() == before


def test_a_task_that_only_a_living_worker_knows_is_accepted(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(app._tasks, "links.add")
    monkeypatch.setattr(app.loader, "import_default_modules", lambda: None)
    assert durable(app.signature("links.add", args=(1, 2))).delay().get(timeout=30) == 3


def test_a_link_waits_on_the_queue_that_its_task_names(worker: Worker, sql_of: psycopg.Connection[Any]) -> None:
    result = durable(chain(add.si(1, 2), elsewhere.si())).delay()
    found = until(
        lambda: sql_of.execute(
            "SELECT queue FROM orchestrator.work WHERE run_id = %s AND target = 'links.elsewhere'", [result.id]
        ).fetchone(),
        "the second link",
    )
    assert found == ("links-elsewhere",)
    result.cancel()


# -- failures ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make",
    [
        lambda bad: chain(add.s(1, 1), bad, add.s(1)),
        lambda bad: group(add.s(1, 1), bad),
        lambda bad: chord([add.s(1, 1), bad], total.s()),
        lambda bad: chord([add.s(1, 1)], bad),
        lambda bad: chain(add.s(1, 1), group(bad, add.s(1)), total.s()),
        lambda bad: chord([chord([add.s(1, 1)], bad)], total.s()),
    ],
    ids=["chain", "group", "header", "body", "group in chain", "chord in chord"],
)
def test_the_handler_of_a_canvas_fires_once_wherever_a_link_fails(
    worker: Worker, world: World, make: Callable[[Any], Any]
) -> None:
    bad = act.si(1, "bad", ["error"])
    result = durable(make(bad), retry=ONCE).apply_async(link_error=hear.s())
    with pytest.raises(SagaFailed, match=r"links\.act#0 .* RuntimeError: do of bad failed"):
        result.get(timeout=30)
    assert result.status == "failed" and {item["task"] for item in result.left} >= {"links.act"}
    (name,) = heard(world, result)
    assert name.startswith(f"{result}:") and name.endswith("links.act#0")


def test_a_handler_of_the_new_style_gets_request_error_and_traceback(worker: Worker, world: World) -> None:
    canvas = chain(act.si(1, "bad", ["error"]), add.s(1)).on_error(hear_error.s())
    result = durable(canvas, retry=ONCE).delay()
    with pytest.raises(SagaFailed):
        result.get(timeout=30)
    (effect,) = [effect for effect in world.effects(result) if effect.what == "heard"]
    assert effect.name == f"{result}:links.act#0"
    assert effect.told == ["RuntimeError", "do of bad failed", "links.act", "Traceback"]
    failed = canvas.apply_async().parent.id  # by Celery itself, on the same worker
    heard_there = until(lambda: [each for each in world.effects() if each.name == failed], "Celery's own call")
    assert heard_there[0].told == effect.told


def test_a_callback_runs_beside_the_chain(worker: Worker, world: World) -> None:
    first = add.s(1, 1)
    first.link(act.s("told", ["ok"]))
    assert durable(chain(first, add.s(1))).delay().get(timeout=30) == 3
    assert "do told" in [str(effect) for effect in world.effects()]


def test_a_link_is_retried_as_its_policy_says(worker: Worker, world: World) -> None:
    result = durable(chain(add.s(1, 1), act.s("a", ["error", "error", "ok"]), add.s(1)), retry=QUICK).delay()
    assert result.get(timeout=30) == 3
    assert world.told(result) == ["do a"]


def test_a_parked_link_is_retried_by_an_operator_and_the_canvas_goes_on(worker: Worker, world: World) -> None:
    canvas = chain(add.s(1, 1), act.s("a", ["error", "ok"]), add.s(40))
    result = durable(canvas, retry=ONCE, on_unknown="park").delay()
    until(lambda: result.status == "parked", "the link parks")
    (parked,) = result.parked
    assert parked["key"] == "links.act#0"  # type: ignore[index,call-overload]
    result.retry("links.act#0", reason="the provider is up again")
    assert result.get(timeout=30) == 42
    assert world.told(result) == ["do a"]


# -- processes that die ------------------------------------------------------------------------------------------------
@pytest.mark.own_process
def test_a_child_that_is_killed_in_a_link_costs_one_attempt_of_it(own_worker: Worker, world: World) -> None:
    canvas = chain(add.s(1, 1), group(act.s("a", ["gate"]), add.s(1)), total.s())
    result = durable(canvas, retry=QUICK).apply_async(queue=own_worker.queue)
    os.kill(world.until_at(result, "at a").pid, signal.SIGKILL)
    world.until_at(result, "at a", attempt=2)
    world.open(f"{result} a")
    assert result.get(timeout=30) == 5
    assert world.told(result) == ["at a", "at a", "do a"]


@pytest.mark.own_process
def test_the_handler_fires_once_though_the_child_of_the_link_that_fails_is_killed(
    own_worker: Worker, world: World
) -> None:
    canvas = chord([add.s(1, 1), act.si(1, "a", ["gate", "error"])], total.s())
    result = durable(canvas, retry=RetryPolicy(maximum_attempts=2)).apply_async(
        queue=own_worker.queue, link_error=hear.s()
    )
    os.kill(world.until_at(result, "at a").pid, signal.SIGKILL)
    with pytest.raises(SagaFailed, match="RuntimeError"):
        result.get(timeout=30)
    assert heard(world, result) == [f"{result}:1/links.act#0"]


@pytest.mark.own_process
def test_a_handler_whose_child_is_killed_runs_again_under_the_same_key(own_worker: Worker, world: World) -> None:
    canvas = chain(act.si(1, "bad", ["reject"])).on_error(hear_slowly.s())
    result = durable(canvas).apply_async(queue=own_worker.queue)
    first = world.until_at(result, "at handler")
    os.kill(first.pid, signal.SIGKILL)
    second = world.until_at(result, "at handler", attempt=2)
    world.open(f"{result} handler")
    with pytest.raises(SagaFailed):
        result.get(timeout=30)
    assert first.key == second.key
    assert world.told(result) == ["at handler", "at handler", "hear handler"]


@pytest.mark.parametrize("where", ["first", "link", "last"])
def test_a_saga_with_a_canvas_goes_on_after_a_kill_before_in_and_after_the_canvas(
    own_worker: Worker, world: World, where: str
) -> None:
    gates = {name: ["gate"] if name == where else ["ok"] for name in ("first", "link", "last")}
    plans = [Plan(name=name, do=gates[name]) for name in ("first", "last")]
    result = canvas_between.apply_async((plans[0], gates["link"], plans[1]), queue=own_worker.queue)
    name = {"first": "first", "link": "b", "last": "last"}[where]
    world.until_at(result, f"at {name}")
    own_worker.kill()
    own_worker.start()
    world.until_at(result, f"at {name}", attempt=2)
    world.open(f"{result} {name}")
    assert result.get(timeout=30) == 10
    assert [w for w in world.told(result) if w.startswith("do")] == ["do first", "do b", "do last"]


def test_a_canvas_of_a_saga_that_is_cancelled_is_stopped_and_what_was_before_it_is_undone(
    worker: Worker, world: World
) -> None:
    result = canvas_between.delay(Plan(name="first"), ["gate"], Plan(name="last"))
    world.until_at(result, "at b")
    result.cancel()
    world.open(f"{result} b")
    with pytest.raises(SagaFailed):
        result.get(timeout=30)
    assert result.status == "cancelled"
    assert [w for w in world.told(result) if w[:2] in ("do", "un")] == ["do first", "do b", "undo first"]
    assert heard(world, result) == []
