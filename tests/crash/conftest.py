"""One database and one process that forks others, for the whole session; every case begins with empty tables."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import sql

from tests.crash.driver import Drivers, Request
from tests.crash.points import CELERY, MIGRATION, NAMES, PRELUDES
from tests.crash.workload import STORIES
from tests.proof import effects
from tests.proof.checker import NOTHING, Report, check, refused_in

_TABLES = "runs, journal, work, arrivals, incarnations, drainers, gates, pauses, paused_runs, locks"


@dataclass(frozen=True)
class Stage:
    """Where a case is played, and by whom."""

    database_url: str
    folder: Path
    drivers: Drivers

    def play(self, story: str, *, points: str = "", finish: bool = False, count: bool = False) -> int:
        """Let a process play a story; returns its exit code."""
        (self.folder / "fired").mkdir(exist_ok=True)
        return self.drivers.run(Request(story, self.database_url, str(self.folder), points, finish, count))

    def clear(self) -> None:
        """Empty the tables; waits for whatever a process that is dead had open."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            connection.execute(f"TRUNCATE {', '.join(f'orchestrator.{t.strip()}' for t in _TABLES.split(','))}")
            connection.execute("TRUNCATE transactional_effects")
        for file in ("effects", "acknowledged", "log"):
            (self.folder / file).unlink(missing_ok=True)

    def read(self, name: str) -> str:
        """Return what a file of the case says, empty if nobody wrote it."""
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def check(self, lived: bool) -> Report:
        """Put the proof's rules to what is left; who died could not report that its late success was refused."""
        return check(
            self.database_url,
            effect_log=self.folder / "effects",
            acknowledged=self.read("acknowledged").splitlines(),
            refused=refused_in(self.read("log")) if lived else (),
            demand=NOTHING,
        )

    def states(self) -> dict[str, str]:
        """Return how every run has ended, by its id."""
        with psycopg.connect(self.database_url) as connection:
            return dict(connection.execute("SELECT id, state FROM orchestrator.runs").fetchall())


@pytest.fixture(scope="session")
def _crash_database(_postgres_url: str, _template: str) -> Iterator[str]:
    name = f"crash_{uuid.uuid4().hex}"
    with psycopg.connect(_postgres_url, autocommit=True) as server:
        server.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(_template))
        )
        # Processes die here, the server does not: waiting for its disk would only make every case slower.
        server.execute(sql.SQL("ALTER DATABASE {} SET synchronous_commit = off").format(sql.Identifier(name)))
    url = urlsplit(_postgres_url)._replace(path=f"/{name}").geturl()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(effects.TABLE)
    yield url
    with psycopg.connect(_postgres_url, autocommit=True) as server:
        server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def _drivers() -> Iterator[Drivers]:
    drivers = Drivers()
    yield drivers
    drivers.close()


@pytest.fixture
def stage(_crash_database: str, _drivers: Drivers, tmp_path: Path) -> Stage:
    found = Stage(_crash_database, tmp_path, _drivers)
    found.clear()
    return found


@pytest.fixture(scope="session")
def hits(
    _crash_database: str, _drivers: Drivers, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, int]]:
    """How often each story comes by each point, when nothing is armed to do anything."""
    found = {}
    for story in STORIES:
        stage = Stage(_crash_database, tmp_path_factory.mktemp("count"), _drivers)
        stage.clear()
        points = ";".join(f"{name}=raise@{10**9}" for name in NAMES)
        assert stage.play(story, points=points, count=True) == 0, stage.read("log")
        found[story] = json.loads(stage.read("hits"))
    return found


@pytest.fixture
def story_of(hits: dict[str, dict[str, int]]) -> Callable[[str], str]:
    """The shortest story in which a point is reached."""

    def find(name: str) -> str:
        assert name not in CELERY | MIGRATION
        if name in PRELUDES:
            return "broken"
        reaching = [story for story in hits if hits[story][name]]
        assert reaching, f"no story reaches the failpoint {name}: tell one in tests/crash, or take the point out"
        return min(reaching, key=lambda story: sum(hits[story].values()))

    return find
