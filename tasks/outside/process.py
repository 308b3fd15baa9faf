"""Owns the outside world as a process of its own, which ends with whoever started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType


class Process:
    """A server that runs until `stop`, or until the process that started it is gone."""

    def __init__(self, log: Path) -> None:
        # It reads its standard input and ends with it, however its parent ends; its first line says where it is.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tasks.outside", str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for our parent
            text=True,
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError(f"The outside world did not start; it ended with code {self._process.wait()}.")

    @property
    def pid(self) -> int:
        """Return the process's id."""
        return self._process.pid

    def stop(self) -> None:
        """End it, and wait until it has."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
