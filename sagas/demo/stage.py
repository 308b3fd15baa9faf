"""Owns what the demo runs on: embedded servers, schemas, and a real Celery worker as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from orchestrator import embedded, store
from sagas.demo import workload
from tasks.database import create_tables, ledger_engine

PROVIDER_LATENCY_SECONDS = "0.02"


class WorkerDiedError(Exception):
    """Say that the worker ended though nobody asked it to, with the end of its log."""


class Worker:
    """A Celery worker with two pool children; it can be killed as a machine dies: all at once."""

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
                [*celery, "--concurrency", "2", "--hostname", "demo@%h", "--loglevel", "INFO"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Wait until the worker says that it is ready. Raises: WorkerDiedError."""
        while b"ready." not in self._log.read_bytes()[self._read_from :]:
            self.require_alive()
            time.sleep(0.05)

    def require_alive(self) -> None:
        """Raises: WorkerDiedError if the worker was started and has ended by itself."""
        code = self._process.poll() if self._process is not None else None
        if code is not None:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise WorkerDiedError(
                f"The worker ended by itself with code {code}. The end of {self._log}:\n{tail}"
            )

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
    """Hold what is up while the demo runs."""

    servers: embedded.Servers
    engine: Engine
    worker: Worker
    effect_log: Path

    def clear(self) -> None:
        """Stop worker and servers."""
        self.worker.stop()
        self.engine.dispose()
        self.servers.stop()


def start_servers(data_dir: Path) -> embedded.Servers:
    """Start a fresh Postgres and Valkey, and name them in the environment, where app and worker find them."""
    data_dir.mkdir(parents=True, exist_ok=True)
    for log in ("worker.log", "effects.log"):
        (data_dir / log).unlink(missing_ok=True)
    (data_dir / "effects.log").touch()
    servers = embedded.start(data_dir, fresh=True)
    os.environ |= {
        "ORCHESTRATOR_DATABASE_URL": servers.database_url,
        "LEDGER_DATABASE_URL": servers.database_url,
        "CELERY_BROKER_URL": servers.broker_url,
        "EFFECT_LOG": str((data_dir / "effects.log").resolve()),
        "PROVIDER_LATENCY_SECONDS": PROVIDER_LATENCY_SECONDS,
    }
    return servers


def set_up(servers: embedded.Servers) -> Engine:
    """Migrate the orchestrator's schema and open the books; return an engine for the demo's own reads."""
    store.migrate(servers.database_url)
    engine = ledger_engine()
    create_tables(engine)
    with engine.begin() as conn:
        workload.open_books(conn)
    workload.fill_shelves()
    return engine
