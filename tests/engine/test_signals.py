"""Signals and what a run shows of itself, on a real database."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from orchestrator import Effect, PayloadError, UsageError, saga, step
from orchestrator.client import Client
from orchestrator.store import arrivals
from orchestrator.store.connection import Connection
from tests.engine.stage import Child, kinds


@dataclass
class Approval:
    by: str


@step(effect=Effect.NONE)
def nothing() -> None: ...


@saga.define(signals={"approved": Approval})
async def declared(n: int) -> str:
    approval: Approval = await saga.wait_signal("approved")
    return approval.by


DOES: dict[str, Callable[[], None]] = {"last": lambda: None}


@step(effect=Effect.NONE)
def last() -> None:
    DOES["last"]()


@saga.define
async def quick() -> None:
    await saga.step(last)


@saga.define
async def shown(n: int) -> str:
    saga.tag(customer=n, kind="shop")
    for done in range(n):
        saga.progress(done, n, "on the way")
        saga.publish(last=done)
        await saga.wait_signal("go")
    saga.tag(kind=None)
    return "done"


def test_a_run_goes_on_with_what_it_is_told(child: Child, client: Client) -> None:
    result = client.start(declared, (1,), {}, {})
    child.drain()
    assert result.status == "running"
    result.signal("approved", Approval(by="ann"))
    child.drain()
    assert result.get(timeout=10) == "ann"


def test_a_signal_before_the_first_turn_is_kept(child: Child, client: Client) -> None:
    result = client.start(declared, (1,), {}, {})
    result.signal("approved", {"by": "ann"})
    child.drain()
    assert result.get(timeout=10) == "ann"


def test_a_signal_that_the_saga_does_not_declare_is_refused(child: Child, client: Client) -> None:
    result = client.start(declared, (1,), {}, {})
    with pytest.raises(UsageError, match="no signal 'aproved'; it has approved"):
        result.signal("aproved", Approval(by="ann"))
    with pytest.raises(PayloadError, match="is to carry Approval: by: "):
        result.signal("approved", {"who": "ann"})
    child.drain()
    assert result.status == "running"


def test_a_signal_to_a_run_that_has_ended_is_refused(child: Child, client: Client) -> None:
    result = client.start(declared, (1,), {}, {})
    result.signal("approved", Approval(by="ann"))
    child.drain()
    with pytest.raises(UsageError, match="completed already and cannot be signalled"):
        result.signal("approved", Approval(by="ann"))


def _at(point: str, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do something once, when the client comes to this point."""
    todo = [act]

    def reached(name: str, connection: Any = None) -> None:
        if name == point and todo:
            todo.pop()()

    monkeypatch.setattr("orchestrator.client.failpoint", reached)


def test_an_order_that_comes_as_the_run_ends_is_refused(
    child: Child, client: Client, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken, and lost without a word: `cancel` returned, and the run had completed."""
    result = client.start(quick, (), {}, {"task_id": "run"})
    _at("order.begun", monkeypatch, lambda: child.drain() and None)
    with pytest.raises(UsageError, match="completed already and cannot be cancelled"):
        result.cancel()
    assert not arrivals.waiting(connection, "run")


def test_a_run_does_not_end_past_an_order_that_is_being_left(
    child: Child, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last turn waits for the order's commit, or is refused and computed again with it."""
    result = client.start(quick, (), {}, {"task_id": "run"})
    left = threading.Event()

    def stand_still() -> None:
        left.set()
        time.sleep(0.5)

    orders = threading.Thread(target=result.cancel)

    def order() -> None:
        orders.start()
        assert left.wait(20.0)

    _at("order.left", monkeypatch, stand_still)
    monkeypatch.setitem(DOES, "last", order)
    child.drain()
    orders.join(20.0)
    child.drain()
    assert result.status == "cancelled"


def test_an_order_is_left_though_somebody_stands_still_with_the_row_of_the_run(
    child: Child, client: Client, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.store.runs._PATIENCE_MS", 200)
    result = client.start(quick, (), {}, {"task_id": "run"})
    with connection.transaction():
        connection.execute("SELECT FROM orchestrator.runs WHERE id = 'run' FOR UPDATE")
        result.cancel()
    child.drain()
    assert result.status == "cancelled"


def test_a_run_that_is_terminated_as_its_signal_comes_has_nothing_on_record_after_its_end(
    child: Child, client: Client, connection: Connection
) -> None:
    result = client.start(declared, (1,), {}, {"task_id": "run"})
    child.drain()
    result.signal("approved", Approval("ann"))
    result.terminate()
    child.drain()
    assert kinds(connection) == ["asked", "signal", "operator", "ended"]


def test_what_a_run_shows_is_seen_while_it_runs(child: Child, client: Client, connection: Connection) -> None:
    result = client.start(shown, (2,), {}, {"tags": {"region": "eu"}})
    child.drain()
    assert result.published == {"progress": {"done": 0, "total": 2, "note": "on the way"}, "last": 0}
    tags = "SELECT tags FROM orchestrator.runs WHERE id = %s"
    assert connection.execute(tags, [result.id]).fetchone() == ({"region": "eu", "customer": 2, "kind": "shop"},)
    result.signal("go")
    child.drain()
    assert result.published["last"] == 1
    result.signal("go")
    child.drain()
    assert result.get(timeout=10) == "done"
    assert result.published["last"] == 1
    assert connection.execute(tags, [result.id]).fetchone() == ({"region": "eu", "customer": 2},)


def test_another_worker_that_replays_the_run_shows_the_same(child: Child, client: Client, database_url: str) -> None:
    result = client.start(shown, (3,), {}, {})
    child.drain()
    other = Child(database_url)
    result.signal("go")
    other.drain()
    assert result.published["last"] == 1
    other.close()


@pytest.mark.parametrize("value", [[1], "\0", {"a": 1}, 10**5000, math.nan], ids=range(5))
def test_a_tag_that_cannot_be_searched_for_is_refused(client: Client, value: object) -> None:
    with pytest.raises(UsageError, match="tags must be"):
        client.start(shown, (1,), {}, {"tags": {"bad": value}})
