"""Connections to a fresh, migrated database; and one with enough rows that a plan without its index would show."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from orchestrator.store.connection import Connection, open_connection


@pytest.fixture
def connect(database_url: str) -> Iterator[Callable[[], Connection]]:
    made: list[Connection] = []

    def make() -> Connection:
        made.append(open_connection(database_url, name="test"))
        return made[-1]

    yield make
    for connection in made:
        connection.close()


@pytest.fixture
def connection(connect: Callable[[], Connection]) -> Connection:
    return connect()
