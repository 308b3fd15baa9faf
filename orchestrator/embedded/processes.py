"""Owns the servers as processes: their start, their end with ours, and their end before ours."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.embedded.place import EmbeddedError

_STARTUP_SECONDS = 30.0
_SHUTDOWN_SECONDS = 10.0

# Reads until the pipe to the process that started the servers closes, which it does however that one ends.
_WATCH = 'read -r _; kill -INT "$1"; kill -TERM "$2"'


class Processes:
    """The servers as processes, the watcher that outlives us by a moment, and the lock."""

    def __init__(self, lock: int) -> None:
        self._lock: int | None = lock
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        self._watcher: subprocess.Popen[bytes] | None = None

    def pid(self, server: str) -> int:
        return self._servers[server].pid

    def run(self, server: str, command: list[str], log: Path, **options: Any) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            self._servers[server] = process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the process that started us; it calls stop()
                **options,
            )
        return process

    def watch(self, postgres: subprocess.Popen[bytes], valkey: subprocess.Popen[bytes]) -> None:
        """End the servers when this process ends, whatever ends it; an earlier watch is over."""
        self._unwatch()
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "watch", str(postgres.pid), str(valkey.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _unwatch(self) -> None:
        if self._watcher is not None and self._watcher.stdin is not None:
            self._watcher.kill()  # before the pids that it knows are free for others
            self._watcher.wait()
            self._watcher.stdin.close()
            self._watcher = None

    def stop(self) -> None:
        self._unwatch()
        for server, process in self._servers.items():
            process.send_signal(signal.SIGINT if server == "postgres" else signal.SIGTERM)
        for process in self._servers.values():
            _await_end(process)
        self._servers.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _await_end(process: subprocess.Popen[bytes]) -> None:
    for next_signal in (signal.SIGQUIT, signal.SIGKILL):
        try:
            process.wait(_SHUTDOWN_SECONDS)
            return
        except subprocess.TimeoutExpired:
            process.send_signal(next_signal)
    process.wait()


def await_start(process: subprocess.Popen[bytes], ready: Callable[[], bool], log: Path) -> None:
    give_up_at = time.monotonic() + _STARTUP_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > give_up_at:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            raise EmbeddedError(
                f"The embedded {log.stem} did not start (start with fresh=True to throw its data away). "
                f"The end of {log}:\n{tail}"
            )
        time.sleep(0.01)
