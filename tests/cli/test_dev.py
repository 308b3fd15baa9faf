"""dev: the whole stack comes up, works, survives its worker, and is gone afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cli.conftest import ROOT, eventually

_MAIN = """
from celery.bin.celery import celery
from orchestrator.cli import saga
celery.add_command(saga)
celery(prog_name="celery")
"""
_APP = """
from celery import Celery
from orchestrator import Effect, Orchestrator, saga, step
app = Celery("tiny")
orchestrator = Orchestrator(app)
@step(effect=Effect.NONE, queue="of-its-own")
def double(n: int) -> int: return 2 * n
@saga.define
async def twice(n: int) -> int: return await saga.step(double, n)
"""


class _Dev:
    """A ``saga dev`` in a directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tiny.py").write_text(_APP)
        self._log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("ORCHESTRATOR_DATABASE_URL", "CELERY_BROKER_URL")}
        return {**kept, "PYTHONPATH": f"{ROOT}:{self.folder}"}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", _MAIN, "-A", "tiny", "saga", *arguments]

    def start(self) -> None:
        command = self.command("dev", "-c", "1", "--flower-port", "15555")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment(), stdout=log, stderr=log, start_new_session=True
            )
        eventually(lambda: "ready." in self.said or self.ended, 60)
        assert not self.ended, self.said

    @property
    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def start_run(self) -> subprocess.CompletedProcess[str]:
        """Start a run as a second terminal would, after ``source .dev/env``."""
        said = ". .dev/env && celery -A tiny saga start twice '[21]' --id one --wait 30"
        fresh = {**self.environment(), "PATH": os.defpath}
        return subprocess.run(
            ["sh", "-c", said], cwd=self.folder, env=fresh, capture_output=True, text=True, check=False
        )

    def worker(self) -> psutil.Process:
        assert self.process is not None
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if "worker" in child.cmdline())

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[_Dev]:
    made = _Dev(tmp_path)
    yield made
    if made.process is not None and not made.ended:
        made.process.kill()
        made.process.wait()


def test_the_stack_comes_up_works_and_goes_and_keeps_its_data(dev: _Dev) -> None:
    dev.start()
    assert "source .dev/env" in dev.said and "saga start tiny.twice '[1]'" in dev.said
    assert (dev.folder / ".dev/env").stat().st_mode & 0o077 == 0
    assert dev.start_run().stdout.splitlines() == ["one", "completed: 42"]

    killed = dev.worker()
    os.kill(killed.pid, signal.SIGKILL)
    eventually(lambda: "worker ended by SIGKILL; it is started again" in dev.said)
    eventually(lambda: dev.said.count("ready.") == 2, 60)

    children = psutil.Process(dev.process.pid if dev.process else 0).children(recursive=True)
    assert dev.stop() == 0
    assert "Stopped. The data is kept in .dev/" in dev.said
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert list((dev.folder / ".dev").glob("beat*")) == [], "beat's memory is in Postgres"

    dev.start()
    assert dev.start_run().stdout.splitlines() == ["one", "completed: 42"]
    dev.stop()


def test_an_app_that_names_its_own_database_is_refused(dev: _Dev) -> None:
    (dev.folder / "tiny.py").write_text(
        _APP.replace("Orchestrator(app)", 'Orchestrator(app, database_url="postgresql://elsewhere/x")')
    )
    refused = subprocess.run(
        dev.command("dev"), cwd=dev.folder, env=dev.environment(), capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "the app passes database_url= to Orchestrator" in refused.stderr
