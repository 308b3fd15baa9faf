"""A migration that dies, or whose connection breaks, leaves the schema as it was or as it is to be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from orchestrator import failpoints, store
from tests.crash.points import MIGRATION

ROOT = Path(__file__).parents[2]
_MIGRATE = "import sys; from orchestrator import store; store.migrate(sys.argv[1])"


@pytest.mark.parametrize("action", ["exit", "raise"])
@pytest.mark.parametrize("name", sorted(MIGRATION))
def test_a_migration_is_done_or_not_begun(name: str, action: str, empty_database_url: str, tmp_path: Path) -> None:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), failpoints.VARIABLE: f"{name}={action}",
        failpoints.FIRED: str(tmp_path),
    }  # fmt: skip
    command = [sys.executable, "-c", _MIGRATE, empty_database_url]
    died = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=60)
    assert died.returncode == (failpoints.EXIT_CODE if action == "exit" else 1)
    assert (tmp_path / name).read_text().startswith(action)
    with psycopg.connect(empty_database_url) as connection:
        found = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'orchestrator'").fetchone()
    assert found is not None and (found[0] > 0) == (name == "migrate.after")
    applied = store.migrate(empty_database_url)
    assert bool(applied) == (name != "migrate.after")
    with psycopg.connect(empty_database_url) as connection:
        store.check(connection)
