"""A database, a broker, a world of effects and a worker for the session; workers to be killed have their own queues.

The tests talk to database and broker through proxies that can be cut; the workers do so only if a test asks.
"""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
from psycopg import sql

from orchestrator import store
from tests.acceptance.running import Worker, World
from tests.engine.proxy import Proxy

POOL = os.environ.get("ACCEPTANCE_POOL", "prefork")  # tests/faults has all of them run these tests
_POOLS = {"prefork": (), "spawn": (), "threads": ("-P", "threads"), "solo": ("-P", "solo")}


@dataclass
class Site:
    """Where this session's runs live."""

    database_url: str
    broker_url: str
    database: Proxy
    broker: Proxy
    folder: Path
    numbers: Iterator[int]

    def environment(self, *, proxied: bool = False) -> dict[str, str]:
        return {
            "ORCHESTRATOR_DATABASE_URL": self.database.url if proxied else self.database_url,
            "CELERY_BROKER_URL": self.broker.url if proxied else self.broker_url,
            "ACCEPTANCE_WORLD": str(self.folder),
            "ACCEPTANCE_RESULTS": self.broker_url,
            "ORCHESTRATOR_PUMP_INTERVAL": "0.1",  # so that a retry that is due does not wait for a second
        }

    def new_worker(self, *options: str, queue: str = "", proxied: bool = False, **environment: str) -> Worker:
        number = next(self.numbers)
        queue = queue or f"own-{number}"
        surroundings = {**self.environment(proxied=proxied), "ACCEPTANCE_QUEUE": queue, **environment}
        return Worker(queue, self.folder / f"worker-{number}.log", surroundings, *_POOLS[POOL], *options)


@pytest.fixture(scope="session")
def site(
    request: pytest.FixtureRequest, _postgres_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    name = f"acceptance_{uuid.uuid4().hex}"
    with psycopg.connect(_postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    database_url = urlsplit(_postgres_url)._replace(path=f"/{name}").geturl()
    store.migrate(database_url)
    broker_url = _broker_url(request)
    database, broker = Proxy(database_url), Proxy(broker_url)
    found = Site(database_url, broker_url, database, broker, tmp_path_factory.mktemp("world"), itertools.count(1))
    _prepare_app(found)
    yield found
    database.close()
    broker.close()
    with psycopg.connect(_postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _broker_url(request: pytest.FixtureRequest) -> str:
    url = os.environ.get("ORCHESTRATOR_TEST_BROKER_URL")
    if url is None:
        url = urlsplit(request.getfixturevalue("servers").broker_url)._replace(path="/0").geturl()
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


def _prepare_app(site: Site) -> None:
    """Read the settings now, so that nothing has to stay in the environment for the rest of the session."""
    from tests.acceptance import sagas, steps
    from tests.acceptance.app import app, orchestrator

    assert sagas and steps
    with pytest.MonkeyPatch.context() as patch:
        for name, value in site.environment(proxied=True).items():
            patch.setenv(name, value)
        app.conf.broker_url = site.broker.url
        app.conf.result_backend = site.broker_url
        app.set_default()
        assert orchestrator.settings and orchestrator.bell and orchestrator.client
    with psycopg.connect(site.database_url) as connection:
        connection.execute(steps.LEDGER)
        connection.execute("INSERT INTO accounts VALUES ('taken', 0)")


@pytest.fixture(autouse=True)
def bound(site: Site) -> Iterator[None]:
    """Sagas and steps belong to the app of these tests, whatever other apps other tests have made meanwhile."""
    from orchestrator.saga import registry as sagas
    from orchestrator.step import registry as steps
    from tests.acceptance.app import app, orchestrator

    for saga in sagas.sagas.values():
        if saga.__module__.startswith("tests.acceptance."):
            saga.starter = orchestrator
    for step in steps.steps.values():
        if step.__module__.startswith("tests.acceptance."):
            step.bound = app.tasks[step.name]
    app.set_current()  # Celery's own canvases are sent by it
    yield
    site.database.restore()
    site.broker.restore()


@pytest.fixture(scope="session")
def worker(site: Site) -> Iterator[Worker]:
    """The worker of the default queue; nobody kills it, and it lives to the end.

    One whose pool has one slot is not alone: a run can be told something while a step of it runs.
    """
    running = [site.new_worker(queue="celery").start()]
    if POOL == "solo":
        running.append(site.new_worker("-n", "other@acceptance", queue="celery").start())
    yield running[0]
    for each in running:
        assert each.is_alive, each.said
        each.stop()


@pytest.fixture
def new_worker(site: Site) -> Iterator[Callable[..., Worker]]:
    """Make workers on queues of their own; they end with the test."""
    made: list[Worker] = []

    def make(*options: str, **surroundings: Any) -> Worker:
        made.append(site.new_worker(*options, **surroundings))
        return made[-1]

    yield make
    for each in made:
        if each.is_alive:
            each.kill()


@pytest.fixture
def own_worker(new_worker: Callable[..., Worker]) -> Worker:
    """A worker on a queue of its own, to be killed."""
    return new_worker().start()


@pytest.fixture
def world(site: Site) -> World:
    return World(site.folder)


@pytest.fixture
def sql_of(site: Site) -> Iterator[psycopg.Connection[Any]]:
    """A connection to the database of the runs, past the proxy."""
    with psycopg.connect(site.database_url, autocommit=True) as connection:
        yield connection
