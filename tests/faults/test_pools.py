"""The other pools: threads, solo, and prefork with the `spawn` start method."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.acceptance.running import ROOT
from tests.faults.scene import LOADED, Scene

POOLS = {"threads": ["-P", "threads"], "solo": ["-P", "solo"], "spawn": []}


@pytest.mark.parametrize("pool", POOLS)
def test_a_killed_worker_of_any_pool_loses_no_run(scene: Scene, pool: str) -> None:
    how = {"FAULTS_POOL_START": "spawn"} if pool == "spawn" else {}
    first, _ = scene.start_workers(2, *POOLS[pool], **how)
    load = scene.load(runs=44)
    load.until_ended(10)
    scene.signal(first, signal.SIGKILL)
    first.launch()
    scene.judge(LOADED, load)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_passes_the_acceptance_tests(pool: str) -> None:
    """But those that kill the process of a step: with threads and solo that is the worker's own."""
    chosen = "not long" if pool == "spawn" else "not own_process"
    command = [sys.executable, "-m", "pytest", "tests/acceptance", "-q", "-m", chosen, "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "ACCEPTANCE_POOL": pool}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
