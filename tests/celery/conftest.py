"""Fixtures of the tests of what is Celery's here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest
from celery import Celery

from orchestrator import Orchestrator
from orchestrator.celery.events import StepEvents
from orchestrator.celery.runner import Runner
from orchestrator.engine.commit import new_fence
from orchestrator.engine.worker import Invocation
from orchestrator.step import StepContext
from orchestrator.store.turns import Taken

Invoke = Callable[[str], Invocation]


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app that is not the current one."""
    with Celery("run", broker="memory://", set_as_current=False) as app:
        yield app


@pytest.fixture
def runner(app: Celery) -> Runner:
    """What runs steps in a worker."""
    orchestrator = Orchestrator(app, database_url="postgresql://host/db")
    return Runner(app, "w@here", orchestrator._transactions, cast(StepEvents, orchestrator._events("w")))


@pytest.fixture
def invoke(runner: Runner) -> Invoke:
    """Runs the step of a name as a drain does."""

    def invoke(name: str) -> Invocation:
        now = datetime.now(UTC)
        until = now + timedelta(seconds=30)
        taken = Taken("run", 1, f"{name}#0", "do", name, "q", name, 1, {"a": {}, "t": 30}, new_fence(), until, now)
        return runner.invoke(taken, StepContext("run", taken.key, 1, "run:key", until))

    return invoke
