"""A saga or a queue is paused: what is under way is held, what is to come waits, and all of it goes on afterwards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from orchestrator import saga, step
from orchestrator.client import Client
from orchestrator.engine.drain import Drainer
from orchestrator.engine.pump import Pump
from orchestrator.errors import PayloadError, UsageError
from orchestrator.machine.journal import Restore, encode
from orchestrator.store import arrivals, doctor, liveness, pauses, turns
from tests.acceptance.running import until
from tests.engine.stage import QUEUE, Child, entries, start, state, work

RESERVATION = timedelta(milliseconds=100)


@step
def first(n: int) -> int:
    return n


@step
def second(n: int) -> int:
    return n


@step(queue="other")
def elsewhere(n: int) -> int:
    return n


@saga.define(name="pauses.two")
async def two(n: int) -> int:
    await saga.step(first, n)
    return await saga.step(second, n)


@saga.define(name="pauses.other")
async def other(n: int) -> int:
    return await saga.step(first, n)


@saga.define(name="pauses.sleepy")
async def sleepy(n: int) -> int:
    await asyncio.sleep(3600)
    return await saga.step(first, n)


@saga.define(name="pauses.listening", deadline=timedelta(hours=1))
async def listening(n: int) -> str:
    return await saga.wait_signal("news", str)


@saga.define(name="pauses.across")
async def across(n: int) -> int:
    await saga.step(first, n)
    return await saga.step(elsewhere, n)


@saga.define(name="pauses.in_a_row")
async def in_a_row(n: int) -> None:
    for _ in range(n):
        await saga.step(first, n)


@pytest.fixture
def pump() -> Pump:
    return Pump(lambda queue, times: None, lease=timedelta(seconds=60), reservation=RESERVATION)


def orders(connection: Any, run_id: str) -> list[tuple[str, str, str]]:
    """Return the pauses and their ends in the journal of a run: what, by whom, and for what cause."""
    told = [entry for entry in entries(connection, run_id) if entry["e"] == "operator"]
    return [(entry["action"], entry["by"], entry.get("cause", "")) for entry in told]


# -- a saga ------------------------------------------------------------------------------------------------------------
def test_runs_to_come_stay_pending_and_those_of_other_sagas_go_on(
    child: Child, client: Client, connection: Any
) -> None:
    assert client.pause(saga=two, by="ann", reason="a bad deploy")
    start(connection, two, 1, run_id="held")
    start(connection, other, 1, run_id="free")
    child.drain()
    assert (state(connection, "held"), state(connection, "free")) == ("pending", "completed")
    assert client.resume(saga=two, by="bob")
    child.drain()
    assert state(connection, "held") == "completed"
    assert orders(connection, "held") == []
    assert pauses.listed(connection) == []


def test_a_run_under_way_ends_its_step_and_goes_no_further(child: Child, client: Client, connection: Any) -> None:
    start(connection, two, 1)
    child.runner.after = lambda taken: client.pause(saga="pauses.two", by="ann")
    child.drain()
    child.runner.after = lambda taken: None
    child.drain()
    assert (state(connection), work(connection)) == ("paused", [])
    client.resume(saga="pauses.two", by="bob")
    child.drain()
    assert state(connection) == "completed"
    assert orders(connection, "run") == [("pause", "ann", "saga"), ("resume", "bob", "saga")]


def test_a_sleeping_run_is_told_and_sleeps_on_when_it_is_over(child: Child, client: Client, connection: Any) -> None:
    start(connection, sleepy, 1)
    child.drain()
    client.pause(saga=sleepy)
    child.drain()
    assert state(connection) == "paused"
    client.resume(saga=sleepy)
    child.drain()
    assert state(connection) == "running"
    assert work(connection) == [("", "turn", 0, False)]


def test_a_run_that_waits_for_nothing_is_told_when_it_is_woken(child: Child, client: Client, connection: Any) -> None:
    start(connection, sleepy, 1)
    child.drain()
    connection.execute("UPDATE orchestrator.work SET due_at = due_at - interval '1 hour'")
    connection.execute("INSERT INTO orchestrator.pauses (kind, name, by, reason, at) "
                       "VALUES ('saga', 'pauses.sleepy', 'ann', '', orchestrator.now())")  # fmt: skip
    child.drain()
    assert state(connection) == "paused"
    assert orders(connection, "run") == [("pause", "ann", "saga")]


def test_what_a_person_has_paused_stays_so_when_its_saga_is_resumed(
    child: Child, client: Client, connection: Any
) -> None:
    start(connection, sleepy, 1)
    child.drain()
    client.operate("run", "pause", by="ann")
    child.drain()
    client.pause(saga=sleepy)
    with pytest.raises(UsageError, match=r"paused with all runs of pauses\.sleepy"):
        client.operate("run", "resume")
    client.resume(saga=sleepy)
    child.drain()
    assert state(connection) == "paused"
    client.operate("run", "resume")
    child.drain()
    assert state(connection) == "running"


def test_a_run_of_a_paused_saga_can_be_cancelled_begun_or_not(child: Child, client: Client, connection: Any) -> None:
    start(connection, sleepy, 1, run_id="begun")
    child.drain()
    client.pause(saga=sleepy)
    start(connection, sleepy, 1, run_id="pending")
    child.drain()
    for run_id in ("begun", "pending"):
        client.cancel(run_id)
    child.drain()
    assert (state(connection, "begun"), state(connection, "pending")) == ("cancelled", "cancelled")
    client.resume(saga=sleepy)
    assert work(connection, "begun") == work(connection, "pending") == []


def test_a_signal_for_a_run_to_come_is_kept_until_its_saga_is_resumed_and_wakes_nobody(
    child: Child, client: Client, connection: Any, pump: Pump
) -> None:
    client.pause(saga=listening)
    start(connection, listening, 1)
    child.drain()
    client.signal("run", "news", "good")
    child.drain()
    connection.execute("UPDATE orchestrator.arrivals SET at = at - interval '2 minutes'")
    assert (pump.run_once(connection).given_back, doctor.stuck(connection).unread) == (0, 0)
    assert state(connection) == "pending"
    client.resume(saga=listening)
    child.drain()
    assert client.outcome("run").output == "good"


def test_a_run_that_sleeps_for_a_thousand_years_hears_of_a_forgotten_signal_all_the_same(
    child: Child, client: Client, connection: Any, pump: Pump
) -> None:
    start(connection, listening, 1)
    child.drain()
    connection.execute("UPDATE orchestrator.work SET due_at = due_at + interval '1000 years'")
    connection.execute(
        "INSERT INTO orchestrator.arrivals (run_id, at, arrival) VALUES ('run', now() - interval '2 minutes', "
        """'{"e": "signal", "name": "news", "id": "n1", "payload": "good"}')"""
    )
    assert doctor.stuck(connection).unread == 1
    assert pump.run_once(connection).given_back == 1
    child.drain()
    assert client.outcome("run").output == "good"


@pytest.mark.parametrize("put_aside", [True, False])
def test_a_run_of_a_paused_saga_that_hears_of_a_restore_does_not_begin(
    child: Child, client: Client, connection: Any, put_aside: bool
) -> None:
    client.pause(saga=two, by="ann")
    start(connection, two, 1)
    if put_aside:
        child.drain()
    arrivals.leave(connection, "run", encode(Restore("ann")), anyone=True)
    child.drain()
    assert [entry["e"] for entry in entries(connection)] == ["restored", "operator"]
    client.resume(saga=two, by="bob")
    child.drain()
    assert orders(connection, "run") == [("pause", "ann", "saga"), ("resume", "bob", "saga")]
    assert state(connection) == "parked"  # a step that may have been done before the restore is for a person


def test_a_pause_that_is_lifted_before_it_was_heard_holds_nobody(child: Child, client: Client, connection: Any) -> None:
    client.pause(saga=two)
    start(connection, two, 1)
    arrivals.leave(connection, "run", encode(Restore("ann")), anyone=True)
    turns.take(
        connection, queues=[QUEUE], targets=[turns.ANYONE], incarnation=1, child=1, fences=[1], reservation=RESERVATION
    )
    assert pauses.put_aside(connection, ["run"], [two.name], 1, 1, heard=["run"]) == set()
    client.resume(saga=two)
    child.drain()
    assert state(connection) == "parked"


def test_whoever_died_while_telling_leaves_the_rest_to_the_pumps(
    child: Child, client: Client, connection: Any, pump: Pump, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        start(connection, sleepy, 1, run_id=f"r{number}")
    child.drain()
    monkeypatch.setattr(pauses, "_PAGE", 2)
    states = lambda: {state(connection, f"r{number}") for number in range(5)}  # noqa: E731
    for give, wanted in ((client.pause, "paused"), (client.resume, "running")):
        with monkeypatch.context() as patch:
            patch.setattr(Client, "_tell", lambda *args: None)
            assert give(saga=sleepy)

        def settled(wanted: str = wanted) -> bool:
            pump.run_once(connection)
            child.drain()
            return states() == {wanted}

        until(settled, f"all are {wanted}")
    until(lambda: pump.run_once(connection) and not pauses.listed(connection), "the pause is forgotten")


def test_a_run_that_a_child_began_before_it_knew_is_found_by_the_second_look(
    child: Child, client: Client, connection: Any, pump: Pump
) -> None:
    client.pause(saga=sleepy)
    pauses.lift(connection, "saga", sleepy.name, "ann", "")
    start(connection, sleepy, 1)
    child.drain()  # as a child does that has not heard of it
    assert client.pause(saga=sleepy)
    connection.execute("DELETE FROM orchestrator.paused_runs")
    connection.execute("DELETE FROM orchestrator.arrivals")
    pump.run_once(connection)
    assert pauses.untold(connection) == []
    connection.execute("UPDATE orchestrator.pauses SET at = at - interval '6 s'")
    pump.run_once(connection)
    child.drain()
    assert state(connection) == "paused"


def test_pausing_twice_and_resuming_twice_says_so(client: Client) -> None:
    assert [client.pause(saga="x", by="ann"), client.pause(saga="x", by="bob")] == [True, False]
    assert [client.resume(saga="x"), client.resume(saga="x")] == [True, False]
    assert [client.pause(queue="q"), client.pause(queue="q")] == [True, False]
    assert [client.resume(queue="q"), client.resume(queue="q")] == [True, False]


@pytest.mark.parametrize("named", [{}, {"saga": "x", "queue": "q"}, {"saga": "x\n"}, {"queue": 7}])
def test_what_names_no_saga_and_no_queue_is_refused(client: Client, named: dict[str, Any]) -> None:
    for give in (client.pause, client.resume):
        with pytest.raises(UsageError, match="which saga or which queue"):
            give(**named)


def test_a_reason_that_cannot_be_stored_is_refused(client: Client) -> None:
    with pytest.raises(PayloadError):
        client.pause(saga="x", reason="\0")


# -- a queue -----------------------------------------------------------------------------------------------------------
def test_nothing_is_taken_from_a_paused_queue_nobody_rings_for_it_and_no_worker_is_to_blame(
    child: Child, client: Client, connection: Any, pump: Pump
) -> None:
    start(connection, other, 1)
    client.pause(queue=QUEUE, by="ann")
    child.drain()
    assert state(connection) == "pending"
    assert pump.run_once(connection).rung == {}
    assert not _neglects(connection, child)
    assert doctor.waiting(connection) == []
    client.resume(queue=QUEUE)
    assert _neglects(connection, child)
    assert [each.queue for each in doctor.waiting(connection)] == [QUEUE]
    assert pump.run_once(connection).rung == {QUEUE: 1}
    child.drain()
    assert state(connection) == "completed"


def test_a_run_that_is_to_be_undone_is_work_of_any_worker(child: Child, client: Client, connection: Any) -> None:
    """Which needs none of its code: a worker that lets it lie neglects it, whatever it has registered."""
    start(connection, other, 1)
    targets, child.targets = child.targets, ["something.else"]
    assert not _neglects(connection, child)
    client.cancel("run")
    assert _neglects(connection, child)
    child.targets = targets


def _neglects(connection: Any, child: Child) -> bool:
    return liveness.neglects(connection, child.incarnation, [QUEUE], child.targets, timedelta(0))


def test_no_step_is_begun_on_a_paused_queue_on_the_spot_either(
    new_child: Callable[..., Child], client: Client, connection: Any
) -> None:
    child = new_child()
    child.drainer.close()
    child.drainer = Drainer(_of_both_queues(child))
    client.pause(queue="other")
    start(connection, across, 1)
    child.drain()
    [(key, _, _, begun)] = work(connection)
    assert (key.endswith(f"{elsewhere.name}#0"), begun) == (True, False)
    client.resume(queue="other")
    child.drain()
    assert state(connection) == "completed"


def _of_both_queues(child: Child) -> Any:
    from dataclasses import replace

    made = child.drainer._worker
    return replace(made, scope=replace(made.scope, queues=[QUEUE, "other"]))


def test_a_long_drain_hears_of_a_pause_within_a_second(
    new_child: Callable[..., Child], client: Client, connection: Any
) -> None:
    child = new_child(drain_seconds=60.0)
    for number in range(40):
        start(connection, other, number, run_id=f"r{number}")
    never = threading.Event()

    def take_long(taken: Any) -> None:
        never.wait(0.1)

    child.runner.before = take_long
    thread = child.in_background()
    until(lambda: child.runner.calls, "it has begun")
    client.pause(queue=QUEUE)
    thread.join(30)
    assert not thread.is_alive()
    assert "running" in {state(connection, f"r{number}") for number in range(40)}


def test_a_drain_that_goes_on_with_a_long_run_hears_of_a_pause_within_a_second_or_two(
    new_child: Callable[..., Child], client: Client, connection: Any
) -> None:
    child = new_child(drain_seconds=1.0)
    child.waited_for = False
    start(connection, in_a_row, 50)
    never = threading.Event()

    def take_long(taken: Any) -> None:
        never.wait(0.1)

    child.runner.before = take_long
    thread = child.in_background()
    until(lambda: child.runner.calls, "it has begun")
    client.pause(queue=QUEUE)
    thread.join(30)
    assert not thread.is_alive()
    assert state(connection) == "running" and len(child.runner.calls) < 30


# -- the statements ----------------------------------------------------------------------------------------------------
def test_a_turn_is_not_put_aside_once_the_pause_is_lifted(child: Child, client: Client, connection: Any) -> None:
    client.pause(saga=two)
    start(connection, two, 1)
    (taken,) = turns.take(
        connection, queues=[QUEUE], targets=[two.target], incarnation=1, child=1, fences=[1], reservation=RESERVATION
    )
    pauses.lift(connection, "saga", two.name, "ann", "")
    assert pauses.put_aside(connection, [taken.run_id], [two.name], 1, 1) == set()


def test_a_turn_that_somebody_else_has_by_now_is_left_to_him(client: Client, connection: Any) -> None:
    client.pause(saga=two)
    start(connection, two, 1)
    turns.take(
        connection, queues=[QUEUE], targets=[two.target], incarnation=1, child=2, fences=[1], reservation=RESERVATION
    )
    assert pauses.put_aside(connection, ["run"], [two.name], 1, 1) == set()
    assert pauses.put_aside(connection, ["run"], [two.name], 1, 2) == {"run"}
