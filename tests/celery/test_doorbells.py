"""Where doorbells are rung, and which of them a worker's main process passes over."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery import Celery
from celery.worker import state
from kombu.connection import Connection
from kombu.message import Message

from orchestrator import Orchestrator
from orchestrator.celery import request, worker
from orchestrator.celery.doorbell import DRAIN, Bell, connection_options
from orchestrator.celery.request import DoorbellRequest
from tests.acceptance.running import until

LATE, IN_TIME = timedelta(seconds=-1), timedelta(hours=1)


@pytest.fixture
def app() -> Iterator[Celery]:
    with Celery("doorbells", set_as_current=False) as app:
        Orchestrator(app, database_url="postgresql://unused")
        DoorbellRequest._latest, DoorbellRequest._latest_at = None, -math.inf
        yield app
        state.reset_state()
        worker._said[1] = worker._said[2] = 0


def received(app: Celery, age: timedelta, **headers: Any) -> DoorbellRequest:
    """Return a doorbell as it is when a worker has received it."""
    headers = {"task": DRAIN, "id": "bell", **headers, "expires": (datetime.now(UTC) + age).isoformat()}
    message = Message(body="[[], {}, {}]", content_type="application/json", content_encoding="utf-8", headers=headers)
    return DoorbellRequest(message, app=app, task=app.tasks[DRAIN])


def test_a_late_one_is_heard_when_it_is_the_only_one(app: Celery) -> None:
    bell = received(app, LATE)
    assert [bell.maybe_expire(), bell.maybe_expire()] == [False, False]  # when it comes, and when it is its turn


def test_a_late_one_is_passed_over_a_moment_after_another(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "_PAUSE_S", 3600.0)
    assert not received(app, IN_TIME).maybe_expire()
    assert received(app, LATE).maybe_expire()
    monkeypatch.setattr(request, "_PAUSE_S", 0.0)
    assert not received(app, LATE).maybe_expire()


def test_a_late_one_is_passed_over_while_another_waits_for_a_pool_child(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "_PAUSE_S", 0.0)
    waits = received(app, IN_TIME)
    assert not waits.maybe_expire()
    state.task_reserved(waits)
    assert received(app, LATE).maybe_expire()
    state.task_accepted(waits)
    assert not received(app, LATE).maybe_expire()


def test_one_that_comes_in_time_is_always_heard(app: Celery) -> None:
    assert [received(app, IN_TIME).maybe_expire() for _ in range(3)] == [False] * 3


def test_no_message_limits_the_time_of_a_drain(app: Celery) -> None:
    """A limit would strike in the midst of saga code, whose run would be undone for it."""
    limited = received(app, IN_TIME, timelimit=[0.2, 0.1])
    assert limited.request_dict["timelimit"] == [0.2, 0.1]
    assert limited.time_limits == (None, None)


# -- where they are rung -----------------------------------------------------------------------------------------------
def refusing() -> str:
    """Return the URL of a broker that is not there."""
    return "redis://127.0.0.1:1/0"


def silent(listener: socket.socket) -> str:
    """Return the URL of a broker that lets in, and never says anything."""
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


@pytest.mark.parametrize("first", ["refuses", "is silent"])
def test_they_are_rung_at_the_next_broker_where_celery_has_several(broker_url: str, first: str) -> None:
    with socket.socket() as listener, redis.Redis.from_url(broker_url) as messages:
        gone = refusing() if first == "refuses" else silent(listener)
        with Celery("several", broker=f"{gone};{broker_url}", set_as_current=False) as app:
            bell = Bell(connection_options(app))
        until(lambda: bell.ring("several"), "it rings", 20.0)
        assert messages.llen("several") == 1
        bell.close()


def test_they_are_rung_by_the_login_method_that_celery_has() -> None:
    with Celery("external", broker="amqp://broker//", set_as_current=False) as app:
        app.conf.broker_login_method = "EXTERNAL"
        assert Connection(**connection_options(app)).login_method == "EXTERNAL"


@pytest.mark.parametrize(
    ("doorbells", "others", "late", "prefetch", "disabled", "waited_for"),
    [(0, 0, 0, 4, False, False), (3, 0, 0, 4, False, False), (4, 0, 0, 4, False, True), (3, 0, 1, 4, False, True),
     (0, 0, 1, 4, False, False), (0, 1, 0, 4, False, True), (9, 0, 0, 0, False, False), (0, 0, 0, 1, True, True)],
)  # fmt: skip
def test_drains_make_room_for_tasks_that_wait_or_cannot_be_seen_behind_doorbells(
    app: Celery, doorbells: int, others: int, late: int, prefetch: int, disabled: bool, waited_for: bool
) -> None:
    app.conf.worker_disable_prefetch = disabled
    main = SimpleNamespace(app=app, consumer=SimpleNamespace(initial_prefetch_count=prefetch))
    waiting = [received(app, IN_TIME, id=f"bell {n}") for n in range(doorbells)]
    waiting += [received(app, IN_TIME, id=f"task {n}", task="theirs") for n in range(others)]
    running = [received(app, IN_TIME, id="running", task="theirs")]
    running[0].acknowledged = True
    running += [received(app, IN_TIME, id=f"acknowledged late {n}", task="theirs") for n in range(late)]
    for each in (*waiting, *running):
        state.task_reserved(each)
    for each in running:
        state.task_accepted(each)
    worker._look_who_waits(main)
    assert (worker.waited_for(), worker.rung()) == (waited_for, doorbells > 0)
