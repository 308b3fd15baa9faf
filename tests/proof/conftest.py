"""One database made by the real engine, copied for each test that plants something in it."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from orchestrator.store.connection import open_connection
from tests.engine.stage import Child
from tests.proof import effects, town


@dataclass(frozen=True)
class Place:
    """A database and an effect log that belong together."""

    database_url: str
    effect_log: Path

    def execute(self, sql: str, values: Any = None) -> None:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            connection.execute(sql, values)


def _database(url: str, template: str) -> tuple[str, str]:
    name = f"proof_{uuid.uuid4().hex}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    return name, urlsplit(url)._replace(path=f"/{name}").geturl()


def _drop(url: str, name: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def built(_postgres_url: str, _template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The name of a database with the runs of the town in it, and the log of their effects."""
    log = tmp_path_factory.mktemp("proof") / "effects"
    name, url = _database(_postgres_url, _template)
    with pytest.MonkeyPatch.context() as patch, open_connection(url, name="test") as connection:
        patch.setenv(effects.VARIABLE, str(log))
        child, slow = Child(url), Child(url)
        town.build(connection, child, slow)
        child.close()
        slow.close()
    yield name, log
    _drop(_postgres_url, name)


@pytest.fixture
def place(built: tuple[str, Path], _postgres_url: str, tmp_path: Path) -> Iterator[Place]:
    """A copy of the town."""
    template, log = built
    name, url = _database(_postgres_url, template)
    shutil.copy(log, tmp_path / "effects")
    yield Place(url, tmp_path / "effects")
    _drop(_postgres_url, name)
