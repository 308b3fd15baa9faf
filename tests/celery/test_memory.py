"""What a worker's processes keep in memory, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from celery import Celery

from orchestrator.celery.doorbell import Bell, connection_options
from tests.acceptance.running import Worker, until


@pytest.fixture
def new_worker(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Start a real worker."""
    environment = {"ORCHESTRATOR_DATABASE_URL": database_url, "CELERY_BROKER_URL": broker_url}
    made: list[Worker] = []

    def make(*options: str) -> Worker:
        made.append(Worker("celery", tmp_path / "log", environment, *options, app="tests.celery.events_app"))
        return made[-1].start()

    yield make
    for worker in made:
        worker.kill()


def test_children_share_what_was_imported_before_they_were_forked(new_worker: Callable[..., Worker]) -> None:
    worker = new_worker("-c", "3")
    assert worker.process is not None
    below = psutil.Process(worker.process.pid).children()
    children = [child.memory_full_info() for child in below if "orchestrator.celery.companion" not in child.cmdline()]
    assert len(children) == 3
    assert all(child.uss < child.rss / 3 for child in children), children  # of those but the last it was half


def test_doorbells_that_came_too_late_are_not_remembered(new_worker: Callable[..., Worker], broker_url: str) -> None:
    new_worker()
    app = Celery(broker=broker_url, set_as_current=False)
    late = Bell(connection_options(app), timedelta(milliseconds=1))
    assert late.ring("celery", 50)
    with app.connection_for_read() as connection:
        queue = connection.default_channel
        until(lambda: not queue.queue_declare("celery").message_count, "all of them are looked at")
    revoked = app.control.inspect(timeout=60.0, limit=1).revoked() or {}
    assert list(revoked.values()) == [[]]
    for each in (late, app):
        each.close()
