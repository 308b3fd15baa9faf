"""Child processes of ``dev``: their lines with a prefix, their restart when they die, their end with ours.

Owns processes that it started.  Must never end any other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Say = Callable[[str, str], None]
_QUICK_S = 5.0  # a child that ends sooner has failed to start
_FAILURES = 3
# Reads until the pipe to the process that started the children closes, which it does however that one ends.
_WATCH = 'read -r _; kill -TERM "$@"'


@dataclass(slots=True)
class Child:
    """A program that is kept running; `required` says that without it nothing else makes sense."""

    name: str
    command: Sequence[str]
    required: bool = False
    process: subprocess.Popen[str] | None = None
    started_at: float = 0.0
    failures: int = 0
    given_up: bool = False
    reader: threading.Thread | None = None
    watcher: subprocess.Popen[bytes] | None = None
    restart_at: float = field(default=0.0)


class Children:
    """Starts children, passes their lines on, starts them again, stops them in reverse order."""

    def __init__(self, environment: Mapping[str, str], say: Say) -> None:
        self._environment = dict(environment)
        self._say = say
        self._children: list[Child] = []

    def start(self, child: Child) -> None:
        """Start a child and keep it."""
        self._children.append(child)
        self._spawn(child)

    def _spawn(self, child: Child) -> None:
        child.process = subprocess.Popen(
            child.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=self._environment, start_new_session=True,
        )  # fmt: skip
        child.started_at = time.monotonic()
        child.watcher = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "watch", str(child.process.pid)],
            stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        child.reader = threading.Thread(target=self._read, args=(child, child.process), daemon=True)
        child.reader.start()

    def _read(self, child: Child, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                self._say(child.name, line.rstrip())

    def look(self) -> bool:
        """Start again what has died; False if something required cannot be kept running."""
        for child in self._children:
            if child.given_up or child.process is None or child.process.poll() is None:
                continue
            if child.restart_at == 0.0:
                self._note_death(child, child.process.returncode)
                if child.given_up and child.required:
                    return False
            elif time.monotonic() >= child.restart_at:
                child.restart_at = 0.0
                self._spawn(child)
        return True

    def _note_death(self, child: Child, code: int) -> None:
        quick = time.monotonic() - child.started_at < _QUICK_S
        child.failures = child.failures + 1 if quick else 0
        _release(child)
        if child.failures >= _FAILURES:
            child.given_up = True
            self._say("dev", f"{child.name} ended {_FAILURES} times right after its start; it is not started again")
            return
        self._say("dev", f"{child.name} ended {_how(code)}; it is started again")
        child.restart_at = time.monotonic() + 1.0

    def stop(self, patience_s: float = 10.0) -> None:
        """Ask all to end, the last started first to be asked; kill what has not ended in time."""
        running = [child for child in reversed(self._children) if child.process and child.process.poll() is None]
        for child in running:
            _signal(child, signal.SIGTERM)
        until = time.monotonic() + patience_s
        try:
            for child in running:
                assert child.process is not None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, until - time.monotonic()))
        finally:
            for child in self._children:
                self._end(child)

    def _end(self, child: Child) -> None:
        if child.process is not None and child.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)  # it leads its own group
            child.process.wait()
        _release(child)
        if child.reader is not None:
            child.reader.join(1.0)


def _signal(child: Child, number: int) -> None:
    assert child.process is not None
    with contextlib.suppress(ProcessLookupError):
        child.process.send_signal(number)


def _release(child: Child) -> None:
    """End the watcher of a process that has ended, before its pid can belong to somebody else."""
    watcher, child.watcher = child.watcher, None
    if watcher is not None and watcher.stdin is not None:
        watcher.kill()
        watcher.wait()
        watcher.stdin.close()


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
