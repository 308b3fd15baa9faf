"""Which pools a worker may have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
