"""Workers that come and go on purpose: rolling restarts, two releases side by side, beat."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.running import ROOT, until
from tests.faults import newer
from tests.faults.load import QUEUE
from tests.faults.scene import BARE, LOADED, Scene
from tests.faults.steps import Stop
from tests.faults.test_processes import LONG_LEASE, attempts_lost
from tests.faults.test_surroundings import WallClock


def test_a_rolling_restart_under_load_burns_no_attempt(scene: Scene) -> None:
    workers = scene.start_workers(2, **LONG_LEASE)
    load = scene.load(runs=77, ms=30)
    for number, worker in enumerate(workers):
        load.until_ended(10 + 20 * number)
        scene.signal(worker, signal.SIGTERM)
        assert worker.process is not None and worker.process.wait(60.0) == 0
        worker.start()
    scene.judge(LOADED, load)
    assert attempts_lost(scene) == []


def test_two_releases_work_side_by_side(scene: Scene) -> None:
    """Old workers leave alone what they do not know, whether it was there before the new ones or comes with them."""
    (old,) = scene.start_workers(1)
    options = {"queue": QUEUE}
    runs = [f"excursion-{number}" for number in range(10)]
    for run in runs[:5]:
        scene.office.client.start(newer.excursion, (Stop(name="a"),), {}, {"task_id": run, **options})
    load = scene.load(runs=22)
    load.until_ended(15)
    assert {scene.state(run) for run in runs[:5]} == {"pending"}
    scene.start_workers(1, FAULTS_NEWER="1")
    scene.fault("a newer release comes")
    for run in runs[5:]:
        scene.office.client.start(newer.excursion, (Stop(name="a"),), {}, {"task_id": run, **options})
    for run in runs:
        scene.until_state(run, "completed")
    assert old.is_alive and scene.office.acknowledged
    scene.judge(LOADED, load)


def _beat(scene: Scene, folder: Path, **more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "celery", "-A", "tests.faults.app", "beat", "-s", str(folder / "schedule")]
    environment = {
        **os.environ,
        **scene.environment(proxied=False),
        "FAULTS_BEAT_S": "0.2",
        "PYTHONPATH": str(ROOT),
        **more,
    }
    with (folder / "beat.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--pidfile", "", "--max-interval", "1"], env=environment, cwd=ROOT,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip


def test_a_beat_that_is_killed_goes_on_when_it_is_started_again(scene: Scene, tmp_path: Path) -> None:
    scene.start_workers(1)
    completed = "SELECT count(*) FROM orchestrator.runs WHERE state = 'completed'"
    for wanted in (3, 6):
        beat = _beat(scene, tmp_path)
        try:
            until(lambda wanted=wanted: scene.sql(completed)[0][0] >= wanted, f"{wanted} runs by beat", 60.0)  # type: ignore[misc]
        finally:
            scene.signal(beat.pid, signal.SIGKILL)
            beat.wait(10.0)
    scene.start("by hand", Stop(name="a"))
    scene.judge(BARE)


@pytest.mark.debian
def test_a_beat_whose_wall_clock_jumps_starts_neither_nothing_nor_everything(scene: Scene, tmp_path: Path) -> None:
    """By hours, there and back: it goes by the clock of Postgres."""
    scene.start_workers(1)
    clock = WallClock(tmp_path)
    beat = _beat(scene, tmp_path, **clock.environment)
    started = "SELECT count(*) FROM orchestrator.runs"
    try:
        for seconds in (0, 3600, -3600, 7200):
            before = scene.sql(started)[0][0]
            clock.set(seconds)
            scene.fault("clock jumped")
            until(lambda before=before: scene.sql(started)[0][0] >= before + 4, "beat goes on", 60.0)  # type: ignore[misc]
    finally:
        beat.kill()
        beat.wait(10.0)
    scene.start("by hand", Stop(name="a"))
    scene.judge(BARE)
    took = "SELECT extract(epoch FROM max(started_at) - min(started_at))::float8 FROM orchestrator.runs"
    assert scene.sql(started)[0][0] < 10 + scene.sql(took)[0][0] / 0.2
