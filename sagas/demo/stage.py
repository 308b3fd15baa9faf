"""Owns what the demo runs on: servers, the outside world, schemas, and a real Celery worker, each a process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, text

from orchestrator import embedded, store
from sagas.demo import promises, world
from tasks.database import create_tables, ledger_engine
from tasks.outside.process import Process

CHILDREN = 3  # one of them trains for a while


class WorkerDiedError(Exception):
    """Say that the worker ended though nobody asked it to, with the end of its log."""


class Worker:
    """A Celery worker with its pool children; it can be killed as a machine dies: all at once."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._read_from = 0

    def start(self) -> None:
        """Start the worker, without waiting until it is ready."""
        self._read_from = self._log.stat().st_size if self._log.exists() else 0
        celery = [sys.executable, "-m", "celery", "-A", "tasks.app", "worker"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*celery, "--concurrency", str(CHILDREN), "--hostname", "demo@%h", "--loglevel", "INFO"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def is_ready(self) -> bool:
        """Tell whether the worker has said since its start that it is ready."""
        return b"ready." in self._log.read_bytes()[self._read_from :]

    def wait_until_ready(self) -> None:
        """Wait until the worker says that it is ready. Raises: WorkerDiedError."""
        while not self.is_ready:
            self.require_alive()
            time.sleep(0.05)

    def require_alive(self) -> None:
        """Raises: WorkerDiedError if the worker was started and has ended by itself."""
        code = self._process.poll() if self._process is not None else None
        if code is not None:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise WorkerDiedError(f"The worker ended by itself with code {code}. The end of {self._log}:\n{tail}")

    def kill(self) -> None:
        """Send SIGKILL to the worker and everything it started."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Stop the worker as a deploy does, finishing what it has begun."""
        self._end(signal.SIGTERM, only_main=True)

    def _end(self, number: signal.Signals, *, only_main: bool = False) -> None:
        if self._process is None:
            return
        if only_main:
            self._process.send_signal(number)
        else:
            os.killpg(self._process.pid, number)
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None


@dataclass(frozen=True, slots=True)
class Stage:
    """Hold what the demo works with while it runs."""

    engine: Engine
    worker: Worker
    outside: Process
    outside_log: Path
    models: Path


@contextmanager
def opened(data_dir: Path, tell: Callable[[str, str], None]) -> Iterator[Stage]:
    """Start everything on this directory, ``tell`` of each thing (what, details), and stop it all at the end.

    Raises: EmbeddedError, WorkerDiedError.
    """
    with ExitStack() as stack:
        watch = _Stopwatch()
        servers = _start_servers(data_dir)
        stack.callback(servers.stop)
        tell("Postgres and Valkey are up", f"{watch.lap()}, {data_dir}/")
        outside_log = data_dir / "outside.jsonl"
        outside = stack.enter_context(Process(outside_log))
        os.environ["OUTSIDE_URL"] = outside.url
        world.switch_faults_on(outside.url)
        tell(
            "The outside world is up", f"{watch.lap()}, {outside.url}, {len(world.FAULTS)} kinds of trouble switched on"
        )
        engine = ledger_engine()
        stack.callback(engine.dispose)
        _set_up(servers, engine)
        accounts = len(world.NAMES) * len(world.OPENING)
        tell("Schemas migrated, books open", f"{watch.lap()}, {accounts} accounts of customers")
        worker = Worker(data_dir / "worker.log")
        stack.callback(worker.stop)
        worker.start()
        worker.wait_until_ready()
        tell(f"Worker started, {CHILDREN} processes", f"{watch.lap()}, log: {data_dir}/worker.log")
        yield Stage(engine, worker, outside, outside_log, Path(os.environ["MODELS_DIR"]))


class _Stopwatch:
    def __init__(self) -> None:
        self._since = time.monotonic()

    def lap(self) -> str:
        now = time.monotonic()
        took, self._since = now - self._since, now
        return f"{took:.1f} s"


def _start_servers(data_dir: Path) -> embedded.Servers:
    """Start a fresh Postgres and Valkey, and name them in the environment, where app and worker find them."""
    data_dir.mkdir(parents=True, exist_ok=True)
    for left in ("worker.log", "outside.jsonl"):
        (data_dir / left).unlink(missing_ok=True)
    for left in ("models", "reports"):
        shutil.rmtree(data_dir / left, ignore_errors=True)
    servers = embedded.start(data_dir, fresh=True)
    os.environ |= {
        "ORCHESTRATOR_DATABASE_URL": servers.database_url,
        "LEDGER_DATABASE_URL": servers.database_url,
        "CELERY_BROKER_URL": servers.broker_url,
        "MODELS_DIR": str(data_dir.resolve() / "models"),
        "REPORTS_DIR": str(data_dir.resolve() / "reports"),
    }
    return servers


def _set_up(servers: embedded.Servers, engine: Engine) -> None:
    store.migrate(servers.database_url)
    create_tables(engine)
    with engine.begin() as conn:
        world.open_books(conn)
        conn.execute(text(promises.SCHEMA))
