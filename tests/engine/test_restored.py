"""After a restore of the database: what a step starts may have been started before, and done what it does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator import Effect, saga, step
from orchestrator.client import Client
from orchestrator.machine.journal import Restore, encode
from orchestrator.saga import Saga
from orchestrator.store import arrivals
from orchestrator.store.connection import Connection
from tests.engine.stage import Child, entries, start, states, until

_client: list[Client] = []
CHARGED: list[str] = []


@step
def undo_pay(thing: str) -> None: ...


@step(compensate=undo_pay)
def pay(thing: str) -> None:
    CHARGED.append(thing)


@saga.define
async def paying(thing: str) -> None:
    await saga.step(pay, thing)


def _start(thing: str, **options: Any) -> None:
    _client[0].start(paying, (thing,), {}, options)


@step(effect=Effect.NONE)
def start_one() -> None:
    _start("a", tags={"of": "one"})


@step(effect=Effect.NONE)
def start_named() -> None:
    _start("a", task_id="named", countdown=0.01)


@step(effect=Effect.NONE)
def start_two() -> None:
    _client[0].start_many(paying, [("a",), ("b",)], {})


@step(transactional=True, effect=Effect.NONE)
def start_in_transaction(connection: Any) -> None:
    _start("a")


@saga.define
async def starting_one() -> None:
    await saga.step(start_one)


@saga.define
async def starting_named() -> None:
    await saga.step(start_named)


@saga.define
async def starting_two() -> None:
    await saga.step(start_two)


@saga.define
async def starting_in_transaction() -> None:
    await saga.step(start_in_transaction)


ALL: list[tuple[Saga[Any, Any], int]] = [
    (starting_one, 1),
    (starting_named, 1),
    (starting_two, 2),
    (starting_in_transaction, 1),
]


@pytest.fixture(autouse=True)
def known(client: Client) -> Iterator[None]:
    _client[:], CHARGED[:] = [client], []
    yield
    _client.clear()


@pytest.mark.parametrize(("starter", "many"), ALL, ids=lambda each: getattr(each, "name", str(each)).split(".")[-1])
def test_a_run_that_is_started_by_a_step_of_one_that_heard_of_a_restore_hears_of_it_first(
    child: Child, connection: Connection, starter: Saga[Any, Any], many: int
) -> None:
    start(connection, starter)
    arrivals.leave(connection, "run", encode(Restore("ann")), anyone=True)
    until(child, lambda: list(states(connection).values()).count("parked") == many)
    assert CHARGED == [], "it may have been charged in the time that is forgotten"
    started = states(connection).keys() - {"run"}
    assert [entries(connection, run_id)[0]["e"] for run_id in started] == ["restored"] * many
    assert {entries(connection, run_id)[0]["by"] for run_id in started} == {"ann"}


@pytest.mark.parametrize(("starter", "many"), ALL, ids=lambda each: getattr(each, "name", str(each)).split(".")[-1])
def test_a_run_that_is_started_by_a_step_of_any_other_run_hears_of_nothing(
    child: Child, connection: Connection, starter: Saga[Any, Any], many: int
) -> None:
    start(connection, starter)
    until(child, lambda: list(states(connection).values()) == ["completed"] * (1 + many))
    assert ["a", "b"][:many] == CHARGED


def test_a_run_that_is_there_already_hears_of_nothing_when_it_is_started_again(
    child: Child, client: Client, connection: Connection
) -> None:
    _start("a", task_id="named")
    start(connection, starting_named)
    arrivals.leave(connection, "run", encode(Restore("ann")), anyone=True)
    until(child, lambda: states(connection) == {"run": "completed", "named": "completed"})
    assert CHARGED == ["a"]
