"""Who is only looking for work takes what is added: nobody rings for it, and nothing of it is left lying."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from orchestrator import Effect, saga, step
from orchestrator.store import liveness, runs, turns
from orchestrator.store.connection import Connection
from orchestrator.store.turns import Taken
from tests.engine.stage import QUEUE, Child, start, state, states


@step(effect=Effect.NONE)
def act(thing: str) -> str:
    return thing


@saga.define
async def one_act(thing: str) -> None:
    await saga.step(act, thing)


def with_slots(child: Child, slots: int) -> Child:
    child.connection.execute("UPDATE orchestrator.incarnations SET slots = %s", [slots])
    return child


def after_first_look(monkeypatch: pytest.MonkeyPatch, do: Callable[[], Any]) -> list[float]:
    """Have something done once a drain has looked for more and found nothing; returns what it waits, as it does."""
    paused: list[float] = []

    def pause(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == 2:
            do()

    monkeypatch.setattr("orchestrator.engine.drain.time.sleep", pause)
    return paused


def test_what_is_added_while_a_child_looks_is_taken_by_it_and_not_rung_for(
    child: Child, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_slots(child, 2)
    seen: list[int] = []

    def add() -> None:
        start(connection, one_act, "b", run_id="b")
        seen.extend(runs.rings_needed(connection, QUEUE, rows) for rows in (1, 2))

    after_first_look(monkeypatch, add)
    start(connection, one_act, "a", run_id="a")
    child.drain()
    assert seen == [0, 1], "one row is for the looker, a second one for the slot that idles"
    assert (state(connection, "b"), child.rings) == ("completed", [])


def test_a_child_that_works_is_not_counted_on(child: Child, connection: Connection) -> None:
    with_slots(child, 2)
    seen: list[int] = []
    child.runner.before = lambda taken: seen.append(runs.rings_needed(connection, QUEUE, 1))
    start(connection, one_act, "a")
    child.drain()
    assert seen == [1]


def test_what_came_too_late_for_a_look_is_rung_for_before_what_may_take_long_begins(
    child: Child, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_slots(child, 2)
    rung: dict[str, list[str]] = {}
    child.runner.before = lambda taken: rung.update({taken.run_id: list(child.rings)})
    take_turns = child.drainer._start_turns

    def overtaken(items: list[Taken]) -> list[Taken]:
        if [item.run_id for item in items] == ["b"]:
            # Whoever starts c now may have read the mark before b was taken, and then did not ring.
            start(connection, one_act, "c", run_id="c")
            child.drainer._attempts.recent_s[act.name] = 1.0
        return take_turns(items)

    monkeypatch.setattr(child.drainer, "_start_turns", overtaken)
    after_first_look(monkeypatch, lambda: start(connection, one_act, "b", run_id="b"))
    start(connection, one_act, "a", run_id="a")
    child.drain()
    assert (rung["a"], rung["b"]) == ([], [QUEUE])
    assert set(states(connection).values()) == {"completed"}


def test_of_the_children_of_a_worker_one_lingers(
    child: Child, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_slots(child, 2)
    assert liveness.enter(connection, child.incarnation, child.number - 1, [QUEUE]) is not None
    connection.execute("UPDATE orchestrator.drainers SET looking = true")
    paused = after_first_look(monkeypatch, lambda: None)
    start(connection, one_act, "a", run_id="a")
    child.drain()
    assert (paused, state(connection, "a")) == ([], "completed")


def test_where_nothing_came_twice_one_look_has_to_do(
    child: Child, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[float] = []
    monkeypatch.setattr("orchestrator.engine.drain.time.sleep", paused.append)
    looks = []
    child.drainer._in_vain = 0
    for number in range(4):
        paused.clear()
        start(connection, one_act, "a", run_id=str(number))
        child.drain()
        looks.append(len(paused))
    assert looks[0] == looks[1] > 1 and looks[2:] == [1, 1]


def test_a_worker_that_stops_while_it_looks_rings_for_what_was_left_to_it(
    child: Child, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_slots(child, 2)

    def stop() -> None:
        start(connection, one_act, "b", run_id="b")
        child.stopping = True

    after_first_look(monkeypatch, stop)
    start(connection, one_act, "a", run_id="a")
    child.drain()
    assert (child.rings, state(connection, "b")) == ([QUEUE], "pending")


def test_a_drain_that_is_over_while_work_keeps_coming_has_another_one_begin(
    new_child: Callable[..., Child], connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = new_child(drain_steps=2)
    after_first_look(monkeypatch, lambda: start(connection, one_act, "b", run_id="b"))
    start(connection, one_act, "a", run_id="a")
    child.drain()
    assert (states(connection), child.rings) == ({"a": "completed", "b": "completed"}, [QUEUE])
    monkeypatch.setattr("orchestrator.engine.drain.time.sleep", lambda seconds: start_once(connection, "c"))
    child.drain()
    assert state(connection, "c") == "completed", "the next one waits for work that is not there yet"
    assert child.rings == [QUEUE], "and what came no more is waited for no more"


def start_once(connection: Connection, run_id: str) -> None:
    if run_id not in states(connection):
        start(connection, one_act, run_id, run_id=run_id)


def test_a_drain_does_not_look_again_at_what_was_due_before_it_left_nothing_behind(
    child: Child, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old snapshot keeps entries of rows that are gone in the index.  What is committed late is found at the end."""
    looked: list[tuple[timedelta | None, list[str]]] = []
    take = turns.take

    def taking(*args: Any, **options: Any) -> list[Taken] | None:
        taken = take(*args, **options)
        looked.append((options["back"], [item.run_id for item in taken or ()]))
        return taken

    def commit_late() -> None:
        start(connection, one_act, "late", run_id="late")
        connection.execute("UPDATE orchestrator.work SET due_at = due_at - interval '1 min' WHERE run_id = 'late'")

    monkeypatch.setattr(turns, "take", taking)
    after_first_look(monkeypatch, commit_late)
    start(connection, one_act, "a", run_id="a")
    child.drain()
    assert [back is None for back, found in looked if found] == [True, True]
    assert [found for _, found in looked if found] == [["a"], ["late"]]
    assert any(back is not None and back < timedelta(seconds=30) for back, _ in looked)
    assert state(connection, "late") == "completed"
