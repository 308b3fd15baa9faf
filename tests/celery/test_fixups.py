"""Connections of Django around steps, as Celery has it around tasks."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

import pytest
from celery import Celery
from celery.fixups.django import DjangoFixup

from orchestrator import step
from orchestrator.celery.runner import Runner
from orchestrator.machine.journal import AttemptEnded
from orchestrator.store.turns import Taken
from tests.celery.conftest import Invoke

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


@pytest.fixture(autouse=True)
def steps(app: Celery) -> None:
    """Steps of an app with Celery's fixup for Django."""
    DONE.clear()
    app._fixups = [None, Fixup()]

    @step(name="fixed.done")
    def done() -> None:
        DONE.append("done")

    @step(name="fixed.fails")
    def fails() -> None:
        raise OSError("the connection is lost")


def test_connections_of_django_are_closed_around_each_step(invoke: Invoke) -> None:
    assert invoke("fixed.done").error is None
    assert invoke("fixed.done").error is None
    assert DONE == ["database closed", "done", "database closed", "cache closed"] * 2


def test_they_are_closed_after_a_step_that_fails_and_its_error_is_what_it_failed_with(invoke: Invoke) -> None:
    assert str(invoke("fixed.fails").error) == "the connection is lost"
    assert DONE == ["database closed", "database closed", "cache closed"]


def test_they_are_closed_after_what_is_done_once_by_the_driver(runner: Runner) -> None:
    now = datetime.now(UTC)
    taken = Taken("run", 1, "once:rate#0", "once", "s@1", "q", "rate", 1, {"a": {}, "t": 30}, 1, now, now)
    runner.finished(taken, AttemptEnded("once:rate#0", "do", 1, "succeeded"))
    assert DONE == ["database closed", "cache closed"]
