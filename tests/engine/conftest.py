"""Children of workers, each with a drainer of its own, on a fresh database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orchestrator.client import Client
from orchestrator.store.connection import Connection, open_connection
from tests.engine.proxy import Proxy
from tests.engine.stage import QUEUE, Child


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with open_connection(database_url, name="test") as connection:
        yield connection


@pytest.fixture
def new_child(database_url: str) -> Iterator[Callable[..., Child]]:
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
def client(child: Child) -> Iterator[Client]:
    """A caller who rings nobody: the child drains when the test says so."""
    client = Client(child.settings, lambda queue, times: None, lambda: QUEUE)
    yield client
    client.pool.close()


@pytest.fixture
def proxy(database_url: str) -> Iterator[Proxy]:
    """A way to the database that can be cut."""
    proxy = Proxy(database_url)
    yield proxy
    proxy.close()
