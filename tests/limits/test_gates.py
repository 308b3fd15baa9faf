"""The line at a gate: who is let in, when, and who is not held up by it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection as SqlConnection

from orchestrator import Effect, RetryPolicy, saga, step
from orchestrator.engine.pump import Pump
from orchestrator.store import gates, liveness, pauses, runs
from tests.acceptance.running import until
from tests.engine.stage import Child, entries, start, state
from tests.limits.steps import calls, moments, pings, single

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LINE = gates.LINE


@step(effect=Effect.NONE, rate_limit="1/h")
def rare(n: int) -> int:
    return n


@step(effect=Effect.NONE)
def free(n: int) -> int:
    return n


@step(concurrency=1)
def give_back(n: int) -> None: ...


@step(compensate=give_back)
def take_away(n: int) -> None: ...


@step(effect=Effect.NONE, concurrency=1, retry=RetryPolicy(initial_interval=timedelta(0), maximum_attempts=3))
def fails(n: int) -> int:
    raise ConnectionError("no answer")


@step(transactional=True, concurrency=1)
def book(conn: SqlConnection, n: int) -> int:
    return n


@step(effect=Effect.NONE, concurrency=1)
def post(n: int) -> int:
    return n


@saga.define(name="limits.elsewhere")
async def elsewhere(n: int) -> int:
    saga.step(post.with_options(queue="nobody"), n)
    return await saga.step(post, n + 1)


@saga.define(name="limits.booked")
async def booked(n: int) -> int:
    return sum(await asyncio.gather(*(saga.step(book, i) for i in range(n))))


@saga.define(name="limits.rarely")
async def rarely(n: int) -> list[int]:
    return list(await asyncio.gather(saga.step(rare, n), saga.step(rare, n + 1), saga.step(free, n)))


@saga.define(name="limits.undone")
async def undone(n: int) -> None:
    await saga.step(take_away, n)
    raise ValueError("no")


@saga.define(name="limits.failing")
async def failing(n: int) -> int:
    return await saga.step(fails, n)


def stand(connection: psycopg.Connection[Any], gate: str, many: int, **limit: Any) -> None:
    """Put rows of work in line, one after the other."""
    connection.execute(
        "INSERT INTO orchestrator.work (run_id, lane, key, role, target, queue, due_at, call, gate) "
        "SELECT %s || n, 1, 'k', 'do', 't', 'q', %s::timestamptz + %s + n * interval '1 ms', "
        "json_build_object('g', %s::json), %s FROM generate_series(1, %s) AS n",
        [f"{gate}-", NOW, LINE, psycopg.types.json.Json({"gate": gate, **limit}), gate, many],
    )


def let_in(connection: psycopg.Connection[Any]) -> list[tuple[str, float]]:
    """Return who is let in: the run, and in how many seconds it is due."""
    found = connection.execute(
        "SELECT run_id, extract(epoch FROM due_at - %s)::float8 FROM orchestrator.work WHERE due_at < %s ORDER BY 2",
        [NOW, NOW + LINE / 2],
    )
    return [(run_id, round(seconds, 3)) for run_id, seconds in found]


# -- the statement -----------------------------------------------------------------------------------------------------
def test_a_rate_gives_each_its_instant_in_the_order_of_the_line_and_not_far_ahead(connection: Any) -> None:
    stand(connection, "g", 10, every=0.5)
    now = NOW + timedelta(seconds=1)
    assert gates.admit(connection, "g", now) == {"q": 1}
    assert let_in(connection) == [("g-1", 1.0), ("g-2", 1.5), ("g-3", 2.0), ("g-4", 2.5), ("g-5", 3.0)]
    assert gates.admit(connection, "g", now) == {}
    connection.execute("DELETE FROM orchestrator.work WHERE run_id = ANY('{g-1,g-2}')")
    assert gates.admit(connection, "g", now + timedelta(seconds=0.5)) == {}
    assert let_in(connection)[-1] == ("g-6", 3.5)


def test_a_rate_that_was_not_used_is_not_saved_up(connection: Any) -> None:
    stand(connection, "g", 1, every=0.5)
    gates.admit(connection, "g", NOW + timedelta(seconds=1))
    connection.execute("DELETE FROM orchestrator.work")
    stand(connection, "g", 3, every=0.5)
    gates.admit(connection, "g", NOW + timedelta(seconds=60))
    assert [seconds for _, seconds in let_in(connection)] == [60.0, 60.5, 61.0]


def test_where_nobody_takes_what_was_let_in_no_more_is_let_in(connection: Any) -> None:
    stand(connection, "g", 100, every=0.1)
    for second in range(1, 60):
        gates.admit(connection, "g", NOW + timedelta(seconds=second))
    assert len(let_in(connection)) < 40


def test_what_was_let_in_on_a_queue_that_is_paused_then_makes_room_and_stands_in_line_again(connection: Any) -> None:
    stand(connection, "g", 2, most=1)
    connection.execute("UPDATE orchestrator.work SET queue = 'other' WHERE run_id = 'g-2'")
    gates.admit(connection, "g", NOW + timedelta(seconds=1))
    pauses.pause(connection, "queue", "q", "ann", "")
    assert gates.admit(connection, "g", NOW + timedelta(seconds=2)) == {"other": 1}
    assert [run_id for run_id, _ in let_in(connection)] == ["g-2"]
    connection.execute("DELETE FROM orchestrator.work WHERE run_id = 'g-2'")
    assert gates.admit(connection, "g", NOW + timedelta(seconds=3)) == {}
    pauses.lift(connection, "queue", "q", "ann", "")
    assert gates.admit(connection, "g", NOW + timedelta(seconds=4)) == {"q": 1}


def serve(connection: psycopg.Connection[Any], queue: str) -> int:
    return liveness.register(connection, node=queue, host="h", pid=1, queues=[queue], targets=["t"], slots=1)


def test_who_was_let_in_on_a_queue_that_nobody_serves_makes_room_for_whom_somebody_does(connection: Any) -> None:
    stand(connection, "g", 3, most=1)
    connection.execute("UPDATE orchestrator.work SET queue = 'other' WHERE run_id IN ('g-2', 'g-3')")
    worker = serve(connection, "q")
    gates.admit(connection, "g", NOW + timedelta(seconds=1))
    liveness.declare_dead(connection, worker)
    serve(connection, "other")
    served = []
    for second in (2, 3, 4):
        gates.admit(connection, "g", NOW + timedelta(seconds=second))
        served += [run_id for run_id, _ in let_in(connection)]
        connection.execute("DELETE FROM orchestrator.work WHERE run_id = %s AND queue = 'other'", [served[-1]])
    assert served == ["g-2", "g-3", "g-1"], "with nobody else in line it has its place, should somebody serve it"


def test_what_has_begun_keeps_its_place_whoever_serves_its_queue(connection: Any) -> None:
    stand(connection, "g", 2, most=1)
    connection.execute("UPDATE orchestrator.work SET queue = 'other' WHERE run_id = 'g-2'")
    gates.admit(connection, "g", NOW + timedelta(seconds=1))
    connection.execute("UPDATE orchestrator.work SET fence = 7 WHERE run_id = 'g-1'")
    serve(connection, "other")
    assert gates.admit(connection, "g", NOW + timedelta(seconds=2)) == {}


def test_a_concurrency_lets_in_as_many_as_have_left(connection: Any) -> None:
    stand(connection, "g", 5, most=2)
    now = NOW + timedelta(seconds=1)
    assert gates.admit(connection, "g", now) == {"q": 2}
    assert gates.admit(connection, "g", now) == {}
    connection.execute("UPDATE orchestrator.work SET fence = 7 WHERE run_id = 'g-1'")
    assert gates.admit(connection, "g", now) == {}
    connection.execute("DELETE FROM orchestrator.work WHERE run_id = 'g-1'")
    assert gates.admit(connection, "g", now) == {"q": 1}
    assert [run for run, _ in let_in(connection)] == ["g-2", "g-3"]


def test_gates_do_not_know_of_each_other(connection: Any) -> None:
    for gate in ("a", "b"):
        stand(connection, gate, 3, most=1)
        gates.admit(connection, gate, NOW + timedelta(seconds=1))
    assert sorted(run for run, _ in let_in(connection)) == ["a-1", "b-1"]
    assert gates.lines(connection) == ["a", "b"]
    assert gates.lines(connection, after="a") == ["b"]


def test_two_who_look_at_once_let_in_no_more_than_one_would(connect: Callable[[], Any], connection: Any) -> None:
    stand(connection, "g", 20, most=3)
    now, barrier = NOW + timedelta(seconds=1), threading.Barrier(4)

    def look(own: Any) -> None:
        barrier.wait()
        for _ in range(10):
            gates.admit(own, "g", now)

    threads = [threading.Thread(target=look, args=[connect()]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(let_in(connection)) == 3


def test_gates_that_nobody_has_come_by_are_forgotten(connection: Any) -> None:
    for gate in ("old", "kept"):
        stand(connection, gate, 1, every=1.0)
        gates.admit(connection, gate, NOW - timedelta(days=300))
    connection.execute("DELETE FROM orchestrator.work WHERE gate = 'old'")
    gates.sweep(connection)
    assert connection.execute("SELECT name FROM orchestrator.gates").fetchall() == [("kept",)]


# -- the engine --------------------------------------------------------------------------------------------------------
def test_a_step_with_a_limit_holds_up_nobody_but_its_like(child: Child, connection: Any) -> None:
    start(connection, rarely, 1)
    child.drain()
    done = sorted(key.rpartition(".")[2] for _, key, _ in child.runner.calls)
    assert done == ["free#0", "rare#0"]
    [left] = runs.outstanding(connection, "run")
    assert (left.in_line, left.limit) == (True, {"gate": rare.name, "every": 3600.0, "rate": "1/h"})


def test_what_is_let_in_goes_on_within_the_same_drain(child: Child, connection: Any, tmp_path: Path) -> None:
    start(connection, calls, ["a"] * 6, 0.0)
    child.drain()
    assert state(connection) == "completed"
    assert [moment.what for moment in moments(tmp_path)] == ["begin", "end"] * 6


def test_who_has_committed_with_its_own_rows_lets_in_the_next_at_once(child: Child, connection: Any) -> None:
    """The next transactional step waited for a pump to come by, a second each."""
    start(connection, booked, 4)
    child.drain()
    assert state(connection) == "completed"


def test_each_retry_stands_in_line_again(child: Child, connection: Any) -> None:
    start(connection, failing, 1, run_id="first")
    start(connection, failing, 2, run_id="second")
    child.drain()
    assert state(connection, "first") == state(connection, "second") == "failed"
    assert [attempt for _, _, attempt in child.runner.calls] == [1, 1, 2, 2, 3, 3]


def test_an_undo_has_the_limits_of_its_own_declaration(child: Child, connection: Any) -> None:
    start(connection, undone, 1)
    child.drain()
    assert state(connection) == "compensated"
    asked = next(entry for entry in entries(connection) if entry["e"] == "asked")
    assert asked["undo"]["limit"] == {"gate": give_back.name, "most": 1}


def test_whoever_stands_in_line_can_be_withdrawn(child: Child, connection: Any, client: Any) -> None:
    start(connection, rarely, 1)
    child.drain()
    client.cancel("run")
    child.drain()
    assert state(connection) == "cancelled"
    assert connection.execute("SELECT count(*) FROM orchestrator.work").fetchone() == (0,)


def test_a_pump_lets_in_whom_the_dead_have_left_in_line(child: Child, connection: Any, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gates, "admit", lambda *args: {})  # who put them in line, and who left, died before it looked
        start(connection, pings, 3)
        child.drain()
        assert child.runner.calls == []
    pump = Pump(lambda queue, times: None, lease=timedelta(seconds=2), reservation=timedelta(milliseconds=100))

    def worked() -> bool:
        pump.run_once(connection)
        child.drain()
        return state(connection) == "completed"

    until(worked, "the run is worked off")


def test_a_step_on_a_queue_that_nobody_serves_does_not_keep_the_others_out(child: Child, connection: Any) -> None:
    start(connection, elsewhere, 1)
    pump = Pump(lambda queue, times: None, lease=timedelta(seconds=2), reservation=timedelta(milliseconds=100))

    def passed() -> bool:
        child.drain()
        pump.run_once(connection)
        return bool(child.runner.calls)

    until(passed, "the step that can be run is let in")
    assert [key for _, key, _ in child.runner.calls] == [f"{post.name}#1"]


def test_a_run_goes_on_where_a_gate_is_full_of_others(new_child: Any, connection: Any) -> None:
    begun, go_on = threading.Event(), threading.Event()
    slow, quick = new_child(), new_child()

    def hold(taken: Any) -> None:
        begun.set()
        assert go_on.wait(20)

    slow.runner.before = hold
    start(connection, single, "x-1", run_id="first")
    thread = slow.in_background()
    assert begun.wait(20)
    start(connection, single, "x-2", run_id="same key")
    start(connection, single, "y-1", run_id="other key")
    quick.drain()
    assert (state(connection, "same key"), state(connection, "other key")) == ("running", "completed")
    go_on.set()
    thread.join(20)
    assert state(connection, "same key") == "completed"


@pytest.fixture
def connect(database_url: str) -> Any:
    from orchestrator.store.connection import open_connection

    made: list[Any] = []

    def make() -> Any:
        made.append(open_connection(database_url, name="test"))
        return made[-1]

    yield make
    for connection in made:
        connection.close()
