"""An app whose module also imports another one, with a database that nobody can reach: its worker is a real one."""

from __future__ import annotations

from celery import Celery

from orchestrator import Effect, Orchestrator, saga, step

app = Celery("first")
app.conf.task_routes = {"two.*": {"queue": "first"}}
orchestrator = Orchestrator(app)
second = Celery("second", broker="memory://", set_as_current=False)
Orchestrator(second, database_url="postgresql://nobody@127.0.0.1:1/none")


@step(name="two.starts", effect=Effect.NONE)
def starts(word: str) -> str:
    return inner.apply_async((word,)).id


@saga.define(name="two.inner")
async def inner(word: str) -> str:
    return word


@saga.define(name="two.outer")
async def outer(word: str) -> str:
    return await saga.step(starts, word)
