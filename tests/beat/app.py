"""The app of these tests: beats that run as processes import it, and so do the tests."""

from __future__ import annotations

import json
import os
from datetime import datetime
from typing import Any

from celery import Celery
from celery.schedules import crontab

from orchestrator import Effect, Orchestrator, saga, step

app = Celery("beats")
app.conf.broker_connection_retry_on_startup = True
orchestrator = Orchestrator(app)


@step(effect=Effect.NONE)
def note(text: str) -> str:
    return text


@saga.define
async def report(of: datetime | None = None, text: str = "") -> str:
    return await saga.step(note, text)


@app.task(name="beats.plain")
def plain(*args: Any, **kwargs: Any) -> None:
    """A task that is no step of anything."""


def schedule(given: Any) -> Any:
    """Return a schedule as the environment can name it: seconds, or the five fields of a crontab."""
    return crontab.from_string(given) if isinstance(given, str) and given.count(" ") == 4 else given


app.conf.beat_schedule = {
    name: {**entry, "schedule": schedule(entry.get("schedule"))} if isinstance(entry, dict) else entry
    for name, entry in json.loads(os.environ.get("BEATS", "{}")).items()
}
