"""An app, a database of its own, a worker, and the command line as a function."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import psycopg
import pytest
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result
from psycopg import sql

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


def _import_shop() -> Any:
    """Import the app without taking the steps and sagas of other tests' apps over."""
    from orchestrator import saga as saga_module
    from orchestrator import step as _
    from orchestrator.step import registry as steps

    assert _
    step_module = sys.modules["orchestrator.step"]
    sagas = saga_module.registry
    starters = {saga: saga.starter for saga in sagas.sagas.values()}
    bound = {step: step.bound for step in steps.steps.values()}
    router = step_module._router
    from tests.cli import shop

    for saga, starter in starters.items():
        saga.starter = starter
    for step, task in bound.items():
        step.bound = task
    step_module.set_router(router)
    sagas._listeners.pop()
    steps._listeners.pop()
    return shop


@pytest.fixture(autouse=True)
def only_the_shop(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command line see the sagas of its own app, not those that other tests have declared in this process."""
    registry = sys.modules["orchestrator.saga"].registry
    mine = {key: saga for key, saga in registry.sagas.items() if saga.__module__.startswith("tests.cli")}
    monkeypatch.setattr(registry, "sagas", mine)


@pytest.fixture(scope="session")
def shop() -> Any:
    """The app's module."""
    return sys.modules.get("tests.cli.shop") or _import_shop()


def eventually(look: Callable[[], T], seconds: float = 60.0) -> T:
    """Return what `look` answers once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds} s; at last {found!r}"
        time.sleep(0.02)
    return found


@dataclass(frozen=True)
class Terminal:
    """The command line of an app on one database."""

    shop: Any
    database_url: str
    broker_url: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to work on this database."""
        return {"ORCHESTRATOR_DATABASE_URL": self.database_url, "CELERY_BROKER_URL": self.broker_url}

    def run(self, *arguments: str, columns: int = 80) -> Result:
        """Run ``saga <arguments>`` as a person with a terminal of that width would."""
        from orchestrator.cli import saga

        environment = {**self.environment, "COLUMNS": str(columns)}
        context = CLIContext(self.shop.app, no_color=False, workdir=None)
        return CliRunner(env=environment).invoke(saga, list(arguments), obj=context)

    def ok(self, *arguments: str) -> str:
        """Run a command that succeeds; returns what it printed."""
        result = self.run(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *arguments: str) -> Any:
        """Run a command that succeeds with --json; returns what it printed."""
        return json.loads(self.ok(*arguments, "--json"))

    def start(self, saga: str, order: str, *options: str) -> str:
        """Start a run on an order; returns its id."""
        return self.ok("start", saga, json.dumps([{"id": order}]), *options).strip()

    def until(self, run_id: str, *states: str) -> dict[str, Any]:
        """Wait until a run is in one of these states; returns what ``show`` tells."""

        def look() -> dict[str, Any] | None:
            found: dict[str, Any] = self.json("show", run_id)
            return found if found["state"] in states else None

        try:
            found = eventually(look)
        except AssertionError as error:
            raise AssertionError(f"{self.ok('show', run_id)}\n{self.ok('explain', run_id)}") from error
        assert found is not None
        return found


@pytest.fixture
def on(shop: Any) -> Iterator[Callable[[str, str], Terminal]]:
    """Point the app to a database and a broker."""

    def point(database_url: str, broker_url: str) -> Terminal:
        for known in ("settings", "client", "bell"):
            shop.orchestrator.__dict__.pop(known, None)
        shop.orchestrator._overrides["database_url"] = database_url
        shop.app.conf.broker_url = broker_url
        return Terminal(shop, database_url, broker_url)

    yield point
    client = shop.orchestrator.__dict__.get("client")
    if client is not None:
        client.pool.close()


@pytest.fixture
def terminal(on: Callable[[str, str], Terminal], database_url: str, broker_url: str) -> Terminal:
    """A command line on a fresh database, without any worker."""
    return on(database_url, broker_url)


@pytest.fixture(scope="session")
def _worked(
    request: pytest.FixtureRequest, _postgres_url: str, _template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """A database and a broker with a worker that lives to the end."""
    name = f"cli_{uuid.uuid4().hex}"
    with psycopg.connect(_postgres_url, autocommit=True) as connection:
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        connection.execute(statement.format(sql.Identifier(name), sql.Identifier(_template)))
    database_url = urlsplit(_postgres_url)._replace(path=f"/{name}").geturl()
    broker_url = os.environ.get("ORCHESTRATOR_TEST_BROKER_URL")
    if not broker_url:  # a database of its own: another worker on the same queue would answer its doorbells
        broker_url = urlsplit(request.getfixturevalue("servers").broker_url)._replace(path="/250").geturl()
    environment = {
        **os.environ, "ORCHESTRATOR_DATABASE_URL": database_url, "CELERY_BROKER_URL": broker_url,
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    options = ["worker", "--concurrency", "1", "--hostname", "w@here", "--loglevel", "INFO"]
    command = [sys.executable, "-m", "celery", "-A", "tests.cli.shop", *options]
    log = tmp_path_factory.mktemp("worker") / "log"
    with log.open("w") as output:
        worker = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        eventually(lambda: " ready." in log.read_text(), seconds=60)
        yield database_url, broker_url
    except AssertionError as error:
        raise AssertionError(log.read_text()) from error
    finally:
        worker.terminate()
        worker.wait(20)


@pytest.fixture
def worked(on: Callable[[str, str], Terminal], _worked: tuple[str, str]) -> Terminal:
    """A command line on a database with a worker."""
    return on(*_worked)
