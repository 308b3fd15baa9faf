"""Passwords of database and broker show nowhere: in no log, error, repr, process list, broker, journal."""

from __future__ import annotations

import copy
import json
import os
import pickle
import secrets
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import psutil
import psycopg
import pytest
import redis
from celery import Celery
from psycopg import sql

from orchestrator import Orchestrator, StoreUnavailableError, store
from orchestrator.celery.companion import Config
from orchestrator.celery.doorbell import Bell, connection_options
from orchestrator.client import Client
from orchestrator.engine.drain import Drainer
from orchestrator.settings import Settings
from orchestrator.store.connection import TransactionFailed, open_connection
from orchestrator.store.pool import ClientPool
from orchestrator.store.transaction import Transactions
from tests.acceptance.running import until
from tests.engine.stage import Child
from tests.proof.secrecy import disguises
from tests.security.worker import Site, message

ROOT = Path(__file__).parents[2]


def shows(text: str | bytes, *passwords: str) -> bool:
    """Tell whether a password is in a text, in any of the forms in which it may hide there."""
    raw = text.encode(errors="replace") if isinstance(text, str) else text
    return any(form in raw for password in passwords for form in disguises(password))


@contextmanager
def database_with_password(url: str, password: str) -> Iterator[str]:
    """A login of its own for a database; its password is in no other URL."""
    role = f"secret_{secrets.token_hex(8)}"
    with psycopg.connect(url, autocommit=True) as server:
        server.execute(
            sql.SQL("CREATE ROLE {} SUPERUSER LOGIN PASSWORD {}").format(sql.Identifier(role), sql.Literal(password))
        )
        parts = urlsplit(url)
        yield parts._replace(netloc=f"{role}:{quote(password, safe='')}@{parts.hostname}:{parts.port}").geturl()
        server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [role])
        server.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


@contextmanager
def broker_with_password(url: str, password: str) -> Iterator[str]:
    """A login of its own for a broker."""
    user = f"secret_{secrets.token_hex(8)}"
    with redis.Redis.from_url(url) as admin:
        admin.acl_setuser(
            user, enabled=True, passwords=[f"+{password}"], keys=["*"], channels=["*"], categories=["+@all"]
        )
        parts = urlsplit(url)
        yield parts._replace(netloc=f"{user}:{quote(password, safe='')}@{parts.hostname}:{parts.port}").geturl()
        admin.acl_deluser(user)


@pytest.fixture
def of_database(database_url: str) -> Iterator[tuple[str, str]]:
    password = f"db {secrets.token_hex(12)}/@"
    with database_with_password(database_url, password) as url:
        yield url, password


@pytest.fixture
def of_broker(broker_url: str) -> Iterator[tuple[str, str]]:
    password = f"broker-{secrets.token_hex(12)}/@"
    with broker_with_password(broker_url, password) as url:
        yield url, password


def everything_in(database_url: str) -> str:
    """Return all rows of all our tables as text."""
    with psycopg.connect(database_url) as connection:
        names = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'orchestrator'").fetchall()
        queries = [sql.SQL("SELECT t::text FROM orchestrator.{} t").format(sql.Identifier(name)) for (name,) in names]
        return "\n".join(str(row) for query in queries for row in connection.execute(query).fetchall())


def everything_at(broker_url: str) -> bytes:
    """Return all that a Redis or Valkey database holds."""
    with redis.Redis.from_url(broker_url) as client:
        return b"".join(client.dump(key) or b"" for key in client.keys("*"))


def processes_of(pid: int) -> list[psutil.Process]:
    main = psutil.Process(pid)
    return [main, *main.children(recursive=True)]


def test_a_worker_and_its_companion_keep_the_passwords_to_themselves(
    of_database: tuple[str, str], of_broker: tuple[str, str], tmp_path: Path
) -> None:
    """At the most talkative log level, with runs that end well and not, and with the database gone for a while."""
    (database_url, word), (broker_url, other) = of_database, of_broker
    site = Site(database_url, broker_url, tmp_path / "log")
    with site.worker("-l", "DEBUG", "-E"):
        site.push(message("security.repeat", [["good"], {}, {}], task_id="good"))
        site.push(message("security.repeat", [["refuse"], {}, {}], task_id="refuse"))
        assert (site.ended("good"), site.ended("refuse")) == ("completed", "failed")
        lines = [" ".join(process.cmdline()) for process in processes_of(site.process.pid)]
        assert any("orchestrator.celery.companion" in line for line in lines), "the companion is among them"
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("ALTER ROLE CURRENT_USER NOLOGIN")
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                "AND usename = current_user"
            )
            until(lambda: "cannot be reached" in site.said, "the worker complains")
            connection.execute("ALTER ROLE CURRENT_USER LOGIN")
        site.push(message("security.repeat", [["again"], {}, {}], task_id="again"))
        assert site.ended("again") == "completed"
    for name, text in (("log", site.said), ("process list", "\n".join(lines)), ("rows", everything_in(database_url)),
                       ("broker", everything_at(broker_url))):  # fmt: skip
        assert text and not shows(text, word, other), name


