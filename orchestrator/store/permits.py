"""Permits for database connections, shared by the processes of one worker.

Owns how many connections a worker holds at most.  A permit is a lock on a file, so that the kernel takes it back from a
process that dies.  Must never wait without a bound.
"""

from __future__ import annotations

import fcntl
import os
import random
import time
from pathlib import Path

from orchestrator.errors import StoreUnavailableError


class Permits:
    """`count` permits of one `kind` in a folder that the worker's processes share."""

    def __init__(self, folder: Path, kind: str, count: int) -> None:
        self._paths = [folder / f"{kind}-{number}" for number in range(count)]
        self._kind = kind

    def take(self, timeout_s: float = 10.0) -> Permit:
        """Take a permit.  Raises: StoreUnavailableError after `timeout_s`."""
        until, pause = time.monotonic() + timeout_s, 0.002
        while True:
            for path in random.sample(self._paths, len(self._paths)):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return Permit(descriptor)
                except BlockingIOError:
                    os.close(descriptor)
            if time.monotonic() > until:
                raise StoreUnavailableError(
                    f"all {len(self._paths)} {self._kind} database connections of this worker were in use for "
                    f"{timeout_s:g} s; raise ORCHESTRATOR_MAX_CONNECTIONS or lower the worker's concurrency"
                )
            time.sleep(pause)
            pause = min(pause * 2, 0.05)


class Permit:
    """A permit that is held until it is given back or its process ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def give_back(self) -> None:
        """Give it back; a second time does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
