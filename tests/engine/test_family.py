"""Children, scopes and links on a real database: what is undone with whom, what goes on."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta
from typing import Any

import pytest

from orchestrator import (
    ChildFailed,
    ConflictError,
    Effect,
    Rejected,
    RetryPolicy,
    SagaFailed,
    StepFailed,
    UsageError,
    saga,
    step,
)
from orchestrator.client import Client
from orchestrator.machine.journal import Cancel, LateSuccess, encode
from orchestrator.store import arrivals
from orchestrator.store.connection import Connection
from tests.engine.stage import Child, entries, kinds, run, state, states, until

AT_ONCE = RetryPolicy(timedelta(0), 1.0, timedelta(0), 2)
DONE: list[str] = []


@pytest.fixture(autouse=True)
def nothing_done() -> None:
    DONE.clear()


@step(retry=AT_ONCE)
def undo(what: str) -> None:
    DONE.append(f"undo {what}")


@step(compensate=undo, retry=AT_ONCE)
def do(what: str) -> str:
    DONE.append(what)
    return what


@step(effect=Effect.NONE, retry=AT_ONCE)
def refuse(what: str) -> None:
    raise Rejected(what)


@step(effect=Effect.PIVOT, retry=AT_ONCE)
def settle(what: str) -> None:
    if what == "lost":
        raise ConnectionError("no answer")
    DONE.append(what)


# -- children ----------------------------------------------------------------------------------------------------------
@saga.define
async def small(what: str) -> str:
    await saga.step(do, f"{what} 1")
    await saga.step(do, f"{what} 2")
    return what


@saga.define
async def failing(what: str) -> str:
    await saga.step(do, what)
    await saga.step(refuse, "no")
    return what


@saga.define
async def parent(then: str) -> list[str]:
    await saga.step(do, "before")
    results = await asyncio.gather(saga.child(small, "a"), saga.child(small, "b"))
    await saga.step(do, "after")
    if then == "fail":
        raise ValueError("no")
    if then == "wait":
        await saga.wait_signal("go")
    return results


@saga.define
async def grandparent(then: str) -> list[str]:
    result: list[str] = await saga.child(parent, "well")
    if then == "fail":
        raise ValueError("no")
    return result


@saga.define
async def forgiving(what: str) -> str:
    try:
        return await saga.child(failing, what)
    except ChildFailed as error:
        assert isinstance(error, StepFailed) and isinstance(error, SagaFailed)
        return f"{error.state}: {error.error_type} {error.error['message']}"


@saga.define(name="x" * 400)
async def nests(n: int) -> int:
    return await saga.child(nests, n - 1) if n else 0


@step(effect=Effect.NONE, retry=AT_ONCE)
def look_at_two(what: str) -> None:
    raise ExceptionGroup("both", [ValueError(f"no {what}"), KeyError("k")])


@saga.define
async def looks_beside(what: str) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(refused_beside(what))


async def refused_beside(what: str) -> None:
    raise ValueError(f"no {what}\nand so on")


@saga.define
async def tells_of_groups(what: str) -> list[str]:
    told = []
    for ask in (lambda: saga.step(look_at_two, what), lambda: saga.child(looks_beside, what)):
        try:
            await ask()
        except StepFailed as error:
            told.append(str(error))
    return told


@saga.define
async def with_pivot(then: str) -> str:
    if then == "told":
        await saga.wait_signal("go")
    await saga.step(settle, "lost" if then == "lost" else "settled")
    return "settled"


@saga.define
async def parent_of_a_pivot(then: str) -> str:
    await saga.step(do, "before")
    done = await saga.child(with_pivot, then)
    if then == "fail":
        raise ValueError("no")
    return done


@saga.define
async def pays_and_waits(what: str) -> str:
    await saga.step(do, what)
    await saga.step(settle, "settled")
    if what == "paid for":
        await saga.wait_signal("go")
    return what


@saga.define
async def impatient_parent(seconds: float) -> str:
    try:
        return await asyncio.wait_for(saga.child(pays_and_waits, "paid for"), seconds)
    except TimeoutError:
        return "gave up"


@saga.define
async def scope_around_a_pivot(then: str) -> str:
    async with saga.scope():
        await saga.child(pays_and_waits, "paid at once")
        raise ValueError(then)


@saga.define
async def broken(what: str) -> str:
    await saga.step(do, what)
    raise KeyError(what)


@saga.define
async def parent_of_a_broken_one(then: str) -> str:
    found = await saga.child(broken, "thing")
    if then == "fail":
        raise ValueError("no")
    return found


@saga.define
async def grandparent_of_a_pivot() -> str:
    return await saga.child(parent_of_a_pivot, "well")


def test_children_are_completed_with_their_root(child: Child, client: Client, connection: Connection) -> None:
    result = run(client, child, parent, "well")
    assert result.get(timeout=10) == ["a", "b"]
    child.drain()
    assert set(states(connection).values()) == {"completed"}
    assert len(states(connection)) == 3


def test_a_child_that_is_done_runs_until_its_root_ends(child: Child, client: Client, connection: Connection) -> None:
    result = run(client, child, parent, "wait")
    assert set(states(connection).values()) == {"running"}
    result.signal("go")
    child.drain()
    assert set(states(connection).values()) == {"completed"}


def test_the_undo_of_a_parent_undoes_its_children(child: Child, client: Client, connection: Connection) -> None:
    result = run(client, child, parent, "fail")
    with pytest.raises(SagaFailed, match="ValueError"):
        result.get(timeout=10)
    undone = [what for what in DONE if what.startswith("undo")]
    assert undone == ["undo after", "undo b 2", "undo b 1", "undo a 2", "undo a 1", "undo before"]
    assert set(states(connection).values()) == {"compensated"}


def test_grandchildren_are_undone_with_the_root(child: Child, client: Client, connection: Connection) -> None:
    run(client, child, grandparent, "fail")
    assert sorted(what for what in DONE if what.startswith("undo")) == sorted(
        f"undo {what}" for what in DONE if not what.startswith("undo")
    )
    assert set(states(connection).values()) == {"compensated"}
    assert len(states(connection)) == 4


def test_grandchildren_are_completed_with_the_root(child: Child, client: Client, connection: Connection) -> None:
    assert run(client, child, grandparent, "well").get(timeout=10) == ["a", "b"]
    child.drain()
    assert set(states(connection).values()) == {"completed"}


def test_a_child_that_fails_is_undone_before_its_parent_hears_of_it(child: Child, client: Client) -> None:
    result = run(client, child, forgiving, "thing")
    assert result.get(timeout=10).startswith("compensated: StepFailed")
    assert DONE == ["thing", "undo thing"]


@pytest.mark.parametrize(("levels", "state"), [(3, "completed"), (4, "parked")])
def test_a_child_of_a_child_whose_id_nobody_could_name_is_refused(
    child: Child, client: Client, levels: int, state: str
) -> None:
    """Longer still, no index could hold it: every turn failed, and workers took Postgres for down."""
    run_id = "r" * 500
    run(client, child, nests, levels, run_id=run_id)
    deepest = run_id + f"/{'x' * 400}#0" * 3
    told = client.outcome(deepest)
    assert told.state == state
    if state == "parked":
        assert "would be longer than 2000 bytes" in str(told.parked)


def test_saga_code_is_told_which_errors_are_in_a_group(child: Child, client: Client) -> None:
    step_failed, child_failed = run(client, child, tells_of_groups, "thing").get()
    assert step_failed.endswith(": ExceptionGroup: both (2 sub-exceptions): ValueError: no thing; KeyError: 'k'")
    assert child_failed.endswith(
        ": ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception): ValueError: no thing"
    )


def test_a_parent_that_is_cancelled_while_its_child_waits_takes_it_along(
    child: Child, client: Client, connection: Connection
) -> None:
    result = run(client, child, child_that_waits, "x")
    result.cancel("enough")
    child.drain()
    assert states(connection)["run"] == "cancelled"
    assert DONE == ["x", "undo x"]
    assert "running" not in states(connection).values()


@saga.define
async def waits(what: str) -> None:
    await saga.step(do, what)
    await saga.wait_signal("never")


@saga.define
async def child_that_waits(what: str) -> None:
    await saga.child(waits, what)


def test_a_terminated_parent_terminates_its_children(child: Child, client: Client, connection: Connection) -> None:
    result = run(client, child, child_that_waits, "x")
    result.terminate("stop")
    child.drain()
    assert set(states(connection).values()) == {"terminated"}
    assert DONE == ["x"]


@saga.define
async def goes_on(what: str) -> str:
    await saga.wait_signal("go")
    return await saga.step(do, what)


@saga.define
async def two_that_go_on(what: str) -> list[str]:
    done = await saga.child(small, "done")
    both = await asyncio.gather(saga.child(goes_on, "a"), saga.child(goes_on, "b"))
    return [done, *both]


def test_children_are_paused_and_resumed_with_their_parent(
    child: Child, client: Client, connection: Connection
) -> None:
    result = run(client, child, two_that_go_on, "x")
    under_way = [run_id for run_id in states(connection) if goes_on.name in run_id]
    result.pause("the bank is closed", by="ann")
    child.drain()
    assert {run_id for run_id, state in states(connection).items() if state == "paused"} == {"run", *under_way}
    for run_id in under_way:
        client.signal(run_id, "go")
    child.drain()
    assert DONE == ["done 1", "done 2"], "what is told meanwhile is kept"
    result.resume(by="ann")
    child.drain()
    assert result.get(timeout=10) == ["done", "a", "b"]


def test_a_family_that_is_paused_can_be_cancelled(child: Child, client: Client, connection: Connection) -> None:
    result = run(client, child, two_that_go_on, "x")
    result.pause()
    child.drain()
    result.cancel("enough")
    child.drain()
    assert "paused" not in states(connection).values()
    assert (state(connection), DONE[2:]) == ("cancelled", ["undo done 2", "undo done 1"])


def test_a_child_that_is_done_cannot_be_cancelled_alone(child: Child, client: Client, connection: Connection) -> None:
    run(client, child, parent, "wait")
    one = next(run_id for run_id in states(connection) if run_id != "run")
    with pytest.raises(UsageError, match=r"is done .* with run run, so it cannot be cancelled alone"):
        client.cancel(one)
    with pytest.raises(UsageError, match=r"is done .* with run run, so it cannot be paused alone"):
        client.operate(one, "pause")
    arrivals.leave(connection, one, encode(Cancel()))  # it was told before it was done
    child.drain()
    assert states(connection)[one] == "running"
    assert "cancel refused" in kinds(connection, one)


def test_a_child_whose_id_is_taken_fails(child: Child, client: Client, connection: Connection) -> None:
    run(client, child, small, "other", run_id=f"run/{failing.name}#0")
    result = run(client, child, forgiving, "thing")
    assert "ConflictError" in result.get(timeout=10)


@saga.define
async def forgives_and_waits(what: str) -> None:
    with contextlib.suppress(ChildFailed):
        await saga.child(waits, what)
    await saga.wait_signal("never")


@saga.define
async def gives_up_at_once(what: str) -> None:
    saga.child(waits, what).cancel()
    await saga.wait_signal("never")


@pytest.mark.parametrize("definition", [forgives_and_waits, gives_up_at_once])
def test_a_run_that_has_the_id_of_a_child_hears_nothing_of_its_parent(
    child: Child, client: Client, connection: Connection, definition: saga.Saga[[str], None]
) -> None:
    other = f"run/{waits.name}#0"
    run(client, child, waits, "other", run_id=other)
    result = run(client, child, definition, "thing")
    result.terminate("stop")
    child.drain()
    assert (states(connection)[other], DONE) == ("running", ["other"])


def test_a_pivot_of_a_child_is_one_for_its_root(child: Child, client: Client, connection: Connection) -> None:
    result = run(client, child, parent_of_a_pivot, "fail")
    assert states(connection)["run"] == "parked"
    assert DONE == ["before", "settled"], "nothing is undone after the point of no return"
    with pytest.raises(UsageError, match="point of no return"):
        result.cancel()


def test_a_pivot_of_a_grandchild_is_granted_by_the_root(child: Child, client: Client, connection: Connection) -> None:
    result = run(client, child, grandparent_of_a_pivot)
    assert result.get(timeout=10) == "settled"
    child.drain()
    assert set(states(connection).values()) == {"completed"}
    assert [e["phase"] for e in entries(connection) if e["e"] == "family pivot"] == ["asked", "granted", "succeeded"]


def test_a_cancel_that_comes_first_refuses_the_pivot(child: Child, client: Client, connection: Connection) -> None:
    result = run(client, child, parent_of_a_pivot, "told")
    result.cancel("enough")
    one = next(run_id for run_id in states(connection) if run_id != "run")
    client.signal(one, "go")
    child.drain()
    assert set(states(connection).values()) == {"cancelled"}
    assert DONE == ["before", "undo before"]


def test_a_cancel_that_comes_after_waits_for_the_pivot_of_a_child(
    child: Child, client: Client, connection: Connection
) -> None:
    result = run(client, child, parent_of_a_pivot, "told")
    one = next(run_id for run_id in states(connection) if run_id != "run")
    child.runner.before = lambda taken: result.cancel("too late") if taken.task == settle.name else None
    client.signal(one, "go")
    child.drain()
    assert states(connection)["run"] == "completed"
    assert "cancel refused" in kinds(connection)


def test_a_child_that_is_terminated_at_its_pivot_leaves_its_root_free(
    child: Child, client: Client, connection: Connection
) -> None:
    run(client, child, parent_of_a_pivot, "lost")
    one = next(run_id for run_id, state in states(connection).items() if state == "parked")
    client.terminate(one)
    child.drain()
    assert states(connection) == {"run": "compensated", one: "terminated"}
    assert client.outcome("run").left == [
        {"key": f"{with_pivot.name}#0/{settle.name}#0", "task": settle.name, "outcome": "unknown"}
    ]


def test_a_child_that_its_parent_gives_up_after_its_pivot_only_goes_forward(
    child: Child, client: Client, connection: Connection
) -> None:
    run(client, child, impatient_parent, 0.2)
    one = next(run_id for run_id in states(connection) if run_id != "run")
    until(child, lambda: "abandoned" in kinds(connection))
    assert (DONE, states(connection)[one]) == (["paid for", "settled"], "running")
    client.signal(one, "go")
    child.drain()
    assert DONE == ["paid for", "settled"], "nothing is undone after the point of no return"
    assert states(connection) == {"run": "completed", one: "completed"}
    assert client.outcome("run").output == "gave up"


def test_a_scope_in_which_a_child_passed_its_pivot_parks(child: Child, client: Client, connection: Connection) -> None:
    run(client, child, scope_around_a_pivot, "no")
    assert DONE == ["paid at once", "settled"], "nothing is undone after the point of no return"
    assert state(connection) == "parked"
    assert "point of no return" in str(client.outcome("run").parked)
    with pytest.raises(UsageError, match="with mended code, or `resolve` it"):
        client.operate("run", "skip")


def test_a_child_that_is_resolved_by_hand_tells_its_parent(
    child: Child, client: Client, connection: Connection
) -> None:
    result = run(client, child, parent_of_a_broken_one, "well")
    one = next(run_id for run_id, state in states(connection).items() if state == "parked")
    client.operate(one, "resolve", by="ann", value="by hand")
    child.drain()
    assert result.get(timeout=10) == "by hand"
    child.drain()
    assert states(connection) == {"run": "completed", one: "completed"}


def test_a_child_that_was_resolved_by_hand_is_undone_with_its_parent(
    child: Child, client: Client, connection: Connection
) -> None:
    run(client, child, parent_of_a_broken_one, "fail")
    one = next(run_id for run_id, state in states(connection).items() if state == "parked")
    client.operate(one, "resolve", by="ann", value="by hand")
    child.drain()
    assert DONE == ["thing", "undo thing"]
    assert states(connection) == {"run": "compensated", one: "compensated"}


@step(retry=AT_ONCE)
def note(what: str) -> None:
    DONE.append(f"note {what}")


@step(retry=AT_ONCE)
def keep(what: str) -> None:
    raise Rejected("it cannot be taken back")


@step(compensate=keep, retry=AT_ONCE)
def give(what: str) -> None:
    DONE.append(f"give {what}")


@saga.define
async def leaves_something(how: str) -> None:
    await saga.step(do, "before")
    await saga.step(note if how == "no undo" else give, "it")


@saga.define
async def parent_of_one_that_leaves_something(how: str) -> None:
    await saga.child(leaves_something, how)
    raise ValueError("no")


def left(client: Client) -> list[tuple[str, str]]:
    return [(item["key"], item["outcome"]) for item in client.outcome("run").left]  # type: ignore[index,call-overload]


def test_what_a_child_has_no_undo_for_is_left_by_its_root(child: Child, client: Client) -> None:
    result = run(client, child, parent_of_one_that_leaves_something, "no undo")
    assert (result.status, DONE[-1]) == ("compensated", "undo before")
    assert left(client) == [(f"{leaves_something.name}#0/{note.name}#0", "succeeded")]


def test_what_a_person_skips_in_a_child_is_left_by_its_root_which_is_not_compensated(
    child: Child, client: Client, connection: Connection
) -> None:
    result = run(client, child, parent_of_one_that_leaves_something, "skipped")
    one = next(run_id for run_id, state in states(connection).items() if state == "parked")
    client.operate(one, "skip", f"{give.name}#0", reason="written off")
    child.drain()
    assert (result.status, DONE[-1]) == ("failed", "undo before")
    assert left(client) == [(f"{leaves_something.name}#0/{give.name}#0", "succeeded")]


def test_a_child_that_was_terminated_after_it_was_done_and_is_skipped_is_left_by_its_root(
    child: Child, client: Client, connection: Connection
) -> None:
    result = run(client, child, parent, "wait")
    one = next(run_id for run_id in states(connection) if run_id.endswith(f"{small.name}#0"))
    client.terminate(one)
    child.drain()
    result.cancel()
    child.drain()
    (item,) = client.outcome("run").parked
    client.operate("run", "skip", item["key"], reason="written off")  # type: ignore[index,call-overload]
    child.drain()
    key = one.removeprefix("run/")
    assert result.status == "cancelled"
    assert left(client) == [(f"{key}/{do.name}#0", "succeeded"), (f"{key}/{do.name}#1", "succeeded")]


# -- scopes ------------------------------------------------------------------------------------------------------------
@saga.define
async def second_way(n: int) -> str:
    await saga.step(do, "outside")
    try:
        async with saga.scope():
            await saga.step(do, "first 1")
            async with saga.scope():
                await saga.step(do, "first 2")
            await saga.step(refuse, "no")
    except StepFailed:
        await saga.step(do, "second")
    if n:
        raise ValueError("no")
    return "done"


@saga.define
async def gathered(n: int) -> None:
    with_timeout = asyncio.timeout(1)
    try:
        async with with_timeout, saga.scope():
            await saga.step(do, "inside")
            await saga.wait_signal("never")
    except TimeoutError:
        await saga.step(do, "after")


def test_an_exception_that_leaves_a_scope_undoes_what_was_done_inside(child: Child, client: Client) -> None:
    assert run(client, child, second_way, 0).get(timeout=10) == "done"
    assert DONE == ["outside", "first 1", "first 2", "undo first 2", "undo first 1", "second"]


def test_what_a_scope_undid_is_not_undone_again(child: Child, client: Client, connection: Connection) -> None:
    run(client, child, second_way, 1)
    assert DONE[5:] == ["second", "undo second", "undo outside"]
    assert state(connection) == "compensated"


def test_a_timeout_that_leaves_a_scope_undoes_it(child: Child, client: Client, connection: Connection) -> None:
    run(client, child, gathered, 0)
    connection.execute("UPDATE orchestrator.work SET due_at = now() WHERE key = ''")
    until(child, lambda: state(connection) == "completed")
    assert DONE == ["inside", "undo inside", "after"]


# -- links -------------------------------------------------------------------------------------------------------------
@saga.define
async def counting(n: int) -> str:
    key = saga.uuid4().hex
    await saga.step(do, f"step {n} {key[:8]}")
    if n < 3:
        saga.continue_as_new(n + 1)
    if n == 3:
        await saga.wait_signal("go")
        raise ValueError("no")
    return "done"


@step(compensate=undo, retry=AT_ONCE)
def lose(what: str) -> str:
    raise ConnectionError("no answer")


@saga.define
async def losing(n: int) -> str:
    try:
        await saga.step(lose, f"step {n}")
    except StepFailed:
        if n < 2:
            saga.continue_as_new(n + 1)
    return "done"


@saga.define
async def carrying(n: int) -> str:
    async with saga.lock("account", 7):
        if n == 0:
            await saga.wait_signal("first")
            saga.continue_as_new(1)
        return str(await saga.wait_signal("news"))


@saga.define
async def listening(n: int) -> str:
    await saga.step(do, str(await saga.wait_signal("news")))
    if n < 2:
        saga.continue_as_new(n + 1)
    return "done"


@saga.define
async def holding_twice(n: int) -> str:
    async with saga.lock("account", 7):
        await saga.step(do, f"step {n}")
        async with saga.lock("account", 7):
            if n == 0:
                saga.continue_as_new(1)
    return "done"


@saga.define
async def impatient(name: str) -> str:
    try:
        async with saga.lock("account", 7, timeout=timedelta(seconds=1)):
            return "got it"
    except TimeoutError:
        return "gave up"


@saga.define
async def careless(n: int) -> None:
    saga.step(do, "not awaited")
    saga.continue_as_new(n)


@saga.define
async def inside_a_scope(n: int) -> None:
    async with saga.scope():
        saga.continue_as_new(n)


def locks(connection: Connection) -> list[tuple[str, bool]]:
    return connection.execute("SELECT run_id, granted_at IS NOT NULL FROM orchestrator.locks ORDER BY id").fetchall()


def test_a_run_goes_on_with_a_fresh_journal_under_its_id(child: Child, client: Client, connection: Connection) -> None:
    result = run(client, child, counting, 0)
    assert states(connection) == {"run": "running", "run~1": "continued", "run~2": "continued", "run~3": "continued"}
    assert len({what.split()[2] for what in DONE}) == 4
    keys = {context.idempotency_key for context in child.runner.contexts}
    assert len(keys) == 4
    result.signal("go")
    child.drain()
    assert [what.split()[:3] for what in DONE if what.startswith("undo")] == [["undo", "step", "3"]]
    assert client.start(counting, (0,), {}, {"task_id": "run"}).status == "compensated"
    with pytest.raises(ConflictError):
        client.start(counting, (3,), {}, {"task_id": "run"})


def test_another_worker_takes_a_link_over_from_one_that_knows_the_last(
    child: Child, client: Client, connection: Connection, database_url: str
) -> None:
    result = client.start(carrying, (0,), {}, {"task_id": "run"})
    child.drain()
    other = Child(database_url)
    result.signal("first")
    other.drain()
    result.signal("news", "hello")
    child.drain()
    other.close()
    assert result.get(timeout=10) == "hello"


def test_locks_and_unheard_signals_move_along(child: Child, client: Client, connection: Connection) -> None:
    result = run(client, child, carrying, 0)
    result.signal("news", "early")
    waiting = run(client, child, impatient, "other", run_id="other")
    assert locks(connection) == [("run", True), ("other", False)]
    result.signal("first")
    child.drain()
    assert result.get(timeout=10) == "early"
    child.drain()
    assert (waiting.get(timeout=10), locks(connection)) == ("got it", [])


def test_a_signal_that_is_sent_again_to_a_later_link_is_dropped(
    child: Child, client: Client, connection: Connection
) -> None:
    result = run(client, child, listening, 0)
    for signal_id in ("s1", "s1", "s2", "s1", "s2"):
        client.signal("run", "news", f"news of {signal_id}", signal_id=signal_id)
        child.drain()
    assert (result.status, DONE) == ("running", ["news of s1", "news of s2"])
    client.signal("run", "news", "news of s3", signal_id="s3")
    child.drain()
    assert (result.get(timeout=10), DONE[2:]) == ("done", ["news of s3"])


def test_a_lock_that_a_link_holds_twice_is_freed_with_its_run(
    child: Child, client: Client, connection: Connection
) -> None:
    assert run(client, child, holding_twice, 0).get(timeout=10) == "done"
    assert locks(connection) == []
    assert run(client, child, impatient, "other", run_id="other").get(timeout=10) == "got it"


def test_what_a_link_did_is_found_by_the_undo_if_it_takes_effect_late(
    child: Child, client: Client, connection: Connection
) -> None:
    assert run(client, child, losing, 0).get(timeout=10) == "done"
    key = f"{lose.name}#0"
    assert {context.idempotency_key for context in child.runner.contexts} > {f"run~{n}:{key}" for n in (1, 2)}
    for link in range(3):
        arrivals.leave(connection, "run", encode(LateSuccess(key, "do", 1, "late", link=link)), anyone=True)
    child.drain()
    assert {context.run_id: context.undoes for context in child.runner.contexts if "/late/" in context.run_id} == {
        f"run~1/late/{key}/1": f"run:{key}",
        f"run~2/late/{key}/1": f"run~1:{key}",
        f"run/late/{key}/1": f"run~2:{key}",
    }


@pytest.mark.parametrize("wrong", [careless, inside_a_scope])
def test_a_link_ends_with_nothing_outstanding(child: Child, client: Client, connection: Connection, wrong: Any) -> None:
    run(client, child, wrong, 0)
    assert state(connection) == "parked"
    assert "continue_as_new()" in str(client.outcome("run").parked)


def test_an_id_that_looks_like_a_link_is_refused(client: Client) -> None:
    with pytest.raises(UsageError, match="ended links"):
        client.start(counting, (0,), {}, {"task_id": "run~1"})
