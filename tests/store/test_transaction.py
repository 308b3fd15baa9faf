"""The transaction of a transactional step, when the server takes its connection away."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import psycopg
import psycopg.rows
import pytest
from psycopg.types.json import set_json_loads
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from orchestrator.celery.runner import time_limit
from orchestrator.step import StepTimeout
from orchestrator.store.connection import CommitUnknown, TransactionEnded, TransactionFailed
from orchestrator.store.transaction import Transactions
from tests.acceptance.running import until

MINUTE = timedelta(minutes=1)


@pytest.fixture
def transactions(database_url: str) -> Iterator[Transactions]:
    made = Transactions(database_url.replace("postgresql://", "postgresql+psycopg://"))
    yield made
    made.dispose()


def end_backend(database_url: str, pid: int) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])


def backend_of(connection: Connection) -> int:
    return int(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())


def test_a_lost_connection_does_not_hide_why_the_code_failed(transactions: Transactions, database_url: str) -> None:
    def work(connection: Connection) -> None:
        end_backend(database_url, backend_of(connection))
        raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        transactions.run(False, MINUTE, work, lambda connection, value: True)
    assert transactions.run(False, MINUTE, backend_of, lambda connection, value: True) > 0


def test_a_connection_lost_while_the_outcome_is_written_fails_the_transaction(
    transactions: Transactions, database_url: str
) -> None:
    def settle(connection: psycopg.Connection[Any], pid: int) -> bool:
        end_backend(database_url, pid)
        return connection.execute("SELECT 1").fetchone() is not None

    with pytest.raises(TransactionFailed, match="terminating connection"):
        transactions.run(False, MINUTE, backend_of, settle)


def test_who_stands_still_while_the_outcome_is_written_finds_the_transaction_ended(
    transactions: Transactions, database_url: str
) -> None:
    def settle(connection: psycopg.Connection[Any], pid: int) -> bool:
        gone = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = %s)"
        with psycopg.connect(database_url, autocommit=True) as other:
            until(lambda: other.execute(gone, [pid]).fetchone() == (True,), "its transaction is ended", 10.0)
        return connection.execute("SELECT 1").fetchone() is not None

    with pytest.raises(TransactionFailed, match="idle-in-transaction timeout"):
        transactions.run(False, timedelta(milliseconds=200), backend_of, settle)


def test_a_timeout_of_years_is_the_longest_one_that_postgres_takes(transactions: Transactions) -> None:
    query = "SELECT setting FROM pg_settings WHERE name = 'idle_in_transaction_session_timeout'"

    def setting(connection: Connection) -> int:
        return int(connection.execute(text(query)).scalar_one())

    assert transactions.run(False, timedelta(days=3650), setting, lambda connection, value: True) == 2**31 - 1


def test_a_timeout_below_a_millisecond_is_one_and_not_none(transactions: Transactions) -> None:
    """To Postgres 0 is no timeout.  With one millisecond it may have ended the transaction before it is asked."""
    query = "SELECT setting::integer > 0 FROM pg_settings WHERE name = 'idle_in_transaction_session_timeout'"

    def is_set(connection: Connection) -> bool:
        try:
            return bool(connection.execute(text(query)).scalar_one())
        except DBAPIError:
            return True

    with suppress(TransactionFailed, CommitUnknown):
        assert transactions.run(False, timedelta(microseconds=1), is_set, lambda connection, value: True)


def read_as_dicts(connection: Connection) -> None:
    connection.connection.driver_connection.row_factory = psycopg.rows.dict_row  # type: ignore[union-attr]


def read_in_parts(connection: Connection) -> None:
    connection.execution_options(yield_per=10).execute(text("SELECT generate_series(1, 30)")).all()


def read_as_a_stream(connection: Connection) -> None:
    connection.execution_options(stream_results=True).execute(text("SELECT generate_series(1, 30)")).all()


def read_by_number(connection: Connection) -> None:
    connection.connection.driver_connection.cursor_factory = psycopg.RawCursor  # type: ignore[union-attr]


def read_exactly(connection: Connection) -> None:
    set_json_loads(partial(json.loads, parse_float=Decimal), connection.connection.driver_connection)  # type: ignore[arg-type]


def read_apart(connection: Connection) -> None:
    """As SQLAlchemy advises where a step changes its session, so that nobody else is given that."""
    connection.detach()
    connection.execute(text("SET search_path TO nowhere"))


WAYS = [read_as_dicts, read_in_parts, read_as_a_stream, read_by_number, read_exactly, read_apart]


@pytest.mark.parametrize("work", WAYS)
def test_how_a_step_reads_its_rows_is_not_how_the_outcome_is_written(transactions: Transactions, work: Any) -> None:
    """By the driver's connection, which goes back to the pool, or by options of SQLAlchemy, also for savepoints."""

    def settle(connection: psycopg.Connection[Any], value: object) -> bool:
        (number,) = connection.execute("SELECT %(value)s::json", {"value": "1.5"}).fetchone() or [None]
        return number == 1.5 and isinstance(number, float)

    def look(connection: Connection) -> Any:
        return connection.execute(text("SELECT current_schema(), CAST('1.5' AS json)")).one()

    def fail(connection: Connection) -> None:
        work(connection)
        raise ValueError("the reason")

    transactions.run(False, MINUTE, work, settle)
    with pytest.raises(ValueError, match="the reason"):
        transactions.run(False, MINUTE, fail, settle)
    schema, number = transactions.run(False, MINUTE, look, settle)
    assert (schema, number, type(number)) == ("public", 1.5, float)


