"""A companion is started again while the pool forks: neither may hold what the other waits for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_companion_starts_again_while_pool_children_are_forked(tmp_path: Path) -> None:
    """A child forked in the middle of starting a process holds a pipe whose end the starting thread waits for."""
    command = [sys.executable, "-m", "tests.celery.companion_race", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.strip() == "150", done.stderr[-2000:]
