"""A worker of the app, its log, and whoever can write to its broker."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import redis

from tests.acceptance.running import until

ROOT = Path(__file__).parents[2]


class Site:
    """Where a worker runs: its database, its broker, its log."""

    def __init__(self, database_url: str, broker_url: str, log: Path, **environment: str) -> None:
        self.database_url = database_url
        self.broker = redis.Redis.from_url(broker_url)
        self.log = log
        self.environment = {
            **os.environ, "ORCHESTRATOR_DATABASE_URL": database_url, "CELERY_BROKER_URL": broker_url,
            "PYTHONPATH": str(ROOT), **environment,
        }  # fmt: skip
        self.process: subprocess.Popen[bytes]

    @contextmanager
    def worker(self, *options: str) -> Iterator[None]:
        command = [sys.executable, "-m", "celery", "-A", "tests.security.app", "worker", "-c", "1", "-l", "INFO"]
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                [*command, "--without-mingle", "-n", "security@here", *options], stdin=subprocess.DEVNULL, stdout=sink,
                stderr=sink, env=self.environment, cwd=ROOT,
            )  # fmt: skip
        try:
            until(lambda: " ready." in self.said, "the worker is ready", 60.0)
            yield
        finally:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.broker.close()

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def complaints(self) -> list[str]:
        """Return the lines of the log that a person would look at.

        Left out is that a doorbell reached a worker that was stopping: kombu puts it back for the next one.
        """
        marks = ("WARNING", "ERROR", "CRITICAL", "Traceback")
        lines = [line for line in self.said.splitlines() if "Requeuing undeliverable message" not in line]
        return [line for line in lines if any(mark in line for mark in marks)]

    def push(self, raw: dict[str, Any]) -> None:
        self.broker.lpush("celery", json.dumps(raw))

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            return connection.execute(query, values).fetchall()

    def runs(self) -> dict[str, str]:
        """Return every run's state by its id."""
        return dict(self.rows("SELECT id, state FROM orchestrator.runs"))

    def ended(self, run_id: str) -> str:
        """Wait for the end of a run and return its state."""
        query = "SELECT state FROM orchestrator.runs WHERE id = %s AND finished_at IS NOT NULL"
        return str(until(lambda: self.rows(query, run_id), f"the end of {run_id}", 60.0)[0][0])


def message(task: str, body: Any, task_id: str = "", **headers: Any) -> dict[str, Any]:
    """Return a message as kombu's Redis transport stores it; bytes are a body that is already encoded."""
    plain = body if isinstance(body, bytes) else json.dumps(body).encode()
    task_id = task_id or uuid.uuid4().hex
    return {
        "body": base64.b64encode(plain).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": task, "id": task_id, "retries": 0, **headers},
        "properties": {
            "correlation_id": task_id, "reply_to": "", "delivery_mode": 2, "priority": 0, "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "celery"}, "delivery_tag": uuid.uuid4().hex,
        },
    }  # fmt: skip
