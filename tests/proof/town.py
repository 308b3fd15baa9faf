"""A small town of runs, one for each way to end, made by the real engine with real trouble in between.

Owns the sagas whose steps tell what they do, and the story that leads to a database for the checker to judge.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg
from sqlalchemy import Connection as SqlConnection
from sqlalchemy import text

from orchestrator import Effect, Rejected, RetryPolicy, StepFailed, saga, step
from orchestrator.machine.journal import Cancel, Operate, Terminate, encode
from orchestrator.store import arrivals, liveness
from orchestrator.store.connection import Connection
from tests.engine.stage import Child, start
from tests.proof import effects
from tests.proof.effects import EffectLog

AT_ONCE = RetryPolicy(initial_interval=timedelta(0), maximum_interval=timedelta(0), maximum_attempts=2)
CANARY = 'canary "of" the täwn 7f3a'


@step(retry=AT_ONCE)
def give_back(name: str, result: str | None) -> None:
    if name == "stubborn":
        raise Rejected("it cannot be given back")
    with EffectLog.of_environment().around():
        pass


@step(compensate=give_back, retry=AT_ONCE)
def take(name: str) -> str:
    if name == "bad":
        raise Rejected(name)
    EffectLog.of_environment().effect()
    if name == "silent":
        raise ConnectionError("no answer")
    EffectLog.of_environment().returned()
    return f"{name}!"


@step(effect=Effect.NONE, retry=AT_ONCE)
def look(name: str) -> str:
    with EffectLog.of_environment().around():
        return name


@step(transactional=True, retry=AT_ONCE)
def strike_out(conn: SqlConnection, name: str) -> None:
    conn.execute(text(effects.INSERT), effects.transactional_row())


@step(transactional=True, compensate=strike_out, retry=AT_ONCE)
def write_down(conn: SqlConnection, name: str) -> str:
    if name == "wrong":
        raise Rejected(name)
    conn.execute(text(effects.INSERT), effects.transactional_row())
    return name


@saga.define(name="tests.visit")
async def visit(names: list[str]) -> list[str]:
    """Take what is named; a name that begins with w is written down, and `wait` waits for an hour."""
    done = []
    for name in names:
        if name == "wait":
            await saga.sleep(timedelta(hours=1))
        elif name.startswith("w"):
            done.append(await saga.step(write_down, name))
        else:
            try:
                done.append(await saga.step(take, name))
            except StepFailed as error:
                if error.outcome != "unknown":
                    raise
    return [*done, await saga.step(look, CANARY)]


def order(connection: Connection, run_id: str, arrival: Cancel | Terminate | Operate) -> None:
    """Leave an order for a run."""
    with connection.transaction():
        arrivals.leave(connection, run_id, encode(arrival), anyone=True)


def drain_all(connection: Connection, *children: Child) -> None:
    """Drain until nothing is due."""
    due = """SELECT EXISTS (SELECT FROM orchestrator.work WHERE fence IS NULL AND due_at <= orchestrator.now()
             AND (reserved_at IS NULL OR reserved_at < orchestrator.now() - interval '100 ms'))"""
    while any([child.drain() for child in children]) or connection.execute(due).fetchone() == (True,):
        pass


def lose_the_lease(connection: Connection, child: Child) -> None:
    """Declare dead a child that lives, as if it had been stopped for longer than its attempt may take."""
    assert liveness.declare_dead(connection, child.incarnation)
    connection.execute("UPDATE orchestrator.work SET deadline_at = orchestrator.now() WHERE fence IS NOT NULL")
    liveness.give_back_dead(connection)
    child.reborn()


def overtaken(connection: Connection, slow: Child, meanwhile: Callable[[], object], name: str = "") -> None:
    """Let `slow` lose its lease once it has begun a step, and the rest of the world go on before its function runs."""

    def overtake(taken: Any) -> None:
        if name in taken.key:
            slow.runner.before = lambda taken: None
            lose_the_lease(connection, slow)
            meanwhile()

    slow.runner.before = overtake


def undo_again(connection: Connection, slow: Child, quick: Child) -> None:
    """A step whose worker is late is being undone when its success arrives: it is undone again, with that result."""
    undoing, background = threading.Event(), threading.Thread(target=slow.drain, daemon=True)

    def report_late(taken: Any) -> None:
        quick.runner.before = lambda taken: None
        undoing.set()
        background.join(60)

    def cancel() -> None:
        order(connection, "again", Cancel("ann", ""))
        standing.set()
        assert undoing.wait(60)

    standing = threading.Event()
    quick.runner.before = report_late
    start(connection, visit, ["a"], run_id="again")
    overtaken(connection, slow, cancel)
    background.start()
    while not standing.wait(0.05):
        assert background.is_alive()
    drain_all(connection, quick)
    background.join(60)
    drain_all(connection, quick)


STARTED = (
    "kept",
    "undone",
    "spot",
    "failed",
    "rejected",
    "cancelled",
    "terminated",
    "parked",
    "late",
    "corrected",
    "again",
    "rewritten",
)
REFUSED = tuple((run_id, "tests.proof.town.take#0", 1) for run_id in ("late", "corrected", "again"))


def build(connection: psycopg.Connection[Any], child: Child, slow: Child) -> None:
    """Make runs of every kind of end, among them three whose worker lost its lease in the middle."""
    connection.execute(effects.TABLE)
    start(connection, visit, ["a", "b", "w"], run_id="kept")
    start(connection, visit, ["a", "w", "c", "bad"], run_id="undone")
    start(connection, visit, ["a", "silent", "b"], run_id="spot")
    start(connection, visit, ["bad"], run_id="failed")
    start(connection, visit, ["wrong"], run_id="rejected")
    start(connection, visit, ["a", "wait"], run_id="cancelled")
    start(connection, visit, ["a", "wait"], run_id="terminated")
    start(connection, visit, ["stubborn", "bad"], run_id="parked")
    drain_all(connection, child)
    order(connection, "cancelled", Cancel("ann", "changed her mind"))
    order(connection, "terminated", Terminate("ann", ""))
    drain_all(connection, child)

    start(connection, visit, ["a", "b"], run_id="late")
    overtaken(connection, slow, child.drain)
    slow.drain()
    drain_all(connection, child)

    def cancel() -> None:
        order(connection, "corrected", Cancel("ann", ""))
        drain_all(connection, child)

    start(connection, visit, ["a"], run_id="corrected")
    overtaken(connection, slow, cancel)
    slow.drain()
    drain_all(connection, child)

    undo_again(connection, slow, child)

    start(connection, visit, ["w"], run_id="rewritten")
    overtaken(connection, slow, child.drain)
    slow.drain()
    drain_all(connection, child)
