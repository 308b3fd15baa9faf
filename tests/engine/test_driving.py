"""Many steps of one run in several processes: one drives the run, the others leave it what came of their steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from orchestrator import Effect, RetryPolicy, saga, step
from orchestrator.engine import drain
from orchestrator.engine.advance import _Left
from orchestrator.engine.commit import MANY
from orchestrator.machine.journal import Arrival, Signal, encode
from orchestrator.machine.turn import Execution, Turn
from orchestrator.store import arrivals, liveness
from orchestrator.store.connection import Connection
from tests.engine.stage import Child, entries, start, states, work

BEGUN: list[str] = []  # a line for each time that a process resumes the saga from its beginning


@step(effect=Effect.NONE)
def short(number: int) -> int:
    return number


@step(effect=Effect.NONE)
def long(thing: str) -> str:
    return thing


@saga.define
async def wide(steps: int) -> None:
    BEGUN.append("wide")
    await asyncio.gather(*(saga.step(short, number) for number in range(steps)))
    await saga.wait_signal("go")


@saga.define
async def one_by_one(steps: int) -> None:
    BEGUN.append("one by one")
    for number in range(steps):
        await saga.step(short, number)


@saga.define
async def with_local_steps(steps: int) -> list[int]:
    found = []
    for number in range(steps):
        await saga.step(short, number)
        found.append(await saga.once("local", lambda number=number: number))
    return found


@step(effect=Effect.NONE, retry=RetryPolicy(timedelta(hours=1), 1.0, timedelta(hours=1), 5))
def rarely(thing: str) -> str:
    return thing


@saga.define
async def with_rare_attempts(thing: str) -> None:
    await saga.step(rarely, thing)


@saga.define
async def until_an_instant(others: int) -> None:
    instant = asyncio.get_running_loop().time() + 30
    mine = saga.step(long, "mine")
    for number in range(others):
        saga.step(short.with_options(queue="elsewhere"), number)
    async with asyncio.timeout_at(instant):
        await saga.wait_signal("go")
    await mine
    async with asyncio.timeout_at(instant):
        await saga.wait_signal("never")


@saga.define
async def other(count: int) -> None:
    for number in range(count):
        await saga.step(short, number)
    await saga.step(long, "x")


@pytest.fixture
def two_children(new_child: Callable[..., Child], monkeypatch: pytest.MonkeyPatch) -> tuple[Child, Child]:
    """Two that know the step to be short; the second has lost a race for the run, and leaves it to the first."""
    BEGUN.clear()
    monkeypatch.setattr(drain, "_LONGEST_WAVE_S", 60.0)  # the other one works in the midst of a step
    driver, follower = new_child(), new_child()
    for child in (driver, follower):
        child.drainer._attempts.recent_s[short.name] = 0.0001

    def has_lost(taken: Any) -> None:
        assert follower.drainer._session.advancer is not None
        follower.drainer._session.advancer._elsewhere.setdefault("run", _Left())

    follower.runner.before = has_lost
    return driver, follower


def at_the_first_step(child: Child, call: Callable[[], None]) -> None:
    """Have something happen while a child holds its first wave of steps and has recorded none of them."""

    def before(taken: Any) -> None:
        child.runner.before = lambda taken: None
        call()

    child.runner.before = before


def counted(connection: Connection, table: str) -> int:
    row = connection.execute(f"SELECT count(*) FROM orchestrator.{table} WHERE run_id = 'run'".encode()).fetchone()
    assert row is not None
    return int(row[0])


def test_what_is_left_is_taken_in_by_who_drives_the_run(
    two_children: tuple[Child, Child], connection: Connection
) -> None:
    driver, follower = two_children
    follower.drainer._worker.linger = (0.1,) * 100  # longer than the driver takes

    def leave() -> None:
        threads.append(follower.in_background())
        give_up_at = time.monotonic() + 30
        while counted(connection, "arrivals") < 8 and time.monotonic() < give_up_at:
            time.sleep(0.005)

    threads: list[Any] = []
    at_the_first_step(driver, leave)
    start(connection, wide, 40)
    driver.drain()
    assert (len(driver.runner.calls), len(follower.runner.calls)) == (32, 8)
    assert (counted(connection, "journal"), counted(connection, "arrivals")) == (2, 0), "all outcomes are in one turn"
    follower.stopping = True
    threads[0].join(30)
    assert BEGUN == ["wide"], "the follower never had to replay the run"


def test_what_nobody_takes_in_is_taken_in_by_who_left_it(
    two_children: tuple[Child, Child], connection: Connection
) -> None:
    driver, follower = two_children
    seen: list[tuple[int, int]] = []

    def leave() -> None:
        follower.drain()
        seen.append((counted(connection, "journal"), counted(connection, "arrivals")))

    at_the_first_step(driver, leave)
    start(connection, wide, 40)
    driver.drain()
    assert seen == [(2, 0)], "the driver was busy, the follower had nothing else to do"
    assert (counted(connection, "journal"), counted(connection, "work")) == (3, 0)
    assert BEGUN == ["wide", "wide"]


@pytest.mark.parametrize(("task", "patience_s"), [(long, drain._LEFT_S), (short, 0.0)])
def test_nothing_is_left_unread_for_long_while_there_is_other_work(
    two_children: tuple[Child, Child], connection: Connection, monkeypatch: pytest.MonkeyPatch, task: Any,
    patience_s: float,
) -> None:  # fmt: skip
    """Not behind a step that can take long, nor for more than a moment behind many short ones."""
    driver, follower = two_children
    monkeypatch.setattr(drain, "_LEFT_S", patience_s)
    has_lost, seen = follower.runner.before, []

    def look(taken: Any) -> None:
        has_lost(taken)
        if taken.run_id != "run" and taken.task == task.name:
            seen.append(counted(connection, "arrivals"))

    def leave() -> None:
        start(connection, other, 2 if task is short else 0, run_id="other")
        start(connection, other, 2 if task is short else 0, run_id="another")
        follower.drain()

    follower.runner.before = look
    at_the_first_step(driver, leave)
    start(connection, wide, 40)
    driver.drain()
    assert states(connection) == {"run": "running", "other": "completed", "another": "completed"}
    assert seen and seen[-1] == 0


def test_a_timer_that_another_process_took_back_is_set_again(
    new_child: Callable[..., Child], connection: Connection
) -> None:
    """By who had set it for the same instant before."""
    one, another = new_child(), new_child()

    def told(taken: Any) -> None:
        one.runner.before = lambda taken: None
        with connection.transaction():
            arrivals.leave(connection, "run", encode(Signal("go", "first")))
        another.drain()
        assert "" not in [key for key, *_ in work(connection)], "no timer is set while the run waits for its step"

    one.runner.before = told
    start(connection, until_an_instant, MANY)
    one.drain()
    assert [role for key, role, *_ in work(connection) if not key] == ["turn"]


def test_processes_that_take_turns_at_a_run_go_on_where_they_were(
    new_child: Callable[..., Child], connection: Connection
) -> None:
    """Each reads what the other has done, instead of computing what is refused and replaying the run."""
    BEGUN.clear()
    children = [new_child(drain_steps=2) for _ in range(2)]
    start(connection, one_by_one, 40)
    for number in range(40):
        children[number % 2].drain()
    assert states(connection) == {"run": "completed"}
    assert len(children[0].runner.calls) == len(children[1].runner.calls) == 20
    assert BEGUN == ["one by one"] * 2


def test_a_local_step_of_a_run_that_others_have_moved_is_found_in_its_code(
    new_child: Callable[..., Child], connection: Connection
) -> None:
    children = [new_child(drain_steps=1) for _ in range(3)]
    start(connection, with_local_steps, 6)
    for number in range(40):
        children[number % 3].drain()
    assert states(connection) == {"run": "completed"}
    assert [entry for entry in entries(connection) if entry["e"] == "attempted"] == []


@pytest.mark.parametrize("what", ["it fails", "it is interrupted"])
def test_what_others_take_in_while_a_turn_cannot_be_computed_is_not_taken_in_again(
    new_child: Callable[..., Child], connection: Connection, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It would be another failed attempt, and two rows of work for the next one."""
    child, other = new_child(), new_child(reservation=timedelta(microseconds=1))

    def die(taken: Any) -> None:
        raise KeyboardInterrupt

    child.runner.before = die
    start(connection, with_rare_attempts, "x")
    with pytest.raises(KeyboardInterrupt):
        child.drain()
    liveness.declare_dead(connection, child.incarnation)
    liveness.give_back_dead(connection)
    child.reborn()
    really, disturbed, signals = Execution.turn, list[str](), list[str]()

    def disturb(self: Execution, given: list[Arrival], *rest: Any) -> Turn:
        if not disturbed:
            disturbed.append(what)
            other.drain()
            if what == "it fails":
                raise ValueError("cannot be computed")
            signals.append("TERM")
        return really(self, given, *rest)

    monkeypatch.setattr(Execution, "turn", disturb)
    child.drainer._worker.interrupted = lambda: bool(signals)
    child.drain()
    assert disturbed and [entry["e"] for entry in entries(connection)].count("attempted") == 1
    assert [attempt for _, _, attempt, _ in work(connection)] == [1]
