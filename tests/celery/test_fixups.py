"""Connections of Django around steps, as Celery has it around tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from celery import Celery
from celery.fixups.django import DjangoFixup

from orchestrator import Orchestrator, step
from orchestrator.celery.events import StepEvents
from orchestrator.celery.runner import Runner
from orchestrator.machine.journal import AttemptEnded
from orchestrator.step import StepContext
from orchestrator.store.turns import Taken

DONE: list[str] = []


class Connections:
    """What Celery's fixup for Django closes in a worker."""

    def close_database(self) -> None:
        DONE.append("database closed")

    def close_cache(self) -> None:
        DONE.append("cache closed")
        raise OSError("it is gone")


class Fixup(DjangoFixup):
    """Celery's own, without Django."""

    def __init__(self) -> None:
        self._worker_fixup = cast(Any, Connections())


@pytest.fixture
def invoke() -> Iterator[Callable[[str], Any]]:
    """Runs a step as a drain does."""
    DONE.clear()
    with Celery("fixed", broker="memory://", set_as_current=False) as app:
        orchestrator = Orchestrator(app, database_url="postgresql://host/db")
        app._fixups = [None, Fixup()]

        @step(name="fixed.done")
        def done() -> None:
            DONE.append("done")

        @step(name="fixed.fails")
        def fails() -> None:
            raise OSError("the connection is lost")

        runner = Runner(app, "w@here", orchestrator._transactions, cast(StepEvents, orchestrator._events("w")))
        now = datetime.now(UTC)

        def invoke(name: str) -> Any:
            until = now + timedelta(seconds=30)
            taken = Taken("run", 1, f"{name}#0", "do", name, "q", name, 1, {"a": {}, "t": 30}, 1, until, now)
            return runner.invoke(taken, StepContext("run", taken.key, 1, "run:key", until))

        invoke.runner = runner  # type: ignore[attr-defined]
        yield invoke


def test_connections_of_django_are_closed_around_each_step(invoke: Callable[[str], Any]) -> None:
    assert invoke("fixed.done").error is None
    assert invoke("fixed.done").error is None
    assert DONE == ["database closed", "done", "database closed", "cache closed"] * 2


def test_they_are_closed_after_a_step_that_fails_and_its_error_is_what_it_failed_with(
    invoke: Callable[[str], Any],
) -> None:
    assert str(invoke("fixed.fails").error) == "the connection is lost"
    assert DONE == ["database closed", "database closed", "cache closed"]


def test_they_are_closed_after_what_is_done_once_by_the_driver(invoke: Any) -> None:
    now = datetime.now(UTC)
    taken = Taken("run", 1, "once:rate#0", "once", "s@1", "q", "rate", 1, {"a": {}, "t": 30}, 1, now, now)
    invoke.runner.finished(taken, AttemptEnded("once:rate#0", "do", 1, "succeeded"))
    assert DONE == ["database closed", "cache closed"]
