"""Which workers cannot drive sagas, and say so at their start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_worker_with_greenlets_ends_with_one_sentence() -> None:
    """It stood still for ever at its start, without a word."""
    command = [sys.executable, "-m", "celery", "-A", "tests.celery.green_app", "-b", "memory://", "worker"]
    command += ["-P", "custom"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CELERY_CUSTOM_WORKER_POOL": "tests.celery.green_app:Green"}
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "start this worker with -P prefork, threads or solo" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_worker_that_takes_no_json_ends_with_one_sentence() -> None:
    """It refused every doorbell, and was ended each minute because "its connection to the broker has died"."""
    command = [sys.executable, "-m", "celery", "-A", "tests.celery.pickle_app", "-b", "memory://", "worker"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "C_FORCE_ROOT": "1"}
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "add 'json' to accept_content" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("process", ["worker", "beat"])
def test_a_process_without_a_database_url_ends_with_one_sentence(process: str) -> None:
    """It ended with forty lines of traceback, and beat with one word of it a line."""
    command = [sys.executable, "-m", "celery", "-A", "tests.beat.app", "-b", "memory://", process]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "C_FORCE_ROOT": "1"}
    environment.pop("ORCHESTRATOR_DATABASE_URL", None)
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "orchestrator: No database is configured: set ORCHESTRATOR_DATABASE_URL" in ended.stderr
    assert "Traceback" not in ended.stderr
