"""A database with a table that nobody may touch, a client, and a worker's child, for whoever means harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest

from orchestrator.client import Client
from orchestrator.settings import Settings
from orchestrator.store.connection import Connection, open_connection
from tests.engine.stage import QUEUE, Child

_TABLES = """
SELECT string_agg(format('%I.%I %s', n.nspname, c.relname, c.relkind), ',' ORDER BY n.nspname, c.relname)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'
"""


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with open_connection(database_url, name="test") as connection:
        yield connection


@pytest.fixture
def client(database_url: str) -> Iterator[Client]:
    settings = Settings.from_environment({}, database_url=database_url)
    client = Client(settings, lambda queue, times: None, lambda: QUEUE)
    yield client
    client.pool.close()


@pytest.fixture
def new_child(database_url: str) -> Iterator[Callable[[], Child]]:
    made: list[Child] = []

    def make() -> Child:
        made.append(Child(database_url))
        return made[-1]

    yield make
    for child in made:
        child.close()


@pytest.fixture
def untouched(connection: Connection) -> Iterator[None]:
    """Whatever the test does, afterwards there are the same tables as before, and the canary sings."""
    connection.execute("CREATE TABLE canary (song text)")
    connection.execute("INSERT INTO canary VALUES ('la')")
    before = connection.execute(_TABLES).fetchone()
    yield
    assert connection.execute(_TABLES).fetchone() == before
    assert connection.execute("SELECT song FROM canary").fetchall() == [("la",)]


def count(connection: psycopg.Connection[tuple[int]], table: str = "runs") -> int:
    """Return how many rows there are."""
    row = connection.execute(f"SELECT count(*) FROM orchestrator.{table}").fetchone()
    assert row is not None
    return row[0]
