"""The stack under measurement: servers in a directory of their own, and for each side its workers and its client.

Owns every process that it starts, and ends those by their pid and no other.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import psutil
import psycopg
from psycopg import sql

from orchestrator import embedded, store

ROOT = Path(__file__).parents[1]
T = TypeVar("T")


class BenchmarkError(Exception):
    """Raised when a side does not do what it is asked for, or not in time."""


def until(condition: Callable[[], T], what: str, seconds: float = 60.0, *, every: float = 0.01) -> T:
    """Return what `condition`, asked `every` so many seconds, answers once it is true.  Raises: BenchmarkError."""
    give_up_at = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > give_up_at:
            raise BenchmarkError(f"{what}: not within {seconds:g} s")
        time.sleep(every)
    return found


class Worker:
    """A Celery worker with two children, its options otherwise untouched."""

    def __init__(self, module: str, queues: str, environment: dict[str, str], log: Path) -> None:
        self._command = [sys.executable, "-m", "celery", "-A", module, "worker", "--loglevel", "WARNING", "-c", "2"]
        self._command += ["-Q", queues, "-n", f"{log.stem}@%h"]
        self._environment, self.log = environment, log
        self.start()

    def start(self) -> None:
        """Start it; it may take a second until it takes work."""
        with self.log.open("ab") as sink:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, cwd=ROOT, env=self._environment
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """End it with all its processes, by SIGKILL."""
        doomed = tree(self.pid)
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(10.0)
        until(lambda: not any(_runs(process) for process in doomed), "the worker is gone")


class Client:
    """A client process, see `benchmarks.client`."""

    def __init__(self, module: str, environment: dict[str, str], log: Path) -> None:
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.client", module],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, cwd=ROOT, env=environment,
            )  # fmt: skip
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, load: str, **options: Any) -> Any:
        """Have a load done, and return what the client says of it.  Raises: BenchmarkError."""
        self.send(load, **options)
        return self.receive()

    def send(self, load: str, **options: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"load": load, **options}).encode() + b"\n")
        self._process.stdin.flush()

    def receive(self, seconds: float = 900.0) -> Any:
        """Wait for the answer to what was sent.  Raises: BenchmarkError."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else b""
        answer = json.loads(line or b'{"error": "no answer"}')
        if "error" in answer:
            raise BenchmarkError(f"{self._log.stem}: {answer['error']}; see {self._log}")
        return answer

    def stop(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Side:
    """One of those compared: an app, its workers, its client, and where its data are."""

    def __init__(self, module: str, name: str, workers: list[str], environment: dict[str, str], folder: Path) -> None:
        self.effects = folder / f"{name}.effects"
        self.database_url = environment.get("BENCH_DATABASE_URL", "")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("CELERY_", "ORCHESTRATOR_"))}
        environment = {**kept, **environment, "BENCH_EFFECTS": str(self.effects), "PYTHONPATH": str(ROOT)}
        environment["TMPDIR"] = str(folder)  # so that what killed workers leave behind goes with it
        self.workers = [
            Worker(module, queues, environment, folder / f"{name}-{number}.log")
            for number, queues in enumerate(workers)
        ]
        self.client = Client(module, environment, folder / f"{name}-client.log")

    def pids(self) -> list[int]:
        return [self.client.pid, *(worker.pid for worker in self.workers)]

    def marks(self) -> list[str]:
        """Return the lines of the effect log."""
        return self.effects.read_text().splitlines() if self.effects.exists() else []

    def stop(self) -> None:
        self.client.stop()
        for worker in self.workers:
            worker.kill()  # nothing that it would say at a warm shutdown is of interest


class Stack:
    """The servers, and sides made on them; each side has databases of its own."""

    def __init__(self, servers: embedded.Servers, folder: Path) -> None:
        self.servers, self._folder, self._number = servers, folder, 0

    @contextlib.contextmanager
    def engine(self, *workers: str) -> Iterator[Side]:
        """A fresh database, workers on these queues, and a client."""
        database_url = self._new_database()
        environment = {"BENCH_DATABASE_URL": database_url, "BENCH_BROKER_URL": self._valkey()}
        yield from self._side("benchmarks.engine", "engine", workers, environment)

    @contextlib.contextmanager
    def raw(self, *workers: str, acks_late: bool = False) -> Iterator[Side]:
        """Plain Celery on the same Valkey."""
        environment = {"BENCH_BROKER_URL": self._valkey(), "BENCH_RESULT_URL": self._valkey()}
        environment |= {"BENCH_ACKS_LATE": "1"} if acks_late else {}
        yield from self._side("benchmarks.raw", "raw", workers, environment)

    def _side(self, module: str, name: str, workers: tuple[str, ...], environment: dict[str, str]) -> Iterator[Side]:
        self._number += 1
        side = Side(module, f"{name}-{self._number}", list(workers) or ["celery"], environment, self._folder)
        try:
            yield side
        finally:
            side.stop()

    def _valkey(self) -> str:
        self._number += 1
        return urlsplit(self.servers.broker_url)._replace(path=f"/{self._number}").geturl()

    def _new_database(self) -> str:
        self._number += 1
        name = f"bench_{self._number}"
        with psycopg.connect(self.servers.database_url, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        url = urlsplit(self.servers.database_url)._replace(path=f"/{name}").geturl()
        store.migrate(url)
        return url


def _runs(process: psutil.Process) -> bool:
    """Tell whether it runs; one that has ended, but is not reaped yet, does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and all below it, those that have ended included."""
    total = 0.0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def memory_mb(pid: int) -> float:
    """Return the memory that a process and those below it have for themselves."""
    total = 0
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().uss
    return total / 1e6
