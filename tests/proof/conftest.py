"""One database made by the real engine, copied for each test that plants something in it."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg.types.json import Json

from orchestrator.store.connection import open_connection
from tests.engine.stage import Child
from tests.proof import effects, town
from tests.proof.effects import Effect
from tests.proof.world import Row


@dataclass(frozen=True)
class Place:
    """A database and an effect log that belong together."""

    database_url: str
    effect_log: Path

    def execute(self, sql: str, values: Any = None) -> None:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            connection.execute(sql, values)

    @contextmanager
    def journal(self, run_id: str) -> Iterator[list[list[Row]]]:
        """Hand out the journal of a run, one list of entries for each row, and write back what was made of it."""
        with psycopg.connect(self.database_url) as connection:
            found = connection.execute(
                "SELECT entries FROM orchestrator.journal WHERE run_id = %s ORDER BY seq", [run_id]
            ).fetchall()
            rows = [row[0] for row in found]
            yield rows
            for seq, entries in enumerate(rows):
                connection.execute(
                    "INSERT INTO orchestrator.journal VALUES (%s, %s, now(), %s) ON CONFLICT (run_id, seq) "
                    "DO UPDATE SET entries = EXCLUDED.entries",
                    [run_id, seq, Json(entries)],
                )
            connection.execute("UPDATE orchestrator.runs SET position = %s WHERE id = %s", [len(rows), run_id])

    @contextmanager
    def effects(self) -> Iterator[list[Effect]]:
        """Hand out the effects, and write back what was made of them."""
        lines = effects.read(self.effect_log)
        yield lines
        self.effect_log.write_text("".join(json.dumps(asdict(effect)) + "\n" for effect in lines))


_KEEP = ("orchestrator.runs", "orchestrator.journal", "orchestrator.work", "orchestrator.arrivals",
         "orchestrator.locks", "transactional_effects")  # fmt: skip
_GIVEN = """
SELECT string_agg(quote_ident(attname), ', ') FROM pg_attribute
WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
"""


@pytest.fixture(scope="module")
def built(_postgres_url: str, _template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A database with the runs of the town in it, each table kept a second time, and the log of their effects."""
    log = tmp_path_factory.mktemp("proof") / "effects"
    name = f"proof_{uuid.uuid4().hex}"
    url = urlsplit(_postgres_url)._replace(path=f"/{name}").geturl()
    with psycopg.connect(_postgres_url, autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name} TEMPLATE {_template}")
        with pytest.MonkeyPatch.context() as patch, open_connection(url, name="test") as connection:
            patch.setenv(effects.VARIABLE, str(log))
            child, slow = Child(url), Child(url)
            town.build(connection, child, slow)
            child.close()
            slow.close()
            connection.execute("CREATE SCHEMA kept")
            for table in _KEEP:
                connection.execute(f"CREATE TABLE kept.{table.rpartition('.')[2]} AS TABLE {table}")
        yield Place(url, log)
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def place(built: Place, tmp_path: Path) -> Place:
    """The town as it was built; whatever a test before this one planted is gone."""
    with psycopg.connect(built.database_url) as connection:
        connection.execute(f"TRUNCATE orchestrator.drainers, {', '.join(_KEEP)}")
        for table in _KEEP:
            kept = table.rpartition(".")[2]
            override = "OVERRIDING SYSTEM VALUE" if kept in ("arrivals", "locks") else ""
            ((given,),) = connection.execute(_GIVEN, [table]).fetchall()
            connection.execute(f"INSERT INTO {table} ({given}) {override} SELECT {given} FROM kept.{kept}")
        connection.execute("DROP TABLE IF EXISTS money")
    shutil.copy(built.effect_log, tmp_path / "effects")
    return Place(built.database_url, tmp_path / "effects")
