"""Starting in a caller's transaction, over connections that are set up in the ways that callers like."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import types
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row, namedtuple_row
from psycopg.types.json import set_json_loads
from psycopg.types.string import TextLoader
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from orchestrator import ConflictError, UnknownRunError, UsageError, saga
from orchestrator.client import Client
from orchestrator.settings import Settings
from orchestrator.store import liveness
from orchestrator.store.connection import open_connection


@saga.define
async def joined(amount: float) -> float:
    return amount


@pytest.fixture
def client(database_url: str) -> Iterator[Client]:
    made = Client(Settings.from_environment({}, database_url=database_url), lambda *_: None, lambda: "celery")
    yield made
    made.pool.close()


def _exact(connection: Any) -> None:
    set_json_loads(lambda text: json.loads(text, parse_float=Decimal), connection)


def _as_text(connection: Any) -> None:
    connection.adapters.register_loader("jsonb", TextLoader)


def _raw(connection: Any) -> None:
    connection.cursor_factory = psycopg.RawCursor


def _dicts(connection: Any) -> None:
    connection.row_factory = dict_row


def _named(connection: Any) -> None:
    connection.row_factory = namedtuple_row


SETTINGS = [_exact, _as_text, _raw, _dicts, _named]


def _start(client: Client, transaction: Any, amount: float) -> None:
    client.start(joined, (amount,), {}, {"task_id": "same", "transaction": transaction})


def _starts_once(client: Client, transaction: Any) -> None:
    """Start a run twice in a transaction, and see that other input is refused."""
    _start(client, transaction, 1.5)
    _start(client, transaction, 1.5)
    with pytest.raises(ConflictError, match="other input"):
        _start(client, transaction, 2.5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_start_is_known_again_however_the_connection_reads(
    client: Client, database_url: str, setting: Callable[[Any], None]
) -> None:
    with psycopg.connect(database_url) as connection:
        setting(connection)
        _starts_once(client, connection)
    assert client.handle(joined, "same").status == "pending"


class Database:
    """A database of Django's, as far as a start needs one: JSON comes as text."""

    in_atomic_block = True
    vendor = "postgresql"

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        _as_text(connection)
        self.connection = connection

    def cursor(self) -> contextlib.AbstractContextManager[psycopg.Cursor[Any]]:
        return self.connection.cursor()


def test_the_same_start_is_known_again_in_a_transaction_of_django(
    client: Client, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(database_url) as connection:
        module: Any = types.ModuleType("django.db")
        module.connections = {"default": Database(connection)}
        monkeypatch.setitem(sys.modules, "django", types.ModuleType("django"))
        monkeypatch.setitem(sys.modules, "django.db", module)
        _starts_once(client, "default")


class OtherDatabase:
    """One of Django's that is no Postgres."""

    in_atomic_block = True
    vendor = "mysql"


def test_a_transaction_of_another_kind_of_database_is_refused_and_shows_no_input(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was an error of that database's driver, with the statement and the input of the run in it."""
    module: Any = types.ModuleType("django.db")
    module.connections = {"default": OtherDatabase()}
    monkeypatch.setitem(sys.modules, "django", types.ModuleType("django"))
    monkeypatch.setitem(sys.modules, "django.db", module)
    engine = create_engine("sqlite://")
    with engine.begin() as connection, Session(engine) as session:
        for transaction, kind in ((connection, "sqlite"), (session, "sqlite"), ("default", "mysql")):
            with pytest.raises(UsageError, match=f"got a connection of {kind}: a run can only join") as refused:
                _start(client, transaction, 1.5)
            assert "1.5" not in str(refused.value)
    engine.dispose()


def _with_driver(database_url: str, driver: str) -> str:
    return database_url.replace("postgresql://", f"postgresql+{driver}://")


def test_an_engine_that_commits_each_statement_has_no_transaction_to_join(client: Client, database_url: str) -> None:
    engine = create_engine(_with_driver(database_url, "psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection, pytest.raises(UsageError, match="autocommit"):
        _start(client, connection, 1.5)
    with Session(engine) as session, pytest.raises(UsageError, match="autocommit"):
        _start(client, session, 1.5)
    engine.dispose()
    with pytest.raises(UnknownRunError):
        client.handle(joined, "same").status  # noqa: B018


def test_a_connection_that_reads_as_a_stream_keeps_no_cursor_of_a_start(client: Client, database_url: str) -> None:
    engine = create_engine(_with_driver(database_url, "psycopg"), execution_options={"stream_results": True})
    with engine.begin() as connection:
        _starts_once(client, connection)
        assert connection.execute(text("SELECT count(*) FROM pg_cursors WHERE name <> ''")).scalar() == 1, "its own"
    engine.dispose()
    assert client.handle(joined, "same").status == "pending"


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_an_async_engine_that_commits_each_statement_has_none_either(
    client: Client, database_url: str, driver: str
) -> None:
    async def start() -> None:
        engine = create_async_engine(_with_driver(database_url, driver), isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            with pytest.raises(UsageError, match="autocommit"):
                await client.astart(joined, (1.5,), {}, {"task_id": "same", "transaction": connection})
        await engine.dispose()

    asyncio.run(start())
    with pytest.raises(UnknownRunError):
        client.handle(joined, "same").status  # noqa: B018


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_the_doorbell_after_an_async_transaction_does_not_hold_up_the_event_loop(
    client: Client, database_url: str, driver: str
) -> None:
    """It takes seconds where the broker does not answer."""
    with open_connection(database_url, name="test") as connection:
        liveness.register(
            connection, node="n", host="h", pid=1, queues=["celery"], targets=[joined.target], slots=1
        )  # fmt: skip
    goes_on, rung = threading.Event(), threading.Event()

    def ring(queue: str, times: int) -> None:
        if goes_on.wait(10.0):
            rung.set()

    client._ring = ring

    async def start() -> None:
        engine = create_async_engine(database_url.replace("postgresql://", f"postgresql+{driver}://"))
        async with engine.begin() as connection:
            await client.astart(joined, (1.5,), {}, {"task_id": "same", "transaction": connection})
        goes_on.set()
        await engine.dispose()

    asyncio.run(start())
    assert rung.wait(10.0)


def test_a_commit_of_the_callers_succeeds_though_the_clients_own_database_refuses_to_say_whom_to_ring(
    client: Client, database_url: str, empty_database_url: str
) -> None:
    settings = Settings.from_environment({}, database_url=empty_database_url)
    elsewhere = Client(settings, lambda *_: None, lambda: "celery")
    engine = create_engine(_with_driver(database_url, "psycopg"), pool_size=1, max_overflow=0)
    with engine.begin() as connection:
        _start(elsewhere, connection, 1.5)
    with engine.connect():
        assert client.handle(joined, "same").status == "pending"
    engine.dispose()
    elsewhere.pool.close()
