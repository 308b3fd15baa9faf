"""Turns of a beat, one by one, whose entries change in between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import import_module

import pytest
from celery import Celery
from celery.beat import BeatLazyFunc

from orchestrator import Orchestrator, saga
from orchestrator.celery.beat import Scheduler
from orchestrator.store import schedules as store
from orchestrator.store.connection import Connection, open_connection

SLOT = datetime(2026, 1, 1, tzinfo=UTC)


@saga.define
async def hourly(amount: int) -> int:
    return amount


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with open_connection(database_url, name="test") as opened:
        yield opened


@pytest.fixture
def app(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    routing = import_module("orchestrator.step")
    monkeypatch.setattr(routing, "_router", routing._router)  # those of this app are no other test's
    monkeypatch.setattr(routing, "_routes", {})
    with Celery("turns", broker="memory://", set_as_current=False) as made:
        Orchestrator(made, database_url=database_url, nightly=False)
        made.conf.result_expires = None  # else Celery adds an entry of its own
        made.conf.task_default_queue = "turns"  # that broker is one for the whole process

        @made.task(name="turns.plain", shared=False)
        def plain() -> None: ...

        yield made


@pytest.fixture
def scheduler(app: Celery) -> Iterator[Scheduler]:
    made = Scheduler(app)
    yield made
    made.close()


@pytest.mark.parametrize("entry", [None, {"task": "turns.plain", "schedule": "no schedule"}], ids=["gone", "bad"])
def test_what_is_to_be_sent_of_an_entry_that_is_gone_or_bad_waits_for_it_without_a_complaint_of_its_own(
    app: Celery, scheduler: Scheduler, connection: Connection, entry: dict[str, object] | None
) -> None:
    def stands() -> tuple[object, ...] | None:
        query = """SELECT o.state, s.gone_at IS NULL, coalesce(left(s.problem, 17), '')
            FROM orchestrator.schedules s JOIN orchestrator.slots o ON o.schedule = s.name WHERE s.name = 'it'"""
        return connection.execute(query).fetchone()

    good = {"it": {"task": "turns.plain", "schedule": 3600}}
    app.conf.beat_schedule = dict(good)
    scheduler.tick()
    app.conf.beat_schedule = {"it": entry} if entry else {}
    store.decide(connection, "turns", "it", SLOT, origin="trigger", state="sending", run_id="m-1")
    for _ in range(2):
        scheduler.tick()
        assert stands() == ("sending", entry is not None, "it cannot be used" if entry else "")
        scheduler._lose(ConnectionError())  # and it leads anew
    app.conf.beat_schedule = good
    scheduler.tick()
    assert stands() == ("sent", True, "")


def test_what_was_to_be_sent_of_a_task_that_has_become_a_saga_is_started(
    app: Celery, scheduler: Scheduler, connection: Connection
) -> None:
    """The broker was away when it was decided, and the next release made a saga of the task."""
    app.conf.beat_schedule = {"it": {"task": "turns.plain", "schedule": 3600, "args": (1,)}}
    scheduler.tick()
    store.decide(connection, "turns", "it", SLOT, origin="trigger", state="sending", run_id="m-1")
    app.conf.beat_schedule = {"it": {"task": hourly.name, "schedule": 3600, "args": (1,), "options": {"priority": 5}}}
    scheduler.tick()
    assert connection.execute("SELECT state FROM orchestrator.slots").fetchall() == [("sent",)]
    assert connection.execute("SELECT problem FROM orchestrator.schedules WHERE name = 'it'").fetchall() == [(None,)]
    assert connection.execute("SELECT id, priority FROM orchestrator.runs").fetchall() == [("m-1", 5)]


def test_what_is_to_be_sent_or_waits_is_forgotten_once_its_entry_is_gone_for_long(connection: Connection) -> None:
    it, other = store.Declared("it", "plain", "hourly"), store.Declared("other", "plain", "hourly")
    store.declare(connection, "turns", [it, other], SLOT, SLOT)
    for name in "it", "other":
        store.settle(connection, "turns", name, SLOT + timedelta(days=1))
        for hour, state in enumerate(["sending", "waiting", "running"]):
            slot = SLOT + timedelta(hours=hour)
            store.decide(connection, "turns", name, slot, origin="schedule", state=state, run_id=f"{name} {hour}")
    gone = SLOT + timedelta(days=100)
    store.declare(connection, "turns", [other], SLOT, gone)

    def forget(now: datetime) -> int:
        return store.forget(connection, "turns", timedelta(days=30), now=now)

    assert forget(gone + timedelta(days=29)) == 0
    assert forget(gone + timedelta(days=31)) == 2
    left = [run_id for (run_id,) in connection.execute("SELECT run_id FROM orchestrator.slots ORDER BY 1").fetchall()]
    assert left == ["it 2", "other 0", "other 1", "other 2"], "the run of the third may go on"


def test_an_argument_that_takes_too_long_to_compute_harms_no_other_entry(
    app: Celery, scheduler: Scheduler, connection: Connection
) -> None:
    """Postgres ends who stands still in a transaction; beat took that for a database that is away, and began anew."""

    def compute() -> int:
        time.sleep(7.0)
        return 1

    app.conf.beat_schedule = {
        "slow": {"task": hourly.name, "schedule": 3600, "args": (BeatLazyFunc(compute),)},
        "good": {"task": hourly.name, "schedule": 3600, "args": (1,)},
    }
    scheduler.tick()
    connection.execute("UPDATE orchestrator.schedules SET settled_until = settled_until - interval '1 hour'")
    for _ in range(3):
        scheduler.tick()
    assert connection.execute("SELECT schedule, state FROM orchestrator.slots").fetchall() == [("good", "started")]
    ((problem,),) = connection.execute("SELECT problem FROM orchestrator.schedules WHERE name = 'slow'").fetchall()
    assert "an argument of it could not be computed: TimeoutError: it did not come back within 3 s" in problem
