"""Stock asyncio on the deterministic loop: what works, what is refused, and keys that do not depend on timing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from orchestrator import saga
from orchestrator.errors import StepFailed, UsageError, message_of
from orchestrator.machine.keys import Branch
from orchestrator.machine.turn import CodeError
from tests.machine.stage import Stage
from tests.machine.steps import charge, look, mail

Body = Callable[[], Awaitable[Any]]


def _stage(body: Body) -> Stage:
    @saga.define(name="on the loop")
    async def on_the_loop(n: int) -> Any:
        return await body()

    return Stage(on_the_loop, 1)


def _keys(body: Body) -> list[str]:
    stage = _stage(body)
    stage.turn()
    return [key.replace("tests.machine.steps.", "") for key in stage.work]


def _output(stage: Stage) -> Any:
    returned = stage.execution.fold.returned
    assert returned is not None, stage.state
    return returned.output


# -- keys --------------------------------------------------------------------------------------------------------------
def test_a_branch_counts_each_name_for_itself() -> None:
    branch = Branch()
    assert [branch.key("a"), branch.key("b"), branch.key("a")] == ["a#0", "b#0", "a#1"]


def test_child_branches_have_their_index_in_the_path() -> None:
    branch = Branch()
    first, second = branch.child(), branch.child()
    assert [first.key("a"), second.key("a"), second.child().key("a")] == ["0/a#0", "1/a#0", "1.0/a#0"]


def test_gathered_coroutines_have_a_branch_each_and_gathered_steps_none() -> None:
    async def body() -> None:
        async def one(n: int) -> None:
            await saga.step(look, n)

        await asyncio.gather(saga.step(look, 0), one(1), one(2))

    assert _keys(body) == ["look#0", "0/look#0", "1/look#0"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_keys_do_not_depend_on_which_branch_is_faster(order: tuple[int, ...]) -> None:
    async def branch(n: int) -> None:
        await saga.step(look, n)
        await saga.step(charge, n)

    async def body() -> None:
        async with asyncio.TaskGroup() as group:
            for n in range(3):
                group.create_task(branch(n))

    stage = _stage(body)
    stage.turn()
    for n in order:
        stage.succeed(f"{n}/tests.machine.steps.look#0", n)
    keys = {key: work.call["a"]["n"] for key, work in stage.work.items()}
    assert keys == {f"{n}/tests.machine.steps.charge#0": n for n in range(3)}


@pytest.mark.parametrize("seconds", [None, 5, 0])
def test_wait_for_shares_its_parents_path_on_every_python(seconds: float | None) -> None:
    async def one(n: int) -> None:
        await saga.step(look, n)

    async def body() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(one(0), seconds)
        await asyncio.gather(one(1))

    stage = _stage(body)
    stage.turn()
    if seconds != 0:
        assert list(stage.work) == ["tests.machine.steps.look#0"]
        stage.succeed("look", 0)
    assert list(stage.work) == ["0/tests.machine.steps.look#0"]


def test_a_task_made_inside_wait_for_is_a_branch_of_its_own() -> None:
    async def inner() -> None:
        await asyncio.gather(asyncio.create_task(leaf(0)), leaf(1))

    async def leaf(n: int) -> None:
        await saga.step(look, n)

    async def body() -> None:
        await asyncio.wait_for(inner(), 5)

    assert _keys(body) == ["0/look#0", "1/look#0"]


# -- what works --------------------------------------------------------------------------------------------------------
def test_a_step_can_be_started_now_and_awaited_later() -> None:
    async def body() -> list[int]:
        first = saga.step(look, 1)
        second = await saga.step(look, 2)
        return [await first, second]

    stage = _stage(body)
    stage.turn()
    stage.succeed("tests.machine.steps.look#1", 2)
    stage.succeed("tests.machine.steps.look#0", 1)
    assert _output(stage) == [1, 2]


def test_sleeping_wakes_at_the_right_instant_and_not_before() -> None:
    async def body() -> str:
        await saga.sleep(timedelta(hours=24))
        return str(saga.now())

    stage = _stage(body)
    turn = stage.turn()
    assert turn.wake == stage.now + timedelta(hours=24)
    assert stage.turn(at_s=86_399).state == "running"
    stage.turn(at_s=86_400)
    assert _output(stage) == "2026-01-02 00:00:00+00:00"


def test_sleep_until_an_instant_that_has_passed_returns_at_once() -> None:
    async def body() -> str:
        await saga.sleep_until(saga.now() - timedelta(days=1))
        return "awake"

    stage = _stage(body)
    stage.turn()
    assert _output(stage) == "awake"


@pytest.mark.parametrize("seconds", [math.inf, 1e12, 1e300])
def test_a_timer_beyond_all_dates_never_fires(seconds: float) -> None:
    async def body() -> str:
        async with asyncio.timeout(seconds):
            await saga.step(look, 1)
        return "looked"

    stage = _stage(body)
    assert stage.turn().wake is None
    stage.succeed("look", 1)
    assert _output(stage) == "looked"


def test_sleep_until_refuses_an_instant_without_a_time_zone() -> None:
    async def body() -> None:
        await saga.sleep_until(saga.now().replace(tzinfo=None))

    with pytest.raises(CodeError, match="aware"):
        _stage(body).turn()


def test_sleep_refuses_a_number_that_does_not_say_what_it_counts() -> None:
    async def body() -> None:
        await saga.sleep(cast(Any, 5))

    with pytest.raises(CodeError, match=r"takes a timedelta.*asyncio\.sleep"):
        _stage(body).turn()


def test_timers_fire_in_the_order_of_their_due_times() -> None:
    seen: list[int] = []

    async def body() -> None:
        async def nap(seconds: int) -> None:
            await asyncio.sleep(seconds)
            seen.append(seconds)

        await asyncio.gather(*map(nap, (3, 1, 2)))

    stage = _stage(body)
    stage.turn()
    stage.turn(at_s=10)
    assert seen == [1, 2, 3]


def test_a_task_group_gives_the_siblings_of_a_failed_branch_up() -> None:
    async def body() -> str:
        async def one(step: Any) -> None:
            await saga.step(step, 1)

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(one(look))
                group.create_task(one(charge))
        except* StepFailed:
            pass
        return "caught"

    stage = _stage(body)
    stage.turn()
    stage.reject("look")
    assert (_output(stage), stage.state) == ("caught", "completed")


def test_queues_events_and_locks_work_between_branches() -> None:
    async def body() -> list[int]:
        queue: asyncio.Queue[int] = asyncio.Queue()
        lock, ready = asyncio.Lock(), asyncio.Event()

        async def produce() -> None:
            async with lock:
                queue.put_nowait(await saga.step(look, 1))
            ready.set()

        task = asyncio.create_task(produce())
        await ready.wait()
        await task
        return [await queue.get()]

    stage = _stage(body)
    stage.turn()
    stage.succeed("look", 1)
    assert _output(stage) == [1]


def test_a_task_that_nobody_holds_is_not_collected_as_garbage() -> None:
    async def body() -> str:
        event = asyncio.Event()

        async def background() -> None:
            await asyncio.Event().wait()

        asyncio.create_task(background())  # noqa: RUF006
        asyncio.get_running_loop().call_later(5, event.set)
        await event.wait()
        return "done"

    stage = _stage(body)
    stage.turn()
    assert len(stage.execution.code.loop.pending_tasks()) == 2  # type: ignore[union-attr]
    stage.turn(at_s=5)
    assert _output(stage) == "done"


@pytest.mark.parametrize("late", [1, 2])
def test_saga_wait_returns_lists_in_request_order(late: int) -> None:
    async def body() -> list[list[int]]:
        requests = [saga.step(look, n) for n in range(3)]
        done, pending = await saga.wait(requests, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*pending)
        return [[requests.index(r) for r in done], [requests.index(r) for r in pending]]

    stage = _stage(body)
    stage.turn()
    for n in (late, 0, 3 - late):
        stage.succeed(f"tests.machine.steps.look#{n}", n)
    assert _output(stage) == [[late], [0, 3 - late]]


def test_a_set_of_requests_has_the_same_order_everywhere() -> None:
    async def body() -> list[int]:
        requests = {saga.step(look, n) for n in range(50)}
        done, _ = await saga.wait(requests)
        return [await each for each in done]

    stage = _stage(body)
    stage.turn()
    for n in reversed(range(50)):
        stage.succeed(f"tests.machine.steps.look#{n}", n)
    assert _output(stage) == list(range(50))


def test_saga_wait_takes_a_timeout_and_gives_nothing_up() -> None:
    async def body() -> list[int]:
        request = saga.step(look, 1)
        done, pending = await saga.wait([request], timeout=timedelta(seconds=5))
        return [len(done), len(pending), await request]

    stage = _stage(body)
    stage.turn()
    stage.turn(at_s=5)
    stage.succeed("look", 1)
    assert _output(stage) == [0, 1, 1]


def test_saga_as_completed_yields_in_the_order_of_the_journal() -> None:
    async def body() -> list[int]:
        return [future.result() async for future in saga.as_completed([saga.step(look, n) for n in range(3)])]

    stage = _stage(body)
    stage.turn()
    for n in (2, 0, 1):
        stage.succeed(f"tests.machine.steps.look#{n}", n)
    assert _output(stage) == [2, 0, 1]


def test_a_saga_may_return_at_once_and_ask_for_nothing() -> None:
    async def body() -> int:
        return 1

    stage = _stage(body)
    stage.turn()
    assert (_output(stage), stage.state) == (1, "completed")


# -- what is refused ---------------------------------------------------------------------------------------------------
async def _asyncio_wait() -> None:
    await asyncio.wait([saga.step(look, 1)])


async def _asyncio_as_completed() -> None:
    for future in asyncio.as_completed([saga.step(look, 1)]):
        await future


async def _wait_for_a_set() -> None:
    await saga.wait({_direct_step()})


async def _as_a_set_completes() -> None:
    async for _ in saga.as_completed({_direct_step()}):
        pass


async def _wait_for_one() -> None:
    await saga.wait(saga.step(look, 1))


async def _wait_for_a_coroutine() -> None:
    await saga.wait(_direct_step())  # type: ignore[arg-type]


async def _wait_for_another_word() -> None:
    await saga.wait([saga.step(look, 1)], return_when="first")


async def _as_one_completes() -> None:
    async for _ in saga.as_completed(saga.step(look, 1)):
        pass


async def _direct_step() -> None:
    await saga.step(look, 1)


async def _thread() -> None:
    await asyncio.to_thread(print)


async def _socket() -> None:
    await asyncio.open_connection("localhost", 1)


async def _subprocess() -> None:
    await asyncio.create_subprocess_exec("true")


async def _forgets_to_await(use: Callable[[Any], object]) -> None:
    use(saga.step(look, 1))


async def _task_of_a_request() -> None:
    asyncio.create_task(saga.step(look, 1))  # type: ignore[arg-type]  # noqa: RUF006


async def _group_of_a_request() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(saga.step(look, 1))  # type: ignore[arg-type]


async def _direct_call() -> None:
    mail(1)


async def _direct_delay() -> None:
    mail.delay(1)


def _plain() -> int:
    return 1


async def _plain_function() -> None:
    await saga.step(_plain)  # type: ignore[call-overload]


async def _called_already() -> None:
    await saga.step(_direct_step())  # type: ignore[call-overload]


async def _once_called_already() -> None:
    await saga.once("rate", _plain())  # type: ignore[arg-type]


async def _once_a_coroutine() -> None:
    await saga.once("rate", _direct_step())  # type: ignore[arg-type]


async def _nested_saga() -> None:
    saga.define(_nested_target).delay()


async def _nested_target() -> None: ...


@pytest.mark.parametrize(
    ("body", "instead"),
    [
        (_asyncio_wait, r"saga\.wait\(\)"),
        (_asyncio_as_completed, r"saga\.as_completed\(\)"),
        (_wait_for_a_set, "a list, not a set"),
        (_as_a_set_completes, "a list, not a set"),
        (_wait_for_one, r"saga\.wait\(\) takes a list .* `saga\.wait\(\[saga\.step"),
        (_wait_for_a_coroutine, r"saga\.wait\(\) takes a list"),
        (_wait_for_another_word, r"return_when= is one of FIRST_COMPLETED, FIRST_EXCEPTION, ALL_COMPLETED, not"),
        (_as_one_completes, r"saga\.as_completed\(\) takes a list .* `saga\.as_completed\(\["),
        (_thread, r"saga\.step.*saga\.once"),
        (_socket, r"saga\.step.*saga\.once"),
        (_subprocess, r"saga\.step.*saga\.once"),
        (_direct_call, r"await saga\.step\(mail"),
        (_direct_delay, r"saga\.step"),
        (_nested_saga, r"saga\.child"),
        (_plain_function, r"saga\.step\(\) takes .* not the function _plain; declare it with @step"),
        (_called_already, r"not a coroutine; write `await saga\.step\(_direct_step, \.\.\.\)`"),
        (_once_called_already, r"saga\.once\('rate', \.\.\.\) takes a function, and not what it returns"),
        (_once_a_coroutine, r"saga\.once\('rate', \.\.\.\) takes a function, and not what it returns"),
    ],
)
def test_what_cannot_be_replayed_is_refused_with_the_name_of_what_to_use(body: Body, instead: str) -> None:
    with pytest.raises(CodeError, match=instead):
        _stage(body).turn()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("now", saga.now),
        ("uuid4", saga.uuid4),
        ("random", saga.random),
        ("info", saga.info),
        ("publish", lambda: saga.publish(stage="packing")),
        ("progress", lambda: saga.progress(1, 2)),
        ("sleep", lambda: asyncio.run(saga.sleep(timedelta(days=1)))),
        ("sleep_until", lambda: asyncio.run(saga.sleep_until(datetime.now(UTC) + timedelta(days=1)))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_works_in_a_saga_only_says_so_elsewhere(name: str, call: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match=rf"^saga\.{name}\(\) works inside a saga function only"):
        call()


@pytest.mark.parametrize(
    "use",
    [lambda found: found.cents, lambda found: found["cents"], lambda found: list(found)],
    ids=["attribute", "item", "iteration"],
)
def test_who_forgets_to_await_a_step_is_told(use: Callable[[Any], object]) -> None:
    with pytest.raises(CodeError, match=r"^tests\.machine\.steps\.look#0 was asked for, and not awaited: `await` it"):
        _stage(lambda: _forgets_to_await(use)).turn()


@pytest.mark.parametrize("body", [_task_of_a_request, _group_of_a_request])
def test_a_task_is_made_of_a_coroutine_and_not_of_a_request(body: Body) -> None:
    stage = _stage(body)
    with pytest.raises(CodeError) as failed:
        stage.turn()
    assert "create_task() takes a coroutine" in message_of(failed.value.error)
    assert "await it" in message_of(failed.value.error)


def test_dropping_a_live_saga_records_nothing_and_runs_no_step() -> None:
    ran: list[str] = []

    async def body() -> None:
        try:
            await saga.step(look, 1)
        finally:
            ran.append("finally")
            mail(1)
            ran.append("mail was called")

    stage = _stage(body)
    stage.turn()
    stage.execution.discard()
    assert ran == ["finally"]
    assert list(stage.execution.fold.steps) == ["tests.machine.steps.look#0"]
