"""Real servers for every test that asks: one pair per session, a fresh database and broker per test.

Set ``ORCHESTRATOR_TEST_DATABASE_URL`` and ``ORCHESTRATOR_TEST_BROKER_URL`` to test against servers of your
own: databases are made next to the one that is named, a Redis or Valkey database that is named is flushed.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
from psycopg import sql

from orchestrator import embedded
from tests.databases import Databases

TESTS = Path(__file__).parent
_broker_numbers = itertools.cycle(range(1, 250))  # 0 and 250 belong to workers that live as long as the session


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of tests that run in parallel (``-n 2 --dist loadgroup``), those of one folder stay together.

    They share workers and brokers that take seconds to start, and what they load the machine with they expect.
    """
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.path.relative_to(TESTS).parts[0]))


@pytest.fixture(scope="session")
def servers() -> Iterator[embedded.Servers]:
    """Embedded Postgres and Valkey of this session (and of this xdist worker)."""
    with (
        tempfile.TemporaryDirectory(prefix="orchestrator-tests-") as directory,
        embedded.start(Path(directory)) as running,
    ):
        yield running


@pytest.fixture(scope="session")
def _postgres_url(request: pytest.FixtureRequest) -> str:
    given = os.environ.get("ORCHESTRATOR_TEST_DATABASE_URL")
    return given or str(request.getfixturevalue("servers").database_url)


@pytest.fixture(scope="session")
def _template(_postgres_url: str) -> Iterator[str]:
    """Name of a migrated database that every test gets a copy of."""
    from orchestrator import store

    name = f"template_{uuid.uuid4().hex}"
    _execute(_postgres_url, "CREATE DATABASE {}", name)
    store.migrate(_with_path(_postgres_url, name))
    yield name
    _execute(_postgres_url, "DROP DATABASE {} WITH (FORCE)", name)


@pytest.fixture(scope="session")
def _databases(_postgres_url: str, _template: str) -> Iterator[Databases]:
    databases = Databases(_postgres_url, _template)
    yield databases
    databases.close()


@pytest.fixture
def database_url(_databases: Databases) -> Iterator[str]:
    """URL of a migrated database without rows, which nobody else has or had by this name."""
    name = _databases.lend()
    yield _databases.url(name)
    _databases.take_back(name)


@pytest.fixture
def empty_database_url(_postgres_url: str) -> Iterator[str]:
    """URL of a fresh database without the orchestrator's schema, dropped afterwards."""
    name = f"test_{uuid.uuid4().hex}"
    _execute(_postgres_url, "CREATE DATABASE {}", name)
    yield _with_path(_postgres_url, name)
    _execute(_postgres_url, "DROP DATABASE {} WITH (FORCE)", name)


@pytest.fixture
def broker_url(request: pytest.FixtureRequest) -> str:
    """URL of a broker without messages: a Valkey database of this test's own."""
    url = os.environ.get("ORCHESTRATOR_TEST_BROKER_URL")
    if url is None:
        running: embedded.Servers = request.getfixturevalue("servers")
        url = _with_path(running.broker_url, str(next(_broker_numbers)))
    if urlsplit(url).scheme in ("redis", "rediss"):
        with redis.Redis.from_url(url) as client:
            client.flushdb()
    return url


def _with_path(url: str, path: str) -> str:
    return urlsplit(url)._replace(path=f"/{path}").geturl()


def _execute(url: str, statement: str, *names: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))
