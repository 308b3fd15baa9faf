"""Where a process has two apps, a worker is that of one."""

from __future__ import annotations

from pathlib import Path

import psycopg

from orchestrator.store import runs
from tests.acceptance.running import Worker, until


def test_a_worker_starts_and_routes_what_its_sagas_ask_for_by_its_own_app(
    database_url: str, broker_url: str, tmp_path: Path
) -> None:
    environment = {"ORCHESTRATOR_DATABASE_URL": database_url, "CELERY_BROKER_URL": broker_url}
    worker = Worker("first", tmp_path / "log", environment, app="tests.celery.two_apps:app")
    with psycopg.connect(database_url, autocommit=True) as connection:
        new = runs.Start(id="r", saga="two.outer", version=1, input={"word": "w"}, queue="first")
        assert runs.start(connection, new)
        inner = "SELECT 1 FROM orchestrator.runs WHERE saga = 'two.inner' AND state = 'completed'"
        try:
            worker.start()
            until(lambda: connection.execute(inner).fetchone(), "the run that a step has started")
        finally:
            worker.kill()
    assert "'second'" in worker.said and "has another database than app 'first'" in worker.said