LEFT = {
    "search_path": ("SET search_path TO nowhere", "SELECT current_schema()", "public"),
    "setting": ("SET statement_timeout TO '7s'", "SELECT current_setting('statement_timeout')", "0"),
    "read only": ("SET default_transaction_read_only TO on", "SHOW transaction_read_only", "off"),
    "table": ("CREATE TEMP TABLE mine (n int)", "SELECT count(*) FROM pg_class WHERE relname = 'mine'", 0),
    "lock": (
        "SELECT pg_advisory_lock(7)",
        "SELECT count(*) FROM pg_locks WHERE (locktype, objid) = ('advisory', 7)",
        0,
    ),
    "cursor": ("DECLARE mine CURSOR WITH HOLD FOR SELECT 1", "SELECT count(*) FROM pg_cursors WHERE is_holdable", 0),
    "listening": ("LISTEN mine", "SELECT count(*) FROM pg_listening_channels()", 0),
}


@pytest.mark.parametrize("left", LEFT)
def test_what_a_step_has_set_for_its_session_is_not_there_for_the_next_one(
    transactions: Transactions, left: str
) -> None:
    """With the search path of one tenant another one's rows would go to the wrong schema."""
    given, asked, wanted = LEFT[left]

    def work(connection: Connection) -> int:
        connection.execute(text(given))
        return backend_of(connection)

    def look(connection: Connection) -> tuple[int, Any]:
        return backend_of(connection), connection.execute(text(asked)).scalar()

    backend = transactions.run(False, MINUTE, work, lambda connection, value: True)
    assert transactions.run(False, MINUTE, look, lambda connection, value: True) == (backend, wanted)


def test_what_a_listener_of_the_app_has_set_for_the_session_stays(transactions: Transactions) -> None:
    def set_up(connection: psycopg.Connection[Any], record: object) -> None:
        connection.execute("SET TIME ZONE 'Europe/Berlin'")
        connection.execute("SET search_path TO shop, public")
        connection.commit()

    def look(connection: Connection) -> tuple[Any, ...]:
        return connection.execute(
            text("SELECT current_setting('timezone'), current_setting('search_path'), current_setting('work_mem')")
        ).one()

    def work(connection: Connection) -> tuple[Any, ...]:
        found = look(connection)
        connection.execute(text("SET TIME ZONE 'UTC'"))
        connection.execute(text("SET work_mem TO '7MB'"))
        return found

    event.listen(Engine, "connect", set_up)
    try:
        seen = {tuple(transactions.run(False, MINUTE, work, lambda connection, value: True)) for _ in range(3)}
    finally:
        event.remove(Engine, "connect", set_up)
    assert seen == {("Europe/Berlin", "shop, public", "4MB")}


def test_what_a_session_wrote_is_committed_without_a_warning(transactions: Transactions, database_url: str) -> None:
    """Its own savepoint, and one that the step has left open, lie within that of the engine."""

    def work(session: Session) -> None:
        session.execute(text("CREATE TABLE written (n int)"))
        session.begin_nested()
        session.execute(text("INSERT INTO written VALUES (7)"))

    transactions.run(True, MINUTE, work, lambda connection, value: True)
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT n FROM written").fetchall() == [(7,)]


def test_a_connection_lost_before_the_commit_leaves_it_unknown(transactions: Transactions, database_url: str) -> None:
    def settle(connection: psycopg.Connection[Any], pid: int) -> bool:
        end_backend(database_url, pid)
        return True

    with pytest.raises(CommitUnknown):
        transactions.run(False, MINUTE, backend_of, settle)


