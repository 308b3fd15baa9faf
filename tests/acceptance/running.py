"""Worker processes, and waiting for conditions.

Owns the processes that it starts; ends no other.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


def until(condition: Callable[[], T], what: str, seconds: float = 60.0) -> T:
    """Return what `condition` answers once it is true."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s; at last {found!r}")
        time.sleep(0.01)


@dataclass(frozen=True)
class Effect:
    """One line of the file to which steps append what they do to the world."""

    run: str
    what: str
    name: str
    attempt: int
    key: str
    pid: int
    told: Any = None

    def __str__(self) -> str:
        return f"{self.what} {self.name}"


class World:
    """The world outside of the database: a file of effects, and gates at which steps wait."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "effects"
        self.file.touch()

    def effects(self, run: Any = None) -> list[Effect]:
        """Return what happened, in order; of one run, if it is given."""
        all_of_it = [Effect(**json.loads(line)) for line in self.file.read_text().splitlines()]
        return [effect for effect in all_of_it if run is None or effect.run == str(run)]

    def told(self, run: Any) -> list[str]:
        """Return the effects of a run as words."""
        return [str(effect) for effect in self.effects(run)]

    def open(self, gate: str) -> None:
        """Let the steps go on that wait at `gate`."""
        (self.folder / f"gate {gate}").touch()

    def until_at(self, run: Any, what: str, attempt: int = 1) -> Effect:
        """Wait until a step of `run` says that it is in the middle of `what`."""
        return until(
            lambda: next((e for e in self.effects(run) if str(e) == what and e.attempt == attempt), None),
            f"{what} of {run}",
        )


class Worker:
    """A real worker on a queue of its own, in a process group of its own."""

    def __init__(
        self,
        queue: str,
        log: Path,
        environment: dict[str, str],
        *options: str,
        app: str = "tests.acceptance.app",
        name: str = "",
    ) -> None:
        self.queue = queue
        self.log = log
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "-c", "2", "-Q", queue]
        command += ["-n", f"{name or queue}@{app.split('.')[1]}", "-l", "INFO"]
        self._command = [*command, "--without-gossip", "--without-mingle", "--without-heartbeat", *options]
        self._environment = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self, **environment: str) -> Worker:
        """Start the process without waiting for it."""
        with self.log.open("ab") as sink:
            self._begins_at = sink.tell()
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, cwd=ROOT,
                env={**self._environment, **environment},
            )  # fmt: skip
        return self

    def start(self, **environment: str) -> Worker:
        """Start the process and wait until it takes work."""
        self.launch(**environment)
        self.until_ready()
        return self

    def until_ready(self) -> None:
        """Wait until it takes work."""
        until(lambda: re.search(r" ready\.$", self.said, re.M) or not self.is_alive, "the worker is ready", 180.0)
        assert self.is_alive, self.said

    @property
    def said(self) -> str:
        """What it has logged since it was started last."""
        with self.log.open("rb") as file:
            file.seek(self._begins_at)
            return file.read().decode(errors="replace")

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """End the main process as the kernel's out-of-memory killer does; its children die with it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10.0)

    def stop(self) -> int:
        """Shut it down warmly; returns the exit code."""
        assert self.process is not None
        if self.is_alive:
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(15.0)
        self.kill()
        return -9
