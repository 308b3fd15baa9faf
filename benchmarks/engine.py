"""The engine's side: steps that do nothing, the sagas made of them, and the loads that a client can be asked for."""

from __future__ import annotations

import asyncio
import os
import time
from datetime import UTC, datetime, timedelta

from celery import Celery

from benchmarks.client import clocked, effect, waited
from orchestrator import Effect, Orchestrator, Rejected, SagaFailed, saga, step

app = Celery("benchmarks.engine", broker=os.environ["BENCH_BROKER_URL"])
orchestrator = Orchestrator(app, database_url=os.environ["BENCH_DATABASE_URL"])
PATIENCE_S = 300.0


@step(effect=Effect.NONE)
def noop() -> None: ...


@step(effect=Effect.NONE, queue="one")
def first() -> None: ...


@step(effect=Effect.NONE, queue="two")
def second() -> None: ...


@step(effect=Effect.NONE, queue="three")
def third() -> None: ...


@step
def undo(result: None) -> None: ...


@step(compensate=undo)
def do() -> None: ...


@step(compensate=undo)
def refuse() -> None:
    raise Rejected("no")


@step(effect=Effect.NONE)
def slow(run: int, number: int) -> None:
    time.sleep(0.05)
    effect(run, number)


@saga.define
async def three_steps() -> None:
    for _ in range(3):
        await saga.step(noop)


@saga.define(queue="one")
async def three_queues() -> None:
    await saga.step(first)
    await saga.step(second)
    await saga.step(third)


@saga.define
async def many_steps(count: int) -> None:
    for _ in range(count):
        await saga.step(noop)


@saga.define
async def parallel_steps(count: int) -> None:
    await asyncio.gather(*(saga.step(noop) for _ in range(count)))


@saga.define
async def rolls_back() -> None:
    await saga.step(do)
    await saga.step(do)
    await saga.step(refuse)


@step(effect=Effect.NONE)
def numbers(after: int | None, count: int) -> tuple[list[int], int | None]:
    first = after or 0
    last = min(first + 500, count)
    return list(range(first, last)), last if last < count else None


@step
def undo_item(item: int, result: int | None) -> None: ...


@step(compensate=undo_item)
def do_item(item: int) -> int:
    return item


@saga.define
async def mapping(count: int) -> int:
    return (await saga.map(do_item, numbers, args=(count,))).succeeded


@saga.define
async def slow_steps(run: int) -> None:
    for number in range(3):
        await saga.step(slow, run, number)


@saga.define
async def sleeps(until: datetime) -> None:
    await saga.sleep_until(until)


def three(runs: int) -> dict[str, float]:
    """Start runs of three steps, then wait for all of them."""
    with clocked() as clock:
        for result in [three_steps.delay() for _ in range(runs)]:
            result.get(timeout=PATIENCE_S)
    return clock


def steadily(runs: int, rate: float) -> dict[str, list[str]]:
    """Start runs of three steps, `rate` a second, then wait for all of them."""
    began = time.monotonic()
    results = []
    for number in range(runs):
        time.sleep(max(0.0, began + number / rate - time.monotonic()))
        results.append(three_steps.delay())
    for result in results:
        result.get(timeout=PATIENCE_S)
    return {"runs": [result.id for result in results]}


def in_bulk(runs: int) -> dict[str, float]:
    """Start runs of three steps with few commits, then wait for all of them."""
    with clocked() as clock:
        for result in three_steps.start_many([()] * runs):
            result.get(timeout=PATIENCE_S)
    return clock


def queues(runs: int) -> dict[str, float]:
    """The same with each step on a queue of its own."""
    with clocked() as clock:
        for result in [three_queues.delay() for _ in range(runs)]:
            result.get(timeout=PATIENCE_S)
    return clock


def one_at_a_time(runs: int) -> dict[str, list[float]]:
    """Start a run when the one before has ended."""
    return {"each": [waited(lambda: three_steps.delay().get(timeout=PATIENCE_S)) for _ in range(runs)]}


def sequence(steps: int) -> dict[str, object]:
    """One run of many steps, one after the other."""
    with clocked() as clock:
        result = many_steps.delay(steps)
        result.get(timeout=PATIENCE_S)
    return {**clock, "run": result.id}


def long(runs: int, steps: int) -> dict[str, float]:
    """Start runs of many steps, one after the other in each, then wait for all of them."""
    with clocked() as clock:
        for result in [many_steps.delay(steps) for _ in range(runs)]:
            result.get(timeout=PATIENCE_S)
    return clock


def parallel(steps: int) -> dict[str, float]:
    """One run of many steps at once."""
    with clocked() as clock:
        parallel_steps.delay(steps).get(timeout=PATIENCE_S)
    return clock


def mapped(items: int) -> dict[str, object]:
    """One run that maps a step, which can be undone, over many items from a paging step."""
    with clocked() as clock:
        result = mapping.delay(items)
        assert result.get(timeout=PATIENCE_S + items / 100) == items
    return {**clock, "run": result.id}


def rollbacks(runs: int) -> dict[str, float]:
    """Runs whose third step is rejected, so that two are undone."""
    with clocked() as clock:
        for result in [rolls_back.delay() for _ in range(runs)]:
            end = result.get(timeout=PATIENCE_S, propagate=False)
            assert isinstance(end, SagaFailed) and end.state == "compensated", end
    return clock


def crash(runs: int) -> dict[str, float]:
    """Runs of three steps of 50 ms that leave a mark; the workers may be killed meanwhile."""
    with clocked() as clock:
        for result in [slow_steps.delay(run) for run in range(runs)]:
            result.get(timeout=PATIENCE_S)
    return {**clock, "lost": 0}


def nap(runs: int, begin: float) -> dict[str, list[str]]:
    """Start runs whose timers fall due in the second after `begin` (seconds since 1970); does not wait for them."""
    due = [datetime.fromtimestamp(begin, UTC) + timedelta(seconds=number / runs) for number in range(runs)]
    return {"runs": [sleeps.delay(instant).id for instant in due]}


_ALL = (three, steadily, in_bulk, queues, one_at_a_time, sequence, long, parallel, mapped, rollbacks, crash, nap)
LOADS = {load.__name__: load for load in _ALL}
