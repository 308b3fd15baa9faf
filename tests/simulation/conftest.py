"""A database with the simulation's clock, made once and emptied for each seed; and which seeds are to be played."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from tests.conftest import _with_path
from tests.simulation.database import empty, prepare
from tests.simulation.network import Sessions
from tests.simulation.verdict import Verdict
from tests.simulation.world import Simulation

Play = Callable[..., Verdict]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="play this seed of the simulation and no other")
    parser.addoption("--seeds", type=int, help="how many seeds of the simulation to play (ORCHESTRATOR_TEST_SEEDS)")


@pytest.fixture(scope="module")
def play(_postgres_url: str, _template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    """Return a function that plays a seed."""
    name = f"simulation_{uuid.uuid4().hex}"
    database_url, folder = _with_path(_postgres_url, name), tmp_path_factory.mktemp("simulation")
    with psycopg.connect(_postgres_url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{_template}"')
        prepare(database_url)
        sessions = Sessions()

        def played(seed: int, focus: str = "") -> Verdict:
            empty(database_url)
            return Simulation(seed, database_url, Path(folder) / "effects", sessions, focus=focus).play()

        yield played
        sessions.close()
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def seeds(request: pytest.FixtureRequest) -> list[int]:
    """The seeds to play: 200, or as many as were asked for, or the one."""
    one = request.config.getoption("--seed", default=None)
    count = request.config.getoption("--seeds", default=None) or os.environ.get("ORCHESTRATOR_TEST_SEEDS") or 200
    return [one] if one is not None else list(range(1, int(count) + 1))
