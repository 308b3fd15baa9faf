"""How a worker ends that is told to in the worst of moments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from celery import Celery

from orchestrator.celery.doorbell import Bell, connection_options
from tests.acceptance.running import until

ROOT = Path(__file__).parents[2]


def test_a_cold_shutdown_that_tears_a_message_to_a_pool_child_ends_all_the_same(
    database_url: str, broker_url: str, tmp_path: Path
) -> None:
    """The child waits for the rest of the message, and Celery's main process for the child."""
    now, log = tmp_path / "now", tmp_path / "log"
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "CELERY_BROKER_URL": broker_url, "TORN_WHEN": str(now),
        "ORCHESTRATOR_DATABASE_URL": database_url,
    }  # fmt: skip
    command = [sys.executable, "-m", "celery", "-A", "tests.celery.torn_app", "worker", "-c", "2", "-l", "INFO"]
    with log.open("wb") as sink:
        worker = subprocess.Popen([*command, "--without-mingle"], stdout=sink, stderr=sink, env=environment, cwd=ROOT)
    try:
        until(lambda: " ready." in log.read_text(), "a worker that is ready")
        with Celery("torn", broker=broker_url, set_as_current=False) as app:
            bell = Bell(connection_options(app))
        now.touch()
        until(lambda: bell.ring("celery") and not now.exists(), "a message is torn")
        bell.close()
        worker.wait(30.0)
    finally:
        worker.kill()
        worker.wait()
    assert "does not come to an end" in log.read_text()
