"""A worker of Celery whose processes die, or lose their connections, at every boundary of its own layer."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from celery import Celery

from orchestrator import failpoints
from tests.crash.points import CELERY
from tests.crash.workload import in_a_row, side_by_side
from tests.proof import effects
from tests.proof.checker import NOTHING, check, wait_until_settled

ROOT = Path(__file__).parents[2]
AT_THE_END = ("companion.ending", "companion.ended")
_WITHIN_S = 120.0


class Supervised:
    """A worker that is started again whenever its main process ends, as an init system does."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self._environment = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
        self._log = log
        self.starts = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        command = [sys.executable, "-m", "celery", "-A", "tests.crash.app", "worker", "-c", "2", "-n", "crash@here"]
        command += ["-l", "INFO", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        with self._log.open("ab") as sink:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, cwd=ROOT, env=self._environment,
                start_new_session=True,
            )  # fmt: skip

    def look(self) -> None:
        """Start it again if it has ended."""
        if self.process.poll() is not None:
            self.process = self._start()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        if self.process.poll() is None:
            self.kill()


class Site:
    """A database, a broker, a supervised worker, and whoever sends messages that start runs."""

    def __init__(self, database_url: str, broker_url: str, folder: Path, points: str) -> None:
        self.database_url = database_url
        self.folder = folder
        self.fired = folder / "fired"
        self.fired.mkdir()
        self.acknowledged: list[str] = []
        self.sender = Celery("sender", broker=broker_url, set_as_current=False)
        self.log = folder / "log"
        self.worker = Supervised(
            {
                "ORCHESTRATOR_DATABASE_URL": database_url,
                "ORCHESTRATOR_PUMP_INTERVAL": "0.2",
                "CELERY_BROKER_URL": broker_url,
                effects.VARIABLE: str(folder / "effects"),
                failpoints.VARIABLE: points,
                failpoints.FIRED: str(self.fired),
            },
            self.log,
        )

    def send(self, run_id: str) -> None:
        """Start a run as any program does that knows the broker."""
        name, names = ((in_a_row.name, ["a", "w", "b"]), (side_by_side.name, ["a", "b", "c"]))[len(run_id) % 2]
        self.sender.send_task(name, (names,), task_id=run_id)
        self.acknowledged.append(run_id)

    def until(self, condition: Callable[[], Any], what: str, meanwhile: Callable[[], Any] = lambda: None) -> None:
        """Wait for a condition and keep the worker up."""
        deadline = time.monotonic() + _WITHIN_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {_WITHIN_S} s; {self.outstanding()}"
            self.worker.look()
            meanwhile()
            time.sleep(0.05)

    def has_fired(self, *names: str) -> bool:
        return all((self.fired / name).exists() for name in names)

    def end_a_life(self) -> None:
        """Kill the worker's main process if it has a companion that can see it end, and wait for that."""
        main = psutil.Process(self.worker.process.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            companions = [child for child in main.children() if "orchestrator.celery.companion" in child.cmdline()]
            if companions:
                self.worker.kill()
                psutil.wait_procs(companions, timeout=15.0)

    def outstanding(self) -> str:
        """Return what is left to do and who is there, for a person."""
        with psycopg.connect(self.database_url) as connection:
            work = connection.execute("SELECT * FROM orchestrator.work").fetchall()
            alive = connection.execute("SELECT id, pid, dead_at FROM orchestrator.incarnations").fetchall()
            marks = connection.execute("SELECT * FROM orchestrator.drainers").fetchall()
        return f"{self.unfinished()} {work=} {alive=} {marks=}\n{self.log.read_text()[-8000:]}"

    def unfinished(self) -> list[str]:
        with psycopg.connect(self.database_url) as connection:
            rows = connection.execute("SELECT id FROM orchestrator.runs WHERE finished_at IS NOT NULL").fetchall()
        return sorted(set(self.acknowledged) - {row[0] for row in rows})


@pytest.fixture
def new_site(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Callable[[str], Site]]:
    made: list[Site] = []

    def make(points: str) -> Site:
        made.append(Site(database_url, broker_url, tmp_path, points))
        return made[-1]

    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(effects.TABLE)
    yield make
    for site in made:
        site.worker.stop()
        site.sender.close()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("action", ["exit", "raise"])
def test_a_worker_goes_on_whatever_happens_in_its_own_layer(action: str, new_site: Callable[[str], Site]) -> None:
    """One point after the other; a child that dies in a step is what the companion's own points need."""
    site = new_site(";".join(["effect.after=exit@3", *(f"{name}={action}" for name in sorted(CELERY))]))
    numbers = itertools.count(1)
    rest = sorted(CELERY - set(AT_THE_END))

    def send() -> None:
        if len(site.acknowledged) < 12 or not site.unfinished():
            site.send("m" * next(numbers))

    site.until(lambda: site.has_fired("effect.after", *rest), f"all of {rest}", send)
    for name in AT_THE_END:
        site.until(functools.partial(site.has_fired, name), name, site.end_a_life)
        send()
    site.until(lambda: not site.unfinished(), "every run that was asked for has ended")
    wait_until_settled(site.database_url, 30.0)
    report = check(
        site.database_url, effect_log=site.folder / "effects", acknowledged=site.acknowledged, demand=NOTHING
    )
    assert report.ok, f"{report}\n{site.log.read_text()[-8000:]}"
    assert {path.name for path in site.fired.iterdir()} == {*CELERY, "effect.after"}
