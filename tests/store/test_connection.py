"""Connections as they are opened: what the URL asks of a session holds beside what we ask of it."""

from __future__ import annotations

import contextlib
import json
import select
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from psycopg.types.json import set_json_loads
from sqlalchemy import text

from orchestrator import ConfigurationError
from orchestrator.store.connection import Connection, open_connection
from orchestrator.store.pool import ClientPool
from orchestrator.store.transaction import Transactions
from tests.acceptance.running import until

ELSEWHERE = "client_encoding=LATIN1&options=-c%20datestyle%3DGerman"


def test_what_the_url_asks_of_the_session_is_not_forgotten(database_url: str) -> None:
    url = f"{database_url}?options=-c%20statement_timeout%3D12345%20-c%20search_path%3Dshop"
    with open_connection(url, name="test") as connection:
        shown = [
            connection.execute(f"SHOW {name}").fetchone()  # type: ignore[arg-type]
            for name in ("statement_timeout", "search_path", "enable_seqscan", "timezone")
        ]
    assert shown == [("12345ms",), ("shop",), ("off",), ("UTC",)]


@pytest.mark.parametrize("prepare", [True, False])
def test_any_text_and_any_instant_can_be_said_whatever_the_settings_of_the_database_are(
    database_url: str, prepare: bool
) -> None:
    with open_connection(f"{database_url}?{ELSEWHERE}", name="test", prepare=prepare) as connection:
        said = connection.execute("SELECT %s, timestamptz '2026-12-01 02:03 UTC'", ["\N{SNOWMAN}"]).fetchone()
    assert said == ("\N{SNOWMAN}", datetime(2026, 12, 1, 2, 3, tzinfo=UTC))


@pytest.mark.parametrize("prepare", [True, False])
def test_the_isolation_that_a_database_has_by_default_is_not_that_of_the_engine(
    database_url: str, prepare: bool
) -> None:
    strict = "options=-c%20default_transaction_isolation%3Dserializable"
    with open_connection(f"{database_url}?{strict}", name="test", prepare=prepare) as connection:
        with connection.transaction():
            shown = connection.execute("SHOW transaction_isolation").fetchone()
        alone = connection.execute("SHOW transaction_isolation").fetchone()
    assert shown == ("read committed",)
    assert alone == ("read committed",) if prepare else ("serializable",)


def test_what_is_recorded_within_a_transaction_is_read_whatever_the_settings_of_the_database_are(
    database_url: str,
) -> None:
    """The settings of the connection that a transactional step is handed are its own."""
    transactions = Transactions(f"{database_url.replace('postgresql:', 'postgresql+psycopg:')}?{ELSEWHERE}")
    settled: list[Any] = []

    def settle(connection: Connection, value: Any) -> bool:
        settled.append(connection.execute("SELECT %s, timestamptz '2026-12-01 02:03 UTC'", ["\N{SNOWMAN}"]).fetchone())
        return True

    shown = transactions.run(
        False, timedelta(seconds=9), lambda connection: connection.execute(text("SHOW datestyle")).scalar(), settle
    )
    transactions.run(
        False, timedelta(seconds=9), lambda step: step.execute(text("SET LOCAL client_encoding TO 'LATIN1'")), settle
    )
    transactions.dispose()
    assert (shown, settled) == ("German, DMY", [("\N{SNOWMAN}", datetime(2026, 12, 1, 2, 3, tzinfo=UTC))] * 2)


@pytest.fixture
def exact() -> Iterator[None]:
    """An application that reads the JSON of all of its connections with Decimal: 1.5 would be written as "1.5" then."""
    set_json_loads(partial(json.loads, parse_float=Decimal))
    yield
    set_json_loads(json.loads)


def test_how_an_app_reads_on_all_of_its_connections_is_not_how_the_engine_does(exact: None, database_url: str) -> None:
    query = "SELECT json '1.5', jsonb '1.5'"
    lists = [["a", "b"], [1, 2], [True], [1.5], [datetime(2026, 12, 1, tzinfo=UTC)], [None]]
    with open_connection(database_url, name="test") as connection:
        read = [connection.execute(query).fetchone()]
        typed = "SELECT %s::text[], %s::int[], %s::bool[], %s::float8[], %s::timestamptz[], %s::text[]"
        assert connection.execute(typed, lists).fetchone() == tuple(lists)
    transactions = Transactions(database_url.replace("postgresql:", "postgresql+psycopg:"))

    def settle(connection: Connection, value: Any) -> bool:
        read.append(connection.execute(query).fetchone())
        return True

    for _ in range(2):
        given = transactions.run(False, timedelta(seconds=9), lambda step: step.execute(text(query)).one(), settle)
        assert [*given] == [Decimal("1.5"), Decimal("1.5")]
    transactions.dispose()
    assert [type(number) for row in read for number in row or ()] == [float] * 6


def test_a_url_that_the_driver_cannot_read_is_wrong_configuration_and_not_shown() -> None:
    with pytest.raises(ConfigurationError, match="ORCHESTRATOR_DATABASE_URL") as refused:
        open_connection("postgresql://ann:secret@db/shop?no_such_parameter=1", name="test")
    assert "secret" not in str(refused.value) and refused.value.__cause__ is None


@pytest.mark.parametrize("size", [1, 2])
def test_a_pool_lends_no_connection_that_the_server_has_ended(
    database_url: str, connection: Connection, size: int
) -> None:
    """It may have lain there since the night before, and the server have been started again meanwhile."""
    pool = ClientPool(database_url, size)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(pool.connection()) for _ in range(size)]
        pids = [each.info.backend_pid for each in idle]
    for each in idle:
        connection.execute("SELECT pg_terminate_backend(%s)", [each.info.backend_pid])
        until(lambda each=each: select.select([each.fileno()], [], [], 0)[0], "the end of a connection")
    with pool.connection() as lent:
        assert lent.info.backend_pid not in pids
        assert lent.execute("SELECT 1").fetchone() == (1,)
    pool.close()


def test_a_connection_that_is_lent_while_its_pool_is_closed_is_closed_when_it_comes_back(database_url: str) -> None:
    pool = ClientPool(database_url, 1)
    with pool.connection() as lent:
        pool.close()
        assert lent.execute("SELECT 1").fetchone() == (1,)
    assert lent.closed
