"""Heartbeats on a real database: what the next attempt is told of this one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from orchestrator import Effect, RetryPolicy, saga, step
from orchestrator.client import Client
from orchestrator.store import liveness
from orchestrator.store.connection import Connection
from tests.engine.proxy import Proxy
from tests.engine.stage import QUEUE, Child, run, start, state

THRICE = RetryPolicy(timedelta(0), 1.0, timedelta(0), 3)
TOLD: list[Any] = []

BEATS: dict[str, list[Any]] = {
    "well": [{"epoch": 1}],
    "and lives on": [{"epoch": 1}, None],
    "NUL": [{"epoch": 1}, "a\0b"],
    "lone surrogate": [{"epoch": 1}, "\ud800"],
    "size": [{"epoch": 1}, "x" * 300_000],
    "a stream": [{"epoch": 1}, iter([1])],
}


@step(effect=Effect.NONE, retry=THRICE)
def train(how: str) -> str:
    current = step.current()
    TOLD.append(current.heartbeat_details)
    if current.attempt == 1:
        for details in BEATS[how]:
            current.heartbeat(details)
        raise RuntimeError("the loss is not a number")
    return how


@saga.define
async def training(how: str) -> str:
    return await saga.step(train, how)


@pytest.mark.parametrize("how", BEATS)
def test_the_next_attempt_gets_the_last_details_that_could_be_stored(
    child: Child, client: Client, connection: Connection, how: str
) -> None:
    TOLD.clear()
    run(client, child, training, how)
    assert (state(connection), TOLD) == ("completed", [None, {"epoch": 1}])


@step(effect=Effect.NONE, retry=THRICE)
def consume(n: int) -> list[int]:
    current = step.current()
    if current.attempt == 1:
        current.heartbeat([1, 2])
    elif current.attempt == 3:
        return current.heartbeat_details or []
    else:
        current.heartbeat_details.pop()
    raise RuntimeError("out of memory")


@saga.define
async def consuming(n: int) -> list[int]:
    return await saga.step(consume, n)


def test_what_an_attempt_changes_of_the_details_that_it_was_given_is_no_heartbeat(child: Child, client: Client) -> None:
    assert run(client, child, consuming, 1).get(timeout=5) == [1, 2]


@step(effect=Effect.NONE, retry=THRICE)
def crawl(n: int) -> int:
    current = step.current()
    TOLD.append(current.heartbeat_details)
    if current.attempt == 1:
        current.heartbeat({"cursor": None, "seen": {"a": None}})
    return n


@saga.define
async def crawling(n: int) -> int:
    return await saga.step(crawl, n)


def test_details_of_an_attempt_whose_worker_is_lost_are_what_it_told(child: Child, connection: Connection) -> None:
    def die(taken: Any) -> None:
        raise KeyboardInterrupt

    TOLD.clear()
    child.runner.after = die
    start(connection, crawling, 1)
    with pytest.raises(KeyboardInterrupt):
        child.drain()
    liveness.declare_dead(connection, child.incarnation)
    liveness.give_back_gone(connection, child.incarnation)
    child.runner.after = lambda taken: None
    child.reborn()
    child.drain()
    assert (state(connection), TOLD) == ("completed", [None, {"cursor": None, "seen": {"a": None}}])


@step(effect=Effect.NONE, retry=RetryPolicy(maximum_attempts=1))
def walk(how: str) -> list[Any]:
    current = step.current()
    current.heartbeat(1)
    BREAK[0](how)
    current.heartbeat(2)
    current.heartbeat(3)
    return [how, current.attempt]


@saga.define
async def walking(how: str) -> list[Any]:
    return await saga.step(walk, how)


BREAK: list[Callable[[str], None]] = []


@pytest.mark.parametrize("how", ["the connection breaks", "nobody answers until the step has ended"])
def test_a_heartbeat_that_does_not_reach_the_database_fails_nothing(
    how: str, new_child: Callable[..., Child], connection: Connection, proxy: Proxy
) -> None:
    """A Postgres that is restarted takes nothing from workers that run."""

    def cut(how: str) -> None:
        proxy.cut()
        if "breaks" in how:
            proxy.restore()

    def look(taken: Any) -> None:
        proxy.restore()
        heard.extend(connection.execute("SELECT details FROM orchestrator.work").fetchone() or ())

    heard: list[Any] = []
    child = new_child(dsn=proxy.url)
    child.runner.after = look
    BREAK[:] = [cut]
    start(connection, walking, how)
    child.drain()
    assert (state(connection), heard) == ("completed", [3 if "breaks" in how else 1])
    assert connection.execute("SELECT output FROM orchestrator.runs").fetchone() == ([how, 1],)


@step(effect=Effect.NONE, start_to_close_timeout=timedelta(seconds=10), retry=RetryPolicy(maximum_attempts=1))
def linger(n: int) -> int:
    step.current().heartbeat(n)
    return n


@saga.define
async def lingering(n: int) -> int:
    return await saga.step(linger, n)


def test_a_heartbeat_does_not_put_off_the_end_of_an_attempts_time(child: Child, connection: Connection) -> None:
    """Code that swallows its StepTimeout and beats on was never given up, and held its run and its child for ever."""

    def overrun(taken: Any) -> None:
        connection.execute("UPDATE orchestrator.work SET deadline_at = orchestrator.now() - interval '8 s'")

    def look(taken: Any) -> None:
        given_back.extend(liveness.give_back_expired(connection))

    given_back: list[str] = []
    child.runner.before, child.runner.after = overrun, look
    start(connection, lingering, 1)
    child.drain()
    assert given_back == [QUEUE]
