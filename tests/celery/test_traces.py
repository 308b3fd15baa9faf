"""The traceback of a failed step, which Celery has formatted already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest
from celery import Celery

from orchestrator import Orchestrator, step
from orchestrator.celery.events import StepEvents
from orchestrator.celery.runner import Runner
from orchestrator.engine.worker import Invocation
from orchestrator.step import StepContext
from orchestrator.store.turns import Taken


class TornError(Exception):
    """Cannot be made again from its arguments, so that Celery tells of another one in its place."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


@pytest.fixture
def fail() -> Iterator[Callable[[Exception], Invocation]]:
    """Runs a step that raises, as a drain does."""
    with Celery("traced", broker="memory://", set_as_current=False) as app:
        orchestrator = Orchestrator(app, database_url="postgresql://host/db")
        errors: list[Exception] = []

        @step(name="traced.fails")
        def fails() -> None:
            raise errors[0]

        runner = Runner(app, "w@here", orchestrator._transactions, cast(StepEvents, orchestrator._events("w")))
        now = datetime.now(UTC)

        def fail(error: Exception) -> Invocation:
            errors.append(error)
            until = now + timedelta(seconds=30)
            taken = Taken("run", 1, "fails#0", "do", "x", "q", "traced.fails", 1, {"a": {}, "t": 30}, 1, until, now)
            return runner.invoke(taken, StepContext("run", taken.key, 1, "run:key", until))

        yield fail


def test_what_celery_has_formatted_is_not_formatted_again(fail: Callable[[Exception], Invocation]) -> None:
    error = ValueError("no such account")
    failed = fail(error)
    assert failed.error is error
    first, *_, last = failed.trace.splitlines()
    assert (first, last) == ("Traceback (most recent call last):", "ValueError: no such account")
    assert "in fails" in failed.trace and "celery/app/trace.py" not in failed.trace


def test_of_an_error_that_celery_replaces_its_own_traceback_is_told(fail: Callable[[Exception], Invocation]) -> None:
    error = TornError("torn", "here")
    failed = fail(error)
    assert (failed.error, failed.trace) == (error, "")
