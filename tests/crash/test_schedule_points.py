"""Orders about a schedule die at every boundary: each was done as a whole or not at all, and can be given again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.engine import schedules as engine
from orchestrator.engine.schedules import CatchUp, Schedule, Schedules
from orchestrator.engine.timetable import Interval
from orchestrator.failpoints import EXIT_CODE
from orchestrator.store import runs
from orchestrator.store import schedules as store
from orchestrator.store.connection import Connection, open_connection
from tests.crash.forked import CUT, in_a_process
from tests.crash.points import ORDERS

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
SLOTS = 5  # two and a half pages
App = Schedules("app", lambda connection, queue, rows: None)


def begin_run(own_id: str, slot: datetime) -> runs.Start:
    return runs.Start(id=own_id, saga="inspect", version=1, input={}, queue="celery")


hourly = Schedule(
    name="it", task="inspect", reads="hourly", timetable=Interval(HOUR), start=begin_run, catch_up=CatchUp()
)


def trigger(connection: Connection) -> None:
    App.trigger(connection, hourly)


def backfill(connection: Connection) -> None:
    App.backfill(connection, hourly, BEGIN + HOUR, BEGIN + SLOTS * HOUR, BEGIN + 10 * HOUR)


def pause(connection: Connection) -> None:
    store.pause(connection, "app", "it", "ann", "too much")


def resume(connection: Connection) -> None:
    store.resume(connection, "app", "it", catch_up=False)


GIVE: dict[str, Callable[[Connection], None]] = {
    "trigger": trigger, "backfill": backfill, "schedule.pause": pause, "schedule.resume": resume,
}  # fmt: skip


@pytest.fixture
def connection(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connection]:
    """A database with one schedule; a page of a backfill holds two slots."""
    monkeypatch.setattr(engine, "_PAGE", 2)
    with open_connection(database_url, name="test") as opened:
        assert store.lead(opened, "app", "a", HOUR, BEGIN)
        store.declare(opened, "app", [hourly.declared], BEGIN, BEGIN)
        yield opened


def fired(connection: Connection) -> int:
    """Return how many slots have fired, each with its run and each run with its work."""
    slots = connection.execute("SELECT run_id FROM orchestrator.slots WHERE state = 'started' ORDER BY 1").fetchall()
    assert connection.execute("SELECT id FROM orchestrator.runs ORDER BY 1").fetchall() == slots
    assert connection.execute("SELECT run_id FROM orchestrator.work ORDER BY 1").fetchall() == slots
    return len(slots)


def paused(connection: Connection) -> bool:
    return store.standing(connection, "app")["it"].paused


@pytest.mark.parametrize("action", ["exit", "raise"])
@pytest.mark.parametrize("name", sorted(ORDERS))
def test_whatever_happens_at(name: str, action: str, database_url: str, connection: Connection) -> None:
    order, _, where = name.rpartition(".")
    if order == "schedule.resume":
        pause(connection)
    done = where == "after"
    assert in_a_process(database_url, GIVE[order], f"{name}={action}@{2 if order == 'backfill' else 1}") == (
        EXIT_CODE if action == "exit" else CUT
    )
    before = fired(connection), paused(connection)
    assert before == {
        "trigger": (int(done), False),
        "backfill": (4 if done else 2, False),  # pages that were committed stay
        "schedule.pause": (0, done),
        "schedule.resume": (0, not done),
    }[order]  # fmt: skip
    GIVE[order](connection)
    assert (fired(connection), paused(connection)) == {
        "trigger": (1 + int(done), False),  # each order is one of its own: who was not told looks before
        "backfill": (SLOTS, False),
        "schedule.pause": (0, True),
        "schedule.resume": (0, False),
    }[order]  # fmt: skip
