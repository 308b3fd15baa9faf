"""Owns the end of servers that outlived a killed process. It must only run under the directory's lock."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from typing import Any

import psutil

from orchestrator.embedded.place import Place
from orchestrator.embedded.postgres import postmaster_pid

_SHUTDOWN_SECONDS = 10.0


def stop_leftovers(place: Place) -> None:
    """Stop the servers of a process that was killed; the lock is ours, so nobody else uses them."""
    leader = postmaster_pid(place)
    found = [*_running_in(place.postgres, "postgres"), *_running_in(place.valkey, "valkey-server")]
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "valkey-server":
                process.terminate()
            elif process.pid == leader:  # never its children: to some of them SIGINT means something else
                process.send_signal(signal.SIGINT)
    for process in _still_alive_after(_SHUTDOWN_SECONDS, found):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _still_alive_after(_SHUTDOWN_SECONDS, found)
    # Its number may belong to somebody else by now, which would keep Postgres from starting.
    (place.postgres / "postmaster.pid").unlink(missing_ok=True)


def _still_alive_after(seconds: float, processes: list[Any]) -> list[Any]:
    give_up_at = time.monotonic() + seconds
    while (alive := [process for process in processes if _is_alive(process)]) and time.monotonic() < give_up_at:
        time.sleep(0.01)
    return alive


def _is_alive(process: Any) -> bool:
    """Say if it runs; one that has ended but that nobody reaps (it is not our child) does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _running_in(directory: Path, name: str) -> list[Any]:
    """Find processes by working directory: each server's is its data directory, its children's too."""
    named = (process for process in psutil.process_iter(["name"]) if process.info["name"] == name)
    return [process for process in named if _working_directory(process) == str(directory)]


def _working_directory(process: Any) -> str | None:
    try:
        return str(process.cwd()).removesuffix(" (deleted)")
    except psutil.Error:
        return None
