"""A database of the test's own, a client on it, and real workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from orchestrator.client import Client
from orchestrator.settings import Settings
from orchestrator.store.connection import Connection, open_connection
from tests.acceptance.running import Worker
from tests.engine.stage import QUEUE, Child


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with open_connection(database_url, name="test") as connection:
        yield connection


@pytest.fixture
def client(database_url: str) -> Iterator[Client]:
    """A client that rings nobody: the pumps do."""
    client = Client(Settings.from_environment({}, database_url=database_url), lambda queue, times: None, lambda: QUEUE)
    yield client
    client.pool.close()


@pytest.fixture
def new_child(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Child]]:
    """Make children of workers without Celery, whose steps run in this process."""
    monkeypatch.setenv("LIMITS_FOLDER", str(tmp_path))
    made: list[Child] = []

    def make(**options: Any) -> Child:
        made.append(Child(database_url, **options))
        return made[-1]

    yield make
    for child in made:
        child.close()


@pytest.fixture
def child(new_child: Callable[..., Child]) -> Child:
    return new_child()


@pytest.fixture
def new_worker(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Callable[[], Worker]]:
    """Start real workers with two children each, all on one queue."""
    made: list[Worker] = []
    environment = {
        "ORCHESTRATOR_DATABASE_URL": database_url,
        "CELERY_BROKER_URL": broker_url,
        "LIMITS_FOLDER": str(tmp_path),
        "ORCHESTRATOR_PUMP_INTERVAL": "0.1",
    }

    def make() -> Worker:
        number = len(made)
        worker = Worker(
            QUEUE, tmp_path / f"worker-{number}.log", environment, app="tests.limits.app", name=f"w{number}"
        )
        made.append(worker.start())
        return worker

    yield make
    for worker in made:
        if worker.is_alive:
            worker.kill()


@pytest.fixture
def sql_of(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection
