"""Servers of this folder's own, which tests may kill, and a scene for each test.

Tests with the marker `long` run only when they are asked for (``make faults``).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from tests.faults.rabbitmq import RabbitMQ
from tests.faults.scene import Scene
from tests.faults.servers import Servers
from tests.faults.tally import TALLY

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def own_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """A Postgres and a Valkey to be killed."""
    servers = Servers(tmp_path_factory.mktemp("servers"))
    yield servers
    servers.stop()


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """A RabbitMQ to be killed."""
    broker = RabbitMQ(tmp_path_factory.mktemp("rabbitmq"))
    yield broker
    broker.stop()


def new_valkey_url(servers: Servers) -> str:
    """Return the URL of an empty database of Valkey."""
    url = servers.broker_url(next(_numbers) % 250)
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def new_scene(own_servers: Servers, tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    """Make scenes; the default broker is Valkey."""
    made: list[tuple[Scene, str]] = []

    def make(broker_url: str = "") -> Scene:
        name = own_servers.new_database()
        folder = tmp_path / f"scene-{len(made) + 1}"
        folder.mkdir()
        scene = Scene(own_servers.url_of(name), broker_url or new_valkey_url(own_servers), folder)
        made.append((scene, name))
        return scene

    yield make
    for scene, name in made:
        scene.close()
        own_servers.drop_database(name)


@pytest.fixture
def scene(new_scene: Callable[..., Scene]) -> Scene:
    """A scene with Valkey."""
    return new_scene()


@pytest.fixture(params=["valkey", pytest.param("rabbitmq", marks=pytest.mark.debian)])
def scene_of_each_broker(request: pytest.FixtureRequest, new_scene: Callable[..., Scene]) -> Scene:
    """A scene with Valkey, and one with RabbitMQ."""
    if request.param == "valkey":
        return new_scene()
    return new_scene(request.getfixturevalue("rabbitmq").new_url())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TALLY.tests and "PYTEST_XDIST_WORKER" not in os.environ:
        terminalreporter.section("faults survived")
        terminalreporter.write_line(str(TALLY))
