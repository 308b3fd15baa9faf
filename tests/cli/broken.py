"""Every mistake that the linter finds, each on a line that says which."""

from __future__ import annotations

import asyncio
import datetime as dates
import random
import time
import urllib.request as web
import uuid
from datetime import datetime, timedelta
from random import randint

from celery import Celery

from orchestrator import Effect, Orchestrator, saga, step

app = Celery("broken")
orchestrator = Orchestrator(app)


@step(effect=Effect.NONE)
def look(n: int) -> int:
    return n


@step(compensate={"task": "nowhere.undo", "args": (1,)})  # no finding here but at the function
def take(n: int) -> int:  # SG101
    return n


@step
def refund(result: str) -> None: ...


@step(compensate=refund)
def charge() -> str:  # SG104
    return "charge"


@step(compensate=refund, on_unknown="park")
def charge_or_park() -> str:
    return "charge"


@step(compensate=refund)
def charge_with_probe() -> str:
    return "charge"


@charge_with_probe.probe
def find() -> str | None: ...


@step
def refund_if_there_is_one(result: str | None) -> None: ...


@step(compensate=refund_if_there_is_one)
def charge_carefully() -> str:
    return "charge"


@step
def bare(n: int) -> int:
    return n


@step(effect=Effect.PIVOT)
def settle() -> None: ...


@step(effect=Effect.RETRIABLE)
def tell() -> None: ...


@app.task
def plain(n: int) -> int:
    return n


@saga.define
async def other() -> None: ...


def helper() -> float:
    return time.time()  # SG201


def recorded() -> float:
    return time.time()


@saga.define
async def clock() -> None:
    datetime.now()  # SG201
    dates.datetime.utcnow()  # SG201
    time.sleep(1)  # SG201
    helper()
    await saga.once("time", recorded)
    await saga.once("time", lambda: time.time())
    time.time()  # saga: ignore[SG201]
    saga.now()


@saga.define
async def chance() -> None:
    import secrets

    random.random()  # SG202
    randint(1, 2)  # SG202
    uuid.uuid4()  # SG202
    secrets.token_hex()  # SG202
    saga.random()
    saga.uuid4()


@saga.define
async def outside() -> None:
    with open("file"):  # SG203
        pass
    web.urlopen("http://example.com")  # SG203


@saga.define
async def loop() -> None:
    await asyncio.wait([])  # SG204
    for _ in asyncio.as_completed([]):  # SG204
        pass
    await asyncio.to_thread(print)  # SG204
    await asyncio.gather(saga.step(look, 1))


@saga.define
async def direct() -> None:
    look(1)  # SG205
    look.delay(1)  # SG205
    plain.delay(1)  # SG205
    other()  # SG205


@saga.define
async def undeclared() -> None:
    await saga.step(bare, 1)  # SG102
    await saga.step(plain, 1)  # SG102
    await saga.step(plain.s(1))  # SG102
    await saga.step(bare.with_options(effect=Effect.NONE), 1)
    await saga.step(bare.with_options(compensate=look), 1)
    await saga.map(bare, [1, 2])  # SG102
    await saga.map(look, bare)  # SG102
    await saga.map(look, [1, 2])


async def part(n: int) -> int:
    return n + await saga.step(look, n)


@saga.define
async def unawaited(n: int) -> int:
    if saga.step(look, n):  # SG206
        return 1
    while not saga.child(other):  # SG206
        pass
    if n and saga.step(look, n) == 3:  # SG206
        return saga.step(look, n) + 1  # SG206
    saga.sleep(timedelta(hours=1))  # SG206
    saga.wait_signal("approved")  # SG206
    part(n)  # SG206
    asyncio.sleep(1)  # SG206
    print(f"{saga.step(look, n)}")  # SG206
    later = saga.step(look, n)
    perhaps = saga.step(look, n) if n else None
    either = n and saga.step(look, n)
    saga.step(look, n)
    both = [part(1), saga.step(look, n)]
    if perhaps:
        await perhaps
    await asyncio.gather(*both)
    return await later if await saga.step(look, n) else either


@saga.define
async def after_the_pivot(n: int) -> None:
    await saga.step(take, 1)
    if n:
        await saga.step(settle)
        await saga.step(take, 2)  # SG103
    else:
        await saga.step(take, 3)
    await asyncio.gather(saga.step(tell), saga.step(look, 1), saga.step(take, 4))  # SG103
