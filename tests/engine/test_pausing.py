"""Pause and resume, of one run, through the client and on a real database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from orchestrator import saga
from orchestrator.client import Client
from orchestrator.errors import UsageError
from orchestrator.step import step
from orchestrator.store import runs
from tests.engine.stage import QUEUE, Child, entries, run, start, state, states, work


@step
def first(n: int) -> int:
    return n


@step
def second(n: int) -> int:
    return n + 1


@saga.define(name="pausing.one_by_one")
async def one_by_one(n: int) -> int:
    return await saga.step(second, await saga.step(first, n))


RATES: list[str] = []


def _rate() -> str:
    RATES.append("asked")
    if len(RATES) == 1:
        raise ConnectionError("no answer")
    return "1.25"


@saga.define(name="pausing.rate_beside")
async def rate_beside(n: int) -> tuple[int, str]:
    found, rate = await asyncio.gather(in_a_row(n), saga.once("rate", _rate))
    return found, rate


async def in_a_row(n: int) -> int:
    return await saga.step(second, await saga.step(first, n))


@pytest.fixture
def paused(child: Child, client: Client, connection: psycopg.Connection[Any]) -> str:
    """A run that was paused while its first step ran."""
    start(connection, one_by_one, 1)
    child.runner.after = lambda taken: client.operate("run", "pause", by="ann", reason="the bank is closed")
    child.drain()
    child.runner.after = lambda taken: None
    return "run"


def test_a_paused_run_begins_nothing_new_and_goes_on_when_it_is_resumed(
    paused: str, child: Child, client: Client, connection: psycopg.Connection[Any]
) -> None:
    while child.drain():
        pass
    done = [key for _, key, _ in child.runner.calls]
    assert (state(connection), work(connection)) == ("paused", [])
    client.operate(paused, "resume", by="bob")
    child.drain()
    assert state(connection) == "completed"
    assert [key for _, key, _ in child.runner.calls[: len(done)]] == done
    told = [(e["action"], e["by"]) for e in entries(connection) if e["e"] == "operator"]
    assert told == [("pause", "ann"), ("resume", "bob")]


def test_a_worker_without_the_code_can_pause_a_run(
    child: Child, client: Client, connection: psycopg.Connection[Any]
) -> None:
    start(connection, one_by_one, 1)
    client.operate("run", "pause")
    child.targets[:] = []
    child.scripts = lambda name, version: None
    child.drain()
    assert state(connection) == "paused"


def test_a_delayed_run_that_is_paused_and_resumed_still_starts_when_it_was_to(
    child: Child, client: Client, connection: psycopg.Connection[Any]
) -> None:
    new = runs.Start(id="run", saga=one_by_one.name, version=1, input={"n": 1}, queue=QUEUE, delay=3600.0)
    assert runs.start(connection, new)
    for action in ("pause", "resume"):
        client.operate("run", action)
        child.drain()
        assert state(connection) == {"pause": "paused", "resume": "pending"}[action]
    assert child.runner.calls == []
    row = connection.execute("SELECT w.due_at = r.started_at FROM orchestrator.work w, orchestrator.runs r").fetchone()
    assert row == (True,)


@pytest.mark.parametrize("action", ["pause", "resume"])
def test_a_run_that_has_ended_is_neither_paused_nor_resumed(
    action: str, child: Child, client: Client, connection: psycopg.Connection[Any]
) -> None:
    start(connection, one_by_one, 1)
    child.drain()
    with pytest.raises(UsageError, match="is completed already"):
        client.operate("run", action)


def test_a_key_cannot_be_paused(client: Client, connection: psycopg.Connection[Any]) -> None:
    start(connection, one_by_one, 1)
    with pytest.raises(UsageError, match="paused as a whole"):
        client.operate("run", "pause", "first#0")


def test_a_run_that_is_being_undone_is_not_paused(
    new_child: Callable[..., Child], client: Client, connection: psycopg.Connection[Any]
) -> None:
    start(connection, one_by_one, 1)
    connection.execute("UPDATE orchestrator.runs SET state = 'compensating'")
    with pytest.raises(UsageError, match="is being undone"):
        client.operate("run", "pause")


def test_the_function_of_a_once_is_tried_again_while_its_run_is_paused(
    new_child: Callable[..., Child], child: Child, client: Client, connection: psycopg.Connection[Any]
) -> None:
    """Although the code beside it could go on, and would ask for the next step."""
    RATES.clear()
    other = new_child()

    def pause(taken: Any) -> None:
        child.runner.before = lambda taken: None
        client.operate("run", "pause")
        other.drain()

    child.runner.before = pause
    start(connection, rate_beside, 1)
    child.drain()
    assert (state(connection), len(RATES)) == ("paused", 1)
    connection.execute("UPDATE orchestrator.work SET due_at = orchestrator.now() WHERE role = 'once'")
    child.drain()
    assert (state(connection), len(RATES)) == ("paused", 2)
    client.operate("run", "resume")
    child.drain()
    assert client.outcome("run").output == [2, "1.25"]


@saga.define
async def waiting(n: int) -> None:
    await saga.wait_signal("go")


@saga.define
async def with_children(n: int) -> None:
    await asyncio.gather(*(saga.child(waiting, number) for number in range(n)))


def test_children_of_a_run_that_is_paused_and_resumed_at_once_go_on(
    child: Child, client: Client, connection: psycopg.Connection[Any]
) -> None:
    run(client, child, with_children, 20)
    client.operate("run", "pause")
    client.operate("run", "resume")
    child.drain()
    assert set(states(connection).values()) == {"running"}
