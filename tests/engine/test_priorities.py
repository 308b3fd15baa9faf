"""Who comes first: by priority, over all queues, runs and steps alike; and nobody before his time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psycopg

from orchestrator import saga, step
from orchestrator.engine.drain import Drainer
from orchestrator.store import runs
from tests.engine.stage import QUEUE, Child, state


@step
def plain(name: str) -> None: ...


@step(priority=7)
def urgent(name: str) -> None: ...


@saga.define(name="priorities.one")
async def one(name: str) -> None:
    await saga.step(plain, name)


@saga.define(name="priorities.both")
async def both(name: str) -> None:
    await asyncio.gather(saga.step(plain, name), saga.step(urgent, name))


@saga.define(name="priorities.in_a_row")
async def in_a_row(name: str) -> None:
    for _ in range(10):
        await saga.step(plain, name)


@saga.define(name="priorities.undone")
async def undone(name: str) -> None:
    await saga.step(plain.with_options(compensate=plain), name)
    raise ValueError("no")


def begin(connection: psycopg.Connection[Any], of: Any, name: str, **options: Any) -> None:
    new = runs.Start(
        id=name, saga=of.name, version=1, input={"name": name}, queue=options.pop("queue", QUEUE), **options
    )
    assert runs.start(connection, new)


def ran(child: Child) -> list[tuple[str, str]]:
    """Return the run and the step of every attempt, in order."""
    return [(context.run_id, context.key.rpartition(".")[2].partition("#")[0]) for context in child.runner.contexts]


def of_both_queues(child: Child) -> Child:
    worker = child.drainer._worker
    child.drainer = Drainer(replace(worker, scope=replace(worker.scope, queues=[QUEUE, "other"])))
    return child


def test_runs_go_by_priority_over_all_queues_of_a_worker(
    new_child: Callable[..., Child], connection: psycopg.Connection[Any]
) -> None:
    child = of_both_queues(new_child(drain_steps=1))
    begin(connection, one, "old")
    begin(connection, one, "first", priority=9, queue="other")
    begin(connection, one, "third", priority=1)
    begin(connection, one, "second", priority=5, queue="other")
    while child.drain():
        pass
    assert [run for run, _ in ran(child)] == ["first", "second", "third", "old"]


def test_of_steps_that_are_asked_for_together_the_urgent_one_begins(
    new_child: Callable[..., Child], connection: psycopg.Connection[Any]
) -> None:
    child = new_child(drain_steps=1)
    begin(connection, both, "run")
    child.drain()
    assert ran(child) == [("run", "urgent")]
    while child.drain():
        pass
    assert state(connection, "run") == "completed"


def test_an_urgent_step_goes_before_runs_that_are_longer_due(
    new_child: Callable[..., Child], connection: psycopg.Connection[Any]
) -> None:
    child = new_child(drain_steps=1)
    begin(connection, both, "run", priority=8)  # both of its steps: that of the run, and its own
    child.runner.before = lambda taken: begin(connection, one, "later") if taken.run_id == "run" else None
    child.drain()
    child.runner.before = lambda taken: None
    connection.execute("UPDATE orchestrator.work SET due_at = due_at - interval '1 h' WHERE run_id = 'later'")
    while child.drain():
        pass
    assert ran(child) == [("run", "plain"), ("run", "urgent"), ("later", "plain")]


def test_a_long_run_keeps_no_urgent_one_out_of_a_drain_that_goes_on(
    new_child: Callable[..., Child], connection: psycopg.Connection[Any]
) -> None:
    child = new_child()
    child.waited_for = False
    begin(connection, in_a_row, "long")

    def begin_urgent(taken: Any) -> None:
        child.runner.before = lambda taken: None
        begin(connection, one, "urgent", priority=9)
        child.drainer._until = 0.0  # a second is over

    child.runner.before = begin_urgent
    assert child.drain() == 11
    assert [run for run, _ in ran(child)].index("urgent") < 5, "of ten"


def test_an_undo_has_the_priority_of_its_run(child: Child, connection: psycopg.Connection[Any]) -> None:
    begin(connection, undone, "run", priority=6)
    seen: list[tuple[str, int]] = []

    def look(taken: Any) -> None:
        row = connection.execute("SELECT role, priority FROM orchestrator.work WHERE key = %s", [taken.key]).fetchone()
        assert row is not None
        seen.append(row)

    child.runner.before = look
    child.drain()
    assert seen == [("do", 6), ("undo", 6)]


def test_a_delayed_run_begins_when_it_is_time_however_urgent(child: Child, connection: psycopg.Connection[Any]) -> None:
    begin(connection, one, "late", priority=9, delay=3600.0)
    begin(connection, one, "now")
    child.drain()
    assert ran(child) == [("now", "plain")]
    connection.execute("UPDATE orchestrator.work SET due_at = orchestrator.now() WHERE run_id = 'late'")
    connection.execute("UPDATE orchestrator.runs SET started_at = orchestrator.now() WHERE id = 'late'")
    child.drain()
    assert ran(child) == [("now", "plain"), ("late", "plain")]


def test_the_deadline_of_a_delayed_run_counts_from_its_start(connection: psycopg.Connection[Any]) -> None:
    begin(connection, one, "late", delay=3600.0, deadline=60.0)
    row = connection.execute(
        "SELECT extract(epoch FROM deadline_at - started_at)::int FROM orchestrator.runs"
    ).fetchone()
    assert row == (60,)