def test_what_people_print_shows_no_password(of_database: tuple[str, str], of_broker: tuple[str, str]) -> None:
    (database_url, word), (broker_url, other) = of_database, of_broker
    app = Celery("printed", broker=broker_url, set_as_current=False)
    settings = Settings.from_environment({}, database_url=database_url)
    client = Client(settings, lambda *_: None, lambda: "celery")
    options = connection_options(app)
    nothing: dict[str, Any] = dict.fromkeys(field.name for field in fields(Config))
    config = Config(**{**nothing, "dsn": settings.dsn, "broker": options})
    child = Child(database_url)
    shown: list[Any] = [
        settings, copy.copy(settings), client, client.pool, client.handle(None, "run"), Bell(options), config,
        Transactions(settings.sqlalchemy_url), ClientPool(settings.dsn, 1), child.drainer, child.drainer._worker,
        child.connection, Drainer, settings.model_dump(), pickle.loads(pickle.dumps(settings)),
    ]  # fmt: skip
    child.close()
    client.pool.close()
    odd = [type(each).__name__ for each in shown for text in (repr(each), str(each)) if shows(text, word, other)]
    assert odd == []


def _refused(what: Callable[[str], Any], url: str) -> str:
    """Return all that a failure to connect would print, its causes as well."""
    with pytest.raises((StoreUnavailableError, TransactionFailed)) as caught:
        what(url)
    return "".join(traceback.format_exception(caught.value)) + repr(caught.value)


@pytest.mark.parametrize("wrong", ["port", "host", "password", "database"])
def test_errors_show_no_password(wrong: str, database_url: str) -> None:
    word = f"wrong {secrets.token_hex(12)}"
    parts = urlsplit(database_url)
    host, port = ("127.0.0.1", 1) if wrong == "port" else (parts.hostname, parts.port)
    host = "nowhere.invalid" if wrong == "host" else host
    path = "/none" if wrong == "database" else parts.path
    url = parts._replace(netloc=f"{parts.username}:{quote(word)}@{host}:{port}", path=path).geturl()
    settings = Settings.from_environment({}, database_url=url)

    def transaction(url: str) -> None:
        Transactions(settings.sqlalchemy_url).run(False, timedelta(seconds=1), lambda c: None, lambda c, v: True)

    def client(url: str) -> None:
        Client(settings, lambda *_: None, lambda: "celery").outcome("run")

    for what in (store.migrate, client, transaction, lambda url: open_connection(settings.dsn, name="test")):
        assert not shows(_refused(what, url), word)


def test_the_command_line_shows_no_password(of_database: tuple[str, str], tmp_path: Path) -> None:
    """With a database that answers, and with one that does not."""
    url, word = of_database
    nowhere = urlsplit(url)._replace(path="/none").geturl()
    commands = [["list"], ["show", "run"], ["explain", "run"], ["migrate"], ["start", "security.repeat", '["x"]']]
    said = ""
    for database in (url, nowhere):
        environment = {**os.environ, "ORCHESTRATOR_DATABASE_URL": database, "PYTHONPATH": str(ROOT)}
        for arguments in (["tests.security.commands"], ["celery", "-A", "tests.security.app", "saga", "list"]):
            done = subprocess.run(
                [sys.executable, "-m", *arguments], input=json.dumps(commands).encode(), cwd=ROOT, env=environment,
                capture_output=True, timeout=60,
            )  # fmt: skip
            said += done.stdout.decode() + done.stderr.decode()
    assert "cannot be reached" in said
    assert not shows(said, word)


def test_nobody_else_may_speak_to_a_companion(database_url: str, broker_url: str, tmp_path: Path) -> None:
    """Its folder and its socket belong to the account of the worker alone."""
    site = Site(database_url, broker_url, tmp_path / "log", TMPDIR=str(tmp_path))
    with site.worker():
        folders = [path for path in tmp_path.iterdir() if path.name.startswith("orchestrator-")]
        assert len(folders) == 1
        assert folders[0].stat().st_mode & 0o077 == 0
        assert (folders[0] / "companion").stat().st_mode & 0o077 == 0


def test_a_broker_that_refuses_shows_no_password(caplog: pytest.LogCaptureFixture) -> None:
    word = f"broker-{secrets.token_hex(12)}"
    app = Celery("refused", broker=f"redis://user:{word}@127.0.0.1:1/0", set_as_current=False)
    with caplog.at_level("DEBUG"):
        assert not Bell(connection_options(app)).ring("celery")
    assert caplog.text and not shows(caplog.text, word)
    assert not shows(repr(Orchestrator), word)
