"""Locks on a real database: who waits for whom, what frees them, and what becomes of runs that wait for each other."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from orchestrator import ChildFailed, DeadlockError, SagaFailed, StepFailed, saga
from orchestrator.client import Client
from orchestrator.engine.circles import break_circles
from orchestrator.engine.pump import Pump
from orchestrator.result import SagaResult
from orchestrator.saga import Saga
from orchestrator.store import circles
from orchestrator.store.connection import Connection
from tests.engine.stage import Child, kinds, run, state, states, until
from tests.engine.test_family import DONE, do, impatient, locks, refuse


@pytest.fixture(autouse=True)
def nothing_done() -> None:
    DONE.clear()


@saga.define
async def locking(name: str, then: str = "") -> str:
    async with saga.lock("account", 7):
        await saga.step(do, name)
        await saga.wait_signal("go")
        await saga.step(do, f"{name} again")
        if then == "fail":
            raise ValueError("no")
    return name


@saga.define
async def in_order(first: str, second: str) -> None:
    async with saga.lock(first):
        await saga.wait_signal("go")
        async with saga.lock(second):
            await saga.step(do, f"{first} {second}")


@saga.define
async def briefly(name: str) -> str:
    async with saga.lock(name, timeout=timedelta(seconds=1)):
        return name


@saga.define
async def under_a_lock(first: str, second: str) -> str:
    async with saga.lock(first):
        try:
            return await saga.child(briefly, second)
        except ChildFailed as error:
            return error.error_type


@saga.define
async def under_both() -> str:
    async with saga.lock("x"):
        return " ".join(await asyncio.gather(saga.child(account_7), saga.child(behind, "y")))


@saga.define
async def account_7() -> str:
    async with saga.lock("account", 7):
        return "account"


@saga.define
async def nested(name: str) -> str:
    async with saga.lock("account", 7), saga.lock("account", 7):
        return str(await saga.child(locked_child, name))


@saga.define
async def locked_child(name: str) -> str:
    async with saga.lock("account", 7):
        return name


def test_who_comes_first_has_the_lock_and_the_next_gets_it_then(
    child: Child, client: Client, connection: Connection
) -> None:
    one, two, three = (run(client, child, locking, name, run_id=name) for name in ("one", "two", "three"))
    assert DONE == ["one"]
    assert locks(connection) == [("one", True), ("two", False), ("three", False)]
    one.signal("go")
    two.signal("go")
    child.drain()
    assert DONE == ["one", "one again", "two", "two again", "three"]
    three.signal("go")
    child.drain()
    assert (locks(connection), three.get(timeout=10)) == ([], "three")


def test_what_was_done_under_a_lock_is_undone_under_it(child: Child, client: Client, connection: Connection) -> None:
    one = run(client, child, locking, "one", "fail", run_id="one")
    two = run(client, child, locking, "two", run_id="two")
    one.signal("go")
    child.drain()
    assert DONE == ["one", "one again", "undo one again", "undo one", "two"]
    two.cancel()
    child.drain()
    assert (locks(connection), state(connection, "two")) == ([], "cancelled")


@saga.define
async def another_way(name: str) -> str:
    try:
        async with saga.scope(), saga.lock("account", 7):
            await saga.step(do, name)
            await saga.wait_signal("go")
            raise ValueError("no")
    except ValueError:
        await saga.wait_signal("go on")
        return name


@pytest.mark.parametrize("cache_runs", [1000, 0])
def test_what_a_scope_undoes_is_undone_under_its_lock_as_well(
    new_child: Callable[..., Child], client: Client, connection: Connection, cache_runs: int
) -> None:
    """And then the lock is free, although the run goes on; also if its code is replayed in between."""
    child = new_child(cache_runs=cache_runs)
    seen: list[Any] = []
    one = run(client, child, another_way, "one", run_id="one")
    run(client, child, locking, "two", run_id="two")
    child.runner.before = lambda taken: seen.append(locks(connection)) if taken.role == "undo" else None
    one.signal("go")
    child.drain()
    assert seen == [[("one", True), ("two", False)]]
    assert (DONE, locks(connection)) == (["one", "undo one", "two"], [("two", True)])
    one.signal("go on")
    child.drain()
    assert one.get(timeout=10) == "one"


@saga.define
async def fails_under_a_lock(name: str) -> str:
    try:
        async with saga.lock("account", 7):
            await saga.step(refuse, name)
    except StepFailed:
        return "failed"
    return name


@saga.define
async def one_child_after_the_other() -> str:
    return f"{await saga.child(fails_under_a_lock, 'no')}, then {await saga.child(account_7)}"


def test_a_child_that_returns_as_its_block_fails_frees_the_lock_and_not_only_with_its_root(
    child: Child, client: Client, connection: Connection
) -> None:
    result = run(client, child, one_child_after_the_other)
    assert (result.status, locks(connection)) == ("completed", [])
    assert result.get(timeout=10) == "failed, then account"


def test_a_run_that_is_terminated_frees_its_locks(child: Child, client: Client, connection: Connection) -> None:
    one = run(client, child, locking, "one", run_id="one")
    run(client, child, locking, "two", run_id="two")
    one.terminate()
    child.drain()
    assert locks(connection) == [("two", True)]


def test_who_gives_up_leaves_the_queue(child: Child, client: Client, connection: Connection) -> None:
    run(client, child, locking, "one", run_id="one")
    result = run(client, child, impatient, "two", run_id="two")
    until(child, result.ready)
    assert (result.get(timeout=10), locks(connection)) == ("gave up", [("one", True)])


@saga.define
async def asks_and_gives_up(how: str) -> str:
    if how == "timeout":
        async with asyncio.timeout(0), saga.lock("account", 7):
            return "not reached"
    async with asyncio.TaskGroup() as group:
        group.create_task(_held())
        group.create_task(_fails_at_once())
    return "not reached"


async def _held() -> None:
    async with saga.lock("account", 7):
        await saga.step(do, "under the lock")


async def _fails_at_once() -> None:
    raise ValueError("no")


@pytest.mark.parametrize("how", ["timeout", "sibling"])
def test_a_lock_that_is_asked_for_and_given_up_in_one_turn_keeps_nobody_out(
    child: Child, client: Client, connection: Connection, how: str
) -> None:
    assert run(client, child, asks_and_gives_up, how, run_id="one").status == "failed"
    assert locks(connection) == []
    assert run(client, child, account_7, run_id="two").get(timeout=10) == "account"


@saga.define
async def at_once(seconds: float) -> str:
    try:
        async with saga.lock("account", 7, timeout=seconds):
            await saga.step(do, "under the lock")
        return "got it"
    except TimeoutError:
        return "gave up"


@pytest.mark.parametrize("seconds", [0, -1, 1e-9, 1e-4])
def test_a_lock_that_is_free_is_had_with_any_timeout(
    child: Child, client: Client, connection: Connection, seconds: float
) -> None:
    assert run(client, child, at_once, seconds, run_id="one").get(timeout=10) == "got it"
    run(client, child, locking, "two", run_id="two")
    result = run(client, child, at_once, seconds, run_id="three")
    until(child, result.ready)
    assert (result.get(timeout=10), locks(connection)) == ("gave up", [("two", True)])


def test_runs_that_wait_for_each_other_are_told(child: Child, client: Client, connection: Connection) -> None:
    one = run(client, child, in_order, "x", "y", run_id="one")
    two = run(client, child, in_order, "y", "x", run_id="two")
    one.signal("go")
    child.drain()
    two.signal("go")
    child.drain()
    with pytest.raises(SagaFailed, match=r"DeadlockError.*would never be free.*two"):
        two.get(timeout=10)
    one.get(timeout=10)
    assert (DONE, locks(connection)) == (["x y"], [])
    assert issubclass(DeadlockError, Exception)


def test_a_circle_through_a_child_that_is_awaited_ends_by_its_timeout(
    child: Child, client: Client, connection: Connection
) -> None:
    other = run(client, child, in_order, "y", "x", run_id="other")
    parent_ = run(client, child, under_a_lock, "x", "y", run_id="parent")
    other.signal("go")
    child.drain()
    assert sorted(locks(connection), key=str)[0] == ("other", False), "nobody has been refused"
    until(child, other.ready)
    assert (parent_.get(timeout=10), DONE, locks(connection)) == ("TimeoutError", ["y x"], [])


@saga.define
async def behind(name: str) -> str:
    async with saga.lock(name):
        await saga.step(do, f"child {name}")
    return name


@saga.define
async def awaiting(first: str, seconds: list[str], besides: str = "") -> str:
    async with saga.lock(first):
        if besides == "later":
            await saga.wait_signal("go")
        awaited: list[Awaitable[str]] = [saga.child(behind, second) for second in seconds]
        if besides == "signal":
            awaited.append(saga.wait_signal("go"))
        async with asyncio.timeout(3600 if besides == "timer" else None):
            return " ".join(await asyncio.gather(*awaited))


def in_a_circle(client: Client, child: Child, besides: str = "") -> tuple[SagaResult, SagaResult]:
    """Let two runs wait for each other, one of them by way of a child."""
    other = run(client, child, in_order, "y", "x", run_id="other")
    parent = client.start(awaiting, ("x", ["y"], besides), {}, {"task_id": "parent"})
    child.drain()
    other.signal("go")
    child.drain()
    return parent, other


CHILD = f"parent/{behind.name}#0"


def test_a_circle_through_a_child_that_is_awaited_is_found_and_named(
    child: Child, client: Client, connection: Connection
) -> None:
    parent, other = in_a_circle(client, child)
    assert locks(connection) == [("other", True), ("parent", True), (CHILD, False), ("other", False)]
    assert break_circles(connection) == 1
    child.drain()
    told = f'lock ["x"] would never be free: run other waits behind parent (["x"]), which awaits its child {CHILD}, '
    with pytest.raises(
        SagaFailed, match=re.escape(f'DeadlockError: run other: {told}which waits behind other (["y"])')
    ):
        other.get(timeout=10)
    assert parent.get(timeout=10) == "y"
    child.drain()
    assert (locks(connection), set(states(connection).values())) == ([], {"completed", "failed"})


def test_of_a_circle_who_came_last_is_told_be_it_a_child(child: Child, client: Client, connection: Connection) -> None:
    parent, other = in_a_circle(client, child, "later")
    parent.signal("go")
    child.drain()
    assert break_circles(connection) == 1
    child.drain()
    with pytest.raises(SagaFailed, match=f"ChildFailed.*DeadlockError: run {CHILD}.* never be free: run {CHILD} waits"):
        parent.get(timeout=10)
    other.get(timeout=10)
    assert (DONE, locks(connection)) == (["y x"], [])


def test_the_turn_of_a_parent_may_close_a_circle(child: Child, client: Client, connection: Connection) -> None:
    parent, other = in_a_circle(client, child, "signal")
    assert break_circles(connection) == 0, "it may be told something, and go on without its child"
    parent.signal("go", "on")
    assert break_circles(connection) == 0, "it was, and its turn is due"
    child.drain()
    assert break_circles(connection) == 1
    child.drain()
    assert (other.status, parent.get(timeout=10)) == ("failed", "y on")


def test_a_run_that_a_timer_moves_is_in_no_circle(child: Child, client: Client, connection: Connection) -> None:
    in_a_circle(client, child, "timer")
    assert break_circles(connection) == 0


def test_a_run_that_a_person_holds_is_in_no_circle(child: Child, client: Client, connection: Connection) -> None:
    parent, _ = in_a_circle(client, child)
    client.operate("parent", "pause", by="ann")
    child.drain()
    assert (break_circles(connection), parent.status) == (0, "paused")
    client.operate("parent", "resume", by="ann")
    child.drain()
    assert break_circles(connection) == 1


def test_who_only_waits_behind_a_circle_is_not_told(child: Child, client: Client, connection: Connection) -> None:
    in_a_circle(client, child)
    bystanders = [client.start(behind, ("x",), {}, {"task_id": f"bystander {n}"}) for n in range(3)]
    child.drain()
    assert break_circles(connection) == 1
    child.drain()
    assert [bystander.get(timeout=10) for bystander in bystanders] == ["x"] * 3


def test_a_circle_through_one_of_two_children_waits_until_the_other_has_ended(
    child: Child, client: Client, connection: Connection
) -> None:
    free = run(client, child, locking, "free", run_id="free")
    other = run(client, child, in_order, "y", "x", run_id="other")
    both = client.start(under_both, (), {}, {"task_id": "parent"})
    child.drain()
    other.signal("go")
    child.drain()
    assert break_circles(connection) == 0
    free.signal("go")
    child.drain()
    assert break_circles(connection) == 1
    child.drain()
    assert (both.get(timeout=10), other.status) == ("account y", "failed")


def test_a_circle_is_told_of_once_however_many_look(
    child: Child, client: Client, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_circle(client, child)
    refuse = circles.refuse

    def look_as_well(*given: Any) -> bool:
        monkeypatch.setattr(circles, "refuse", refuse)
        assert break_circles(connection) == 1
        return refuse(*given)

    monkeypatch.setattr(circles, "refuse", look_as_well)
    assert break_circles(connection) == 0
    child.drain()
    assert kinds(connection, "other").count("settled") == 3


def test_who_is_let_in_between_the_look_and_the_refusal_is_not_refused(
    child: Child, client: Client, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_circle(client, child)
    refuse = circles.refuse

    def too_late(*given: Any) -> bool:
        connection.execute("UPDATE orchestrator.locks SET granted_at = now()")
        return refuse(*given)

    monkeypatch.setattr(circles, "refuse", too_late)
    assert break_circles(connection) == 0
    assert locks(connection)[-1] == ("other", True), "and it has its place"


def test_a_run_that_has_yet_to_read_something_is_in_no_circle(
    child: Child, client: Client, connection: Connection
) -> None:
    in_a_circle(client, child)
    connection.execute("INSERT INTO orchestrator.arrivals (run_id, arrival) VALUES ('parent', '{}')")
    assert break_circles(connection) == 0, "who left it died before he made a turn due"


def test_a_pump_looks_for_circles(child: Child, client: Client, connection: Connection) -> None:
    _, other = in_a_circle(client, child)
    Pump(lambda *_: None, lease=timedelta(seconds=2), reservation=timedelta(0)).run_once(connection)
    child.drain()
    assert other.status == "failed"


def test_a_run_and_its_children_do_not_keep_each_other_out(
    child: Child, client: Client, connection: Connection
) -> None:
    assert run(client, child, nested, "me").get(timeout=10) == "me"
    child.drain()
    assert locks(connection) == []


# -- a family in one line ----------------------------------------------------------------------------------------------
@saga.define
async def twice(name: str) -> str:
    async def again() -> str:
        async with saga.lock("account", 7):
            return "again"

    other = asyncio.create_task(again())
    await asyncio.sleep(0)
    async with saga.lock("account", 7):
        return f"{name} {await other}"


@saga.define
async def with_a_child_in_line(name: str) -> str:
    async def hold(child: Awaitable[str]) -> str:
        async with saga.lock("account", 7):
            return f"{name} {await child}"

    holding = asyncio.create_task(hold(below := saga.child(account_7)))
    await asyncio.sleep(0)
    await saga.wait([holding, below])
    return await holding


@pytest.mark.parametrize("family", [twice, with_a_child_in_line])
def test_a_family_that_stands_in_line_twice_is_let_in_together(
    child: Child, client: Client, connection: Connection, family: Saga[[str], str]
) -> None:
    first = run(client, child, locking, "first", run_id="first")
    result = run(client, child, family, "second")
    third = run(client, child, account_7, run_id="third")
    assert [granted for _, granted in locks(connection)] == [True, False, False, False]
    first.signal("go")
    child.drain()
    assert result.get(timeout=10) == f"second {'again' if family is twice else 'account'}"
    child.drain()
    assert (third.get(timeout=10), locks(connection)) == ("account", [])
