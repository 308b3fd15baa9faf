"""The demonstration ends well: a worker is killed with SIGKILL in the middle, and every promise holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def play(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sagas.demo", *arguments], cwd=ROOT, env={**os.environ, "COLUMNS": "120"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.timeout(330)
def test_every_promise_holds_over_the_runs_of_one_saga_and_a_killed_worker(tmp_path: Path) -> None:
    done = play("payment", "--data-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "The worker is killed with SIGKILL" in done.stdout
    assert "Every promise held, over 68 runs and one killed worker." in done.stdout
    assert "A payment that was refused at the point of no return" in done.stdout


def test_a_saga_that_there_is_not_is_refused_with_the_names_of_those_that_there_are(tmp_path: Path) -> None:
    done = play("paymnet", "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert "there is no paymnet; choose from transfer, order, payment" in done.stdout
