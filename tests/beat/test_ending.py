"""A beat that is told to end in the middle of a turn."""

from __future__ import annotations

import contextlib
from datetime import datetime
from typing import Any

import psycopg
import pytest
from celery import Celery

from orchestrator import Orchestrator
from orchestrator.celery.beat import Scheduler
from orchestrator.store import schedules
from orchestrator.store.connection import open_connection


def test_it_ends_after_its_turn_though_somebody_has_kept_the_exit_that_the_signal_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Celery("ending", set_as_current=False) as app:
        Orchestrator(app, database_url="postgresql://unused")
        scheduler = Scheduler(app)

    def turn() -> float:
        with contextlib.suppress(SystemExit):
            scheduler.close()  # as Celery's handler of SIGTERM does
            raise SystemExit
        return 1.0

    monkeypatch.setattr(scheduler, "_turn", turn)
    with pytest.raises(SystemExit):
        scheduler.tick()


def test_it_leaves_the_leadership_though_the_signal_has_broken_its_connection(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Celery("broken", set_as_current=False) as app:
        Orchestrator(app, database_url=database_url)
        scheduler = Scheduler(app)
    scheduler.tick()

    def fire_due(connection: psycopg.Connection[Any], now: datetime) -> float:
        connection.pgconn.finish()  # as psycopg does if it cannot cancel the statement
        scheduler.close()
        raise SystemExit

    monkeypatch.setattr(scheduler, "_fire_due", fire_due)
    with open_connection(database_url, name="test") as connection:
        assert schedules.leader(connection, "broken")
        with pytest.raises(SystemExit):
            scheduler.tick()
        scheduler.close()
        assert schedules.leader(connection, "broken") is None
