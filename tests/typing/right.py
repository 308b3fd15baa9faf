"""What saga code and callers may write, with the types that they get.

Never run: mypy reads it, see test_typing.py.  Owns one line for each call of the language.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any, assert_type
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import Connection

from orchestrator import ChildFailed, MapFailed, Orchestrator, durable, saga, step
from orchestrator.result import SagaResult
from orchestrator.retention import Pruned
from orchestrator.saga import MapSummary


class Approval(BaseModel):
    by: str


@step
def refund(amount: int, result: str | None) -> None: ...


@step(compensate=refund, concurrency=5, key="amount")
def charge(amount: int, currency: str = "EUR") -> str:
    return f"{amount} {currency}"


@step
async def look(amount: int) -> bool:
    return amount > 0


@step(transactional=True)
def book(conn: Connection, amount: int) -> int:
    return amount


@step
def amounts(cursor: int | None, day: str) -> tuple[list[int], int | None]:
    return [1], None


@saga.define
async def pay(amount: int) -> str:
    return await saga.step(charge, amount)


@saga.define(version=2, signals={"approved": Approval}, deadline=timedelta(hours=1))
async def approve(amount: int, by: str = "") -> list[str]:
    assert_type(await saga.wait_signal("approved", Approval), Approval)
    assert_type(await saga.wait_signal("approved", Approval, timeout=timedelta(days=2)), Approval)
    assert_type(await saga.wait_signal("approved", timeout=5), Any)
    return [by]


@saga.define
async def steps(amount: int) -> None:
    assert_type(await saga.step(charge, amount), str)
    assert_type(await saga.step(charge, amount, currency="USD"), str)
    assert_type(await saga.step(look, amount), bool)
    assert_type(await saga.step(book, amount), int)
    assert_type(await saga.step(charge.with_options(queue="fast"), amount), str)
    assert_type(await asyncio.gather(saga.step(charge, 1), saga.step(look, 1)), tuple[str, bool])
    assert_type(await saga.once("number", lambda: 7), int)


@saga.define
async def families(amount: int) -> None:
    assert_type(await saga.child(pay, amount), str)
    assert_type(await asyncio.gather(saga.child(pay, 1), saga.child(approve, 1, by="ann")), tuple[str, list[str]])
    try:
        async with saga.scope():
            await saga.child(pay, amount)
    except ChildFailed as error:
        assert_type(error.state, str)


@saga.define
async def locks(account: int) -> None:
    async with saga.lock("account", account), saga.lock("till", timeout=timedelta(minutes=1)):
        await saga.step(charge, account)


@saga.define
async def maps(days: list[str]) -> None:
    summary = await saga.map(charge, range(10), concurrency=3, rate="10/s", tolerate=0.5, collect=True)
    assert_type(summary, MapSummary)
    assert_type(summary.failed, int)
    assert_type(summary.failures, tuple[dict[str, Any], ...])
    try:
        await saga.map(charge, amounts, args=(days[0],), page=1000)
    except MapFailed as error:
        assert_type(error.summary, MapSummary)


@saga.define
async def shown(n: int) -> int:
    saga.progress(n, 10, "on the way")
    saga.publish(last=n, names=["ann"])
    saga.tag(customer=7, kind="shop", gone=None)
    assert_type(saga.now(), datetime)
    assert_type(saga.uuid4(), UUID)
    assert_type(saga.random(), float)
    assert_type(saga.version("change", 1, 2), int)
    assert_type(saga.info().run_id, str)
    if n < 3:
        saga.continue_as_new(n + 1)
    return n  # where it continued nothing is returned


async def callers(canvas: Any) -> None:
    assert_type(charge(3), str)
    assert_type(pay.delay(3), SagaResult)
    assert_type(await pay.adelay(amount=3), SagaResult)
    handles = pay.start_many([(1,), (2,)], task_ids=["a", "b"], tags={"day": 7})
    assert_type(handles, list[SagaResult])
    handle = pay.apply_async((3,), task_id="a", tags={"day": 7}, deadline=timedelta(hours=1), transaction=None)
    assert_type(handle, SagaResult)
    assert_type(await pay.aapply_async((3,), eta="2027-01-01T00:00:00Z", queue="slow"), SagaResult)
    approve.AsyncResult("a").signal("approved", Approval(by="ann"), id="click-1")
    assert_type(durable(canvas).delay(1), SagaResult)
    assert_type(durable(canvas).apply_async(link=canvas, task_id="c", countdown=3), SagaResult)


def operators(orchestrator: Orchestrator, day: datetime) -> None:
    assert_type(orchestrator.pause(saga=pay, by="ann", reason="the provider is down"), bool)
    assert_type(orchestrator.resume(queue="slow"), bool)
    effects = orchestrator.bulk("retry", saga=pay, step="charge", started_before=day, tags={"day": 7}, dry_run=True)
    assert_type(effects.total, int)
    assert_type(orchestrator.prune(timedelta(days=90), states=["completed"], archive="old"), Pruned)
    run = pay.AsyncResult("a")
    run.pause("look first", by="ann")
    run.resume()
    run.retry("charge", reason="mended")
    run.cancel("not wanted")
