"""A companion as a process of its own, told what a worker tells it."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import redis
from celery import Celery
from celery.concurrency.prefork import TaskPool

from orchestrator import saga
from orchestrator.celery.companion import Config
from orchestrator.celery.doorbell import connection_options
from orchestrator.celery.worker import CompanionStep
from orchestrator.client import Client
from orchestrator.errors import StoreUnavailableError
from orchestrator.settings import Settings
from tests.acceptance.running import until


@saga.define(name="companion.waiting")
async def waiting() -> None: ...


def _config(settings: Settings, broker: dict[str, Any], folder: Path) -> Config:
    (folder / "run").mkdir()
    return Config.of(
        settings, broker=broker, socket=str(folder / "run" / "companion"), node="companion@here", pid=os.getpid(),
        queues=["kept"], targets=[waiting.target], slots=1,
    )  # fmt: skip


def test_a_role_that_may_not_write_ends_a_worker_at_its_start_with_a_sentence(
    database_url: str, broker_url: str, tmp_path: Path
) -> None:
    """It was a traceback, and that "the companion did not start within 20 s"."""
    role = f"reader_{uuid.uuid4().hex}"
    with psycopg.connect(database_url, autocommit=True) as sql:
        sql.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'r'")
        sql.execute(f"GRANT USAGE ON SCHEMA orchestrator TO {role}")
        sql.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA orchestrator TO {role}")
        try:
            url = database_url.replace(database_url.partition("//")[2].partition("@")[0], f"{role}:r")
            with Celery("companion", broker=broker_url, set_as_current=False) as app:
                broker = connection_options(app)
            step = CompanionStep(SimpleNamespace(app=app, pool_cls=TaskPool, time_limit=None, soft_time_limit=None))
            step._config = _config(Settings.from_environment({}, database_url=url), broker, tmp_path)
            with pytest.raises(StoreUnavailableError, match="Postgres refuses: permission denied"):
                step._spawn()
            assert step._process is not None and step._process.stdin is not None and step._process.stdout is not None
            assert step._process.wait(20.0)
            step._process.stdin.close()
            step._process.stdout.close()
        finally:
            sql.execute(f"DROP OWNED BY {role}")
            sql.execute(f"DROP ROLE {role}")


def test_it_reaches_the_broker_by_the_options_that_the_worker_has(
    database_url: str, broker_url: str, tmp_path: Path
) -> None:
    """The keys of those for keepalive are numbers."""
    settings = Settings.from_environment({}, database_url=database_url)
    with Celery("companion", broker=broker_url, set_as_current=False) as app:
        keepalive = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPCNT: 3}
        app.conf.broker_transport_options = {"socket_keepalive": True, "socket_keepalive_options": keepalive}
        broker = connection_options(app)
    step = CompanionStep(SimpleNamespace(app=app, pool_cls=TaskPool, time_limit=None, soft_time_limit=None))
    step._config = _config(settings, broker, tmp_path)
    step._spawn()
    assert step._process is not None and step._process.stdin is not None and step._process.stdout is not None
    client = Client(settings, lambda *_: None, lambda: "celery")
    try:
        client.start(waiting, (), {}, {"queue": "kept"})
        with redis.Redis.from_url(broker_url) as messages:
            until(lambda: messages.llen("kept"), "it rings for what is due", 20.0)
    finally:
        client.pool.close()
        step._process.stdin.close()
        assert step._process.wait(20.0) == 0
        step._process.stdout.close()
