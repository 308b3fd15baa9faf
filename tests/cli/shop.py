"""The app of these tests: sagas that end in every way that the command line has to show."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from celery import Celery
from pydantic import BaseModel

from orchestrator import Effect, Orchestrator, RetryPolicy, saga, step

app = Celery("shop")
app.conf.broker_connection_retry_on_startup = True
orchestrator = Orchestrator(app)

AT_ONCE = RetryPolicy(initial_interval=timedelta(0), maximum_attempts=2)
LATER = RetryPolicy(initial_interval=timedelta(seconds=50), maximum_attempts=5)


class Order(BaseModel):
    """What the sagas are about; the id says what goes wrong."""

    id: str
    amount: int = 1


@step(retry=AT_ONCE)
def refund(order: Order, result: str | None) -> None:
    if "norefund" in order.id:
        raise ConnectionError("the provider is down")


@step(compensate=refund)
def charge(order: Order) -> str:
    return f"charge of {order.id}"


@step(effect=Effect.NONE, retry=AT_ONCE)
def ship(order: Order) -> str:
    if "bad" in order.id:
        raise ValueError("no such address")
    return "shipped"


@step(effect=Effect.NONE, retry=LATER)
def flaky(order: Order) -> str:
    raise TimeoutError("no answer")


@step(effect=Effect.PIVOT, retry=AT_ONCE)
def settle(order: Order) -> str:
    raise TimeoutError("no answer")


@saga.define(deadline=timedelta(hours=1))
async def checkout(order: Order) -> str:
    await saga.step(charge, order)
    return await saga.step(ship, order)


@saga.define
async def side_by_side(order: Order) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(_shipped(order))
        group.create_task(asyncio.sleep(3600))


async def _shipped(order: Order) -> str:
    return await saga.step(ship, order)


@saga.define
async def nap(order: Order) -> str:
    await saga.step(charge, order)
    await asyncio.sleep(3600)
    return "rested"


@saga.define
async def patient(order: Order) -> str:
    await saga.step(charge, order)
    return await saga.step(flaky, order)


@saga.define
async def pivot(order: Order) -> str:
    return await saga.step(settle, order)


@saga.define
async def buggy(order: Order) -> str:
    await saga.step(charge, order)
    return order.nonsense  # type: ignore[attr-defined,no-any-return]
