"""Connections of Django around steps, as Celery has it around tasks."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from celery import Celery
from celery.fixups.django import DjangoFixup

from orchestrator import step
from orchestrator.celery.runner import Runner
from orchestrator.machine.journal import AttemptEnded
from orchestrator.store.turns import Taken
from tests.celery.conftest import Invoke

DONE: list[str] = []


class Connection:
    """One of Django's, as far as it tells of its transaction."""

    alias = "default"
    settings_dict: ClassVar = {"AUTOCOMMIT": True}

    def __init__(self) -> None:
        self.connection: object | None = object()
        self.in_atomic_block = False
        self.autocommit = True

    def close(self) -> None:
        DONE.append("connection closed")


class Kept:
    """The connections of a thread by their alias, as ``django.db.connections`` has them."""

    def __init__(self) -> None:
        self.known = {"default": Connection()}

    def all(self) -> list[Connection]:
        return list(self.known.values())

    def __delitem__(self, alias: str) -> None:
        del self.known[alias]
        DONE.append(f"{alias} forgotten")


class Connections:
    """What Celery's fixup for Django closes in a worker."""

    def __init__(self) -> None:
        self._db = SimpleNamespace(connections=Kept())

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
def connection(app: Celery) -> Connection:
    """Django's connection, in an app with Celery's fixup for Django and steps that leave it in this way or that."""
    DONE.clear()
    fixup = Fixup()
    app._fixups = [None, fixup]
    connection: Connection
    [connection] = fixup.worker_fixup._db.connections.all()

    @step(name="fixed.done")
    def done() -> None:
        DONE.append("done")

    @step(name="fixed.begins")
    def begins() -> None:
        connection.in_atomic_block = True

    @step(name="fixed.switches")
    def switches() -> None:
        connection.autocommit = False

    @step(name="fixed.fails")
    def fails() -> None:
        raise OSError("the connection is lost")

    return connection


def test_connections_of_django_are_closed_around_each_step(invoke: Invoke) -> None:
    assert invoke("fixed.done").error is None
    assert invoke("fixed.done").error is None
    assert DONE == ["database closed", "done", "database closed", "cache closed"] * 2


def test_they_are_closed_after_a_step_that_fails_and_its_error_is_what_it_failed_with(invoke: Invoke) -> None:
    assert str(invoke("fixed.fails").error) == "the connection is lost"
    assert DONE[:3] == ["database closed", "database closed", "cache closed"]


def test_after_a_step_that_fails_they_are_closed_for_good_whatever_is_to_be_reused(invoke: Invoke) -> None:
    """Who was interrupted may have left anything: the next step would report success for what is never committed."""
    assert invoke("fixed.fails").error is not None
    assert DONE[3:] == ["default forgotten", "connection closed"]


@pytest.mark.parametrize("leaves", ["fixed.begins", "fixed.switches"])
def test_one_that_a_step_has_left_within_a_transaction_is_closed_for_good(invoke: Invoke, leaves: str) -> None:
    assert invoke(leaves).error is None
    assert DONE == ["database closed", "default forgotten", "connection closed", "database closed", "cache closed"]


def test_one_that_was_never_open_is_left_alone(connection: Connection, invoke: Invoke) -> None:
    connection.connection, connection.autocommit = None, False
    assert invoke("fixed.done").error is None
    assert DONE == ["database closed", "done", "database closed", "cache closed"]


def test_they_are_closed_after_what_is_done_once_by_the_driver(runner: Runner) -> None:
    now = datetime.now(UTC)
    taken = Taken("run", 1, "once:rate#0", "once", "s@1", "q", "rate", 1, {"a": {}, "t": 30}, 1, now, now)
    runner.finished(taken, AttemptEnded("once:rate#0", "do", 1, "succeeded"))
    assert DONE == ["database closed", "cache closed"]
