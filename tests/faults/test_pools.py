"""The other pools: threads, solo, and prefork with the `spawn` start method."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.acceptance.running import ROOT
from tests.faults.scene import LOADED, Scene
from tests.faults.steps import Stop

POOLS = {"threads": ["-P", "threads"], "solo": ["-P", "solo"], "spawn": []}


@pytest.mark.parametrize("pool", POOLS)
def test_a_killed_worker_of_any_pool_loses_no_run(scene: Scene, pool: str) -> None:
    how = {}
    if pool == "spawn":
        how = {"FAULTS_POOL_START": "spawn"}
        scene.warm_bytes = 96 << 20  # a child that is spawned shares nothing: it imports all with its first task
    first, _ = scene.start_workers(2, *POOLS[pool], **how)
    load = scene.load(runs=44)
    load.until_ended(10)
    scene.signal(first, signal.SIGKILL)
    first.launch()
    scene.judge(LOADED, load)


def test_a_busy_worker_of_the_solo_pool_is_not_taken_for_one_that_neglects_its_work(scene: Scene) -> None:
    """It has one slot, whatever its concurrency: it is not rung for a second one, nor ended for want of an answer."""
    (worker,) = scene.start_workers(1, *POOLS["solo"], "--concurrency", "4", ORCHESTRATOR_WATCHDOG="3")
    stops = [Stop(name=f"stop-{number}", kind="look", ms=900) for number in range(10)]
    scene.start("long", *stops, together=True)
    scene.until_state("long", "completed", within_s=90.0)
    assert scene.sql("SELECT slots FROM orchestrator.incarnations") == [(1,)]
    assert worker.is_alive, worker.said


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