@pytest.mark.parametrize("code", ["57014", "55P03", "40001", "23514"])
def test_a_commit_that_postgres_refuses_has_not_happened(
    transactions: Transactions, database_url: str, code: str
) -> None:
    """By a deferred trigger, a lock that it waited for, an order to cancel: the connection lives, and so it is told."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE written (n int); CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"RAISE EXCEPTION 'not now' USING ERRCODE = '{code}'; END $$; CREATE CONSTRAINT TRIGGER refuse AFTER "
            "INSERT ON written DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()"
        )

    def work(connection: Connection) -> None:
        connection.execute(text("INSERT INTO written VALUES (1)"))

    with pytest.raises(TransactionFailed, match="not now"):
        transactions.run(False, MINUTE, work, lambda connection, value: True)
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT n FROM written").fetchall() == []


def by_sqlalchemy(connection: Connection) -> None:
    connection.execute(text("SELECT pg_sleep(60)"))


def by_the_driver(connection: Connection) -> None:
    connection.connection.dbapi_connection.execute("SELECT pg_sleep(60)")  # type: ignore[union-attr]


def detached(connection: Connection) -> None:
    connection.detach()
    by_the_driver(connection)


@pytest.mark.parametrize("wait", [by_sqlalchemy, by_the_driver, detached])
def test_what_a_step_was_interrupted_in_does_not_go_on_at_the_server(
    transactions: Transactions, database_url: str, caplog: pytest.LogCaptureFixture, wait: Any
) -> None:
    """It would keep the rows that the step has locked, and the next attempt waits for them until its own time is up."""
    backends: list[int] = []

    def work(connection: Connection) -> None:
        backends.append(backend_of(connection))
        with time_limit(0.3):
            wait(connection)

    with pytest.raises(StepTimeout):
        transactions.run(False, MINUTE, work, lambda connection, value: True)
    gone = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = ANY (%s))"
    with psycopg.connect(database_url, autocommit=True) as other:
        until(lambda: other.execute(gone, [backends]).fetchone() == (True,), "its backend is gone", 10.0)
    assert not caplog.records


ENDINGS: dict[str, Callable[[Connection], object]] = {
    "a statement": lambda connection: connection.execute(text("COMMIT")),
    "the driver": lambda connection: connection.connection.commit(),
    "what it began": lambda connection: connection.get_transaction().commit(),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("then", ["overruns", "loses its connection", "closes it"])
@pytest.mark.parametrize("by", ENDINGS)
def test_a_transaction_that_its_step_has_committed_is_no_failed_one_if_its_connection_is_gone(
    transactions: Transactions, database_url: str, by: str, then: str
) -> None:
    """Its rows may be there, and nobody can be asked any more."""

    def work(connection: Connection) -> None:
        backend, driver = backend_of(connection), connection.connection.driver_connection
        assert driver is not None
        ENDINGS[by](connection)
        if then == "loses its connection":
            end_backend(database_url, backend)
        elif then == "closes it":
            driver.close()
        with time_limit(0.2):
            driver.execute("SELECT pg_sleep(60)")

    with pytest.raises(TransactionEnded):
        transactions.run(False, MINUTE, work, lambda connection, value: True)


def test_a_database_that_is_away_fails_the_transaction() -> None:
    nobody = Transactions("postgresql+psycopg://nobody@127.0.0.1:1/nowhere")
    with pytest.raises(TransactionFailed, match="refused"):
        nobody.run(False, MINUTE, lambda connection: None, lambda connection, value: True)


def test_an_app_whose_listener_fails_on_each_connection_fails_the_transaction(transactions: Transactions) -> None:
    """Such as one for SQLite that listens to all engines there are."""

    def only_for_sqlite(connection: Any, record: object) -> None:
        connection.execute("PRAGMA foreign_keys=ON")

    event.listen(Engine, "connect", only_for_sqlite)
    try:
        with pytest.raises(TransactionFailed, match="PRAGMA"):
            transactions.run(False, MINUTE, backend_of, lambda connection, value: True)
    finally:
        event.remove(Engine, "connect", only_for_sqlite)


def test_its_connection_is_given_up_as_any_other_when_the_way_to_the_database_hangs(transactions: Transactions) -> None:
    def parameters(connection: Any) -> dict[str, str]:
        found: dict[str, str] = connection.connection.driver_connection.info.get_parameters()
        return found

    shown = transactions.run(False, timedelta(minutes=1), parameters, lambda connection, value: True)
    wanted = {"tcp_user_timeout": "25000", "keepalives_idle": "10", "keepalives_count": "3", "connect_timeout": "5"}
    assert {name: shown.get(name) for name in wanted} == wanted
