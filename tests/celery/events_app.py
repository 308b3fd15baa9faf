"""The app of the events' tests: its worker is a real one, started as a process of its own."""

from __future__ import annotations

import asyncio
import os
from datetime import timedelta

import redis
import sqlalchemy
from celery import Celery

from orchestrator import Effect, Orchestrator, RetryPolicy, saga, step

app = Celery("observed", broker=os.environ.get("CELERY_BROKER_URL"))
app.conf.broker_connection_retry_on_startup = True
orchestrator = Orchestrator(app)
# Longer than events are gathered: the events of attempts in two children that follow on each other at once may cross.
SOON = RetryPolicy(initial_interval=timedelta(milliseconds=400), backoff_coefficient=1.0, maximum_attempts=3)


@step(name="bank.echo", effect=Effect.NONE)
def echo(word: str) -> str:
    return word


@step(name="bank.release")
def release(word: str, result: str | None) -> None:
    """Give back what `reserve` took."""


@step(name="bank.reserve", compensate=release)
def reserve(word: str) -> str:
    return word


@step(name="bank.book", transactional=True)
def book(connection: sqlalchemy.Connection, word: str) -> str:
    return str(connection.scalar(sqlalchemy.text("SELECT cast(:word AS text)"), {"word": word}))


@step(name="bank.flaky", effect=Effect.NONE, retry=SOON)
def flaky(word: str) -> str:
    if step.current().attempt < 3:
        raise ConnectionError(f"no answer about {word}")
    return word


@step(name="bank.broken", effect=Effect.NONE, retry=SOON)
def broken(word: str) -> str:
    raise ValueError(f"cannot {word}")


@step(name="bank.wait", effect=Effect.NONE)
def wait(name: str) -> str:
    """Wait until somebody pushes to the list `name`."""
    with redis.Redis.from_url(os.environ["CELERY_BROKER_URL"], socket_timeout=None) as client:
        client.blpop([name], 30)
    return name


@app.task(name="bank.legacy")
def legacy(word: str) -> str:
    return word


@saga.define(name="bank.visit")
async def visit(word: str) -> str:
    await asyncio.gather(saga.step(echo, word), saga.step(book, word), saga.step(legacy.s(word)))
    return await saga.step(flaky, word)


@saga.define(name="bank.fail")
async def fail(word: str) -> None:
    await saga.step(reserve, word)
    await saga.step(broken, word)


@saga.define(name="bank.sit")
async def sit(name: str) -> str:
    return await saga.step(wait, name)


@saga.define(name="bank.once")
async def once(word: str) -> None:
    await saga.step(broken.with_options(retry=RetryPolicy(maximum_attempts=1)), word)


@saga.define(name="bank.chat")
async def chat(words: int) -> int:
    for number in range(words):
        await saga.step(echo, str(number))
    return words


__all__ = ["app", "chat", "fail", "once", "orchestrator", "sit", "visit"]
