"""The transaction of a transactional step: business rows and the step's completion commit together.

Owns the connection that user code is handed, and takes from it what would end the transaction.  Imported where the
first one is opened: SQLAlchemy takes as long to import as a worker does for all the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from psycopg import sql
from psycopg.adapt import AdaptersMap
from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, NestedTransaction, RootTransaction, create_engine, event, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session, SessionTransaction, SessionTransactionOrigin
from sqlalchemy.pool import NullPool

from orchestrator.errors import UsageError
from orchestrator.failpoints import failpoint
from orchestrator.store.connection import (
    ATTENTIVE,
    IN_UTC,
    REFUSED,
    CommitUnknown,
    TransactionEnded,
    TransactionFailed,
    is_at_rest,
    refuse_ended,
    refuse_lost_rows,
)
from orchestrator.store.connection import Connection as Psycopg
from orchestrator.store.permits import Permits

T = TypeVar("T")


class Transactions:
    """Opens the transactions of one process; at most one connection per thread that uses it.

    With `permits` a connection lives as long as its transaction, and needs a permit.
    """

    def __init__(self, sqlalchemy_url: str, permits: Permits | None = None, *, prepare: bool = True) -> None:
        self._permits = permits
        options: dict[str, Any] = {"connect_args": ATTENTIVE if prepare else ATTENTIVE | {"prepare_threshold": None}}
        if permits is None:
            options |= {"pool_size": 1, "max_overflow": 20, "pool_pre_ping": True}
        else:
            options["poolclass"] = NullPool
        self._engine: Engine = create_engine(sqlalchemy_url, **options)
        if permits is None and prepare:  # behind a pooler a session is everybody's, and to be left alone
            event.listen(self._engine, "connect", _look_at_session)
        event.listen(self._engine, "close", _stop)  # by SQLAlchemy, where the interruption meets it in its own code

    def run(
        self, wants_session: bool, timeout: timedelta, work: Callable[[Any], T], settle: Callable[[Psycopg, T], bool]
    ) -> T:
        """Call `work` with a connection (or Session) under a savepoint, then `settle`, then commit.

        `settle` gets the driver's connection and what `work` returned, and says whether to commit.
        Raises: CommitUnknown, TransactionEnded, TransactionFailed; whatever else `work` or `settle` raise, after a
        rollback.
        """
        with self._permitted(), self._connected() as connection:
            value = self._begun(connection, wants_session, timeout, work, settle)
            outer = connection.get_transaction()
            if outer is None:
                return value
            try:
                outer.commit()
                failpoint("transaction.after", connection)
            except DBAPIError as error:
                if _is_unanswered(connection, error):
                    raise CommitUnknown(str(error)) from error
                raise TransactionFailed(error) from error
            return value

    def _begun(
        self,
        connection: Connection,
        wants_session: bool,
        timeout: timedelta,
        work: Callable[[Any], T],
        settle: Callable[[Psycopg, T], bool],
    ) -> T:
        """Do everything before the commit; a connection that is lost here has taken all of it back."""
        try:
            failpoint("transaction.before", connection)
            driver, adapters = _driver(connection)
            driver._adapters = AdaptersMap(adapters)  # the step before may have registered others
            outer = connection.begin()
            milliseconds = min(max(timeout // timedelta(milliseconds=1), 1), _LONGEST_IDLE_MS)  # 0 would be no limit
            connection.execute(_IDLE_TIMEOUT, {"timeout": str(milliseconds)})
            failpoint("transaction.begun", connection)
            inner = connection.begin_nested()
        except DBAPIError as error:
            raise TransactionFailed(error) from error
        savepoints: list[NestedTransaction] = []
        ends: list[bool] = []
        handed: Any = _session_on(connection, savepoints) if wants_session else connection
        try:
            with _without_endings(connection, handed), _rows_as_made(driver), _watched(driver, ends):
                value = work(handed)
            if wants_session:
                _write_out(handed, savepoints)
        except Exception as error:
            _refuse_ended(connection, outer, inner, error, ends)
            raise
        try:
            failpoint("transaction.worked", connection)
            for nested in _innermost_first(connection, inner):
                nested.commit()
            driver._adapters = AdaptersMap(IN_UTC)
            for name, wanted in _SPOKEN.items():
                if not str(driver.info.parameter_status(name)).startswith(wanted):
                    driver.execute(f"SET LOCAL {name} TO {wanted}".encode())
            if not settle(driver, value):
                outer.rollback()
            failpoint("transaction.settled", connection)
        except (SQLAlchemyError, REFUSED) as error:
            if ends or _was_ended(connection, outer, error):
                raise _ended() from error
            raise TransactionFailed(error) from error
        return value

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Connection]:
        """Lend a connection; one that the server has ended does not hide why the transaction is left."""
        try:
            connection = self._engine.connect()
        except Exception as error:  # of the database, or of what an app has told SQLAlchemy to do with each connection
            raise TransactionFailed(error) from error
        driver, _ = _driver(connection)
        as_opened = connection.info.get(_AS_OPENED)
        try:
            yield connection
        finally:
            try:
                if _is_busy(driver):
                    connection.invalidate()  # the pool would try to roll it back, which it does not take
                    _stop(driver)  # one that is detached is nobody's
                    driver.close()
                elif as_opened and not driver.closed:
                    _end_session(connection, driver, as_opened)
                connection.close()
            except DBAPIError:  # not always an OperationalError; nothing is left to roll back
                if not connection.closed:
                    connection.invalidate()
                    connection.close()

    @contextlib.contextmanager
    def _permitted(self) -> Iterator[None]:
        permit = self._permits.take() if self._permits else None
        try:
            yield
        finally:
            if permit is not None:
                permit.give_back()

    def dispose(self) -> None:
        """Close what is idle."""
        self._engine.dispose()


def _session_on(connection: Connection, savepoints: list[NestedTransaction]) -> Session:
    """Return a Session within the transaction of a connection, which adds the savepoint that it opens to those given.

    Of what the step begins by itself (`with session.begin():`) the end is the step's own affair.
    """
    session = Session(bind=connection, join_transaction_mode="create_savepoint")

    def note(session: Session, transaction: SessionTransaction, begun_on: Connection) -> None:
        savepoint = begun_on.get_nested_transaction()
        own = transaction.origin is SessionTransactionOrigin.AUTOBEGIN and begun_on is connection
        if own and savepoint is not None:
            savepoints.append(savepoint)

    event.listen(session, "after_begin", note)
    return session


def _write_out(session: Session, savepoints: Sequence[NestedTransaction]) -> None:
    """Write what a session holds as a part of the step's code: whatever is raised by that fails its attempt."""
    try:
        refuse_lost_rows(session)
        for savepoint in savepoints:
            refuse_ended(savepoint)
        session.flush()
        session.expunge_all()
    except Exception as error:
        raise TransactionFailed(error) from error


_SPOKEN = {"client_encoding": "UTF8", "DateStyle": "ISO"}  # so that any text can be said, and the driver reads instants
_LONGEST_IDLE_MS = 2**31 - 1  # 24 days, the most that Postgres takes; a step may have years
_IDLE_TIMEOUT = text("SELECT set_config('idle_in_transaction_session_timeout', :timeout, true)")


def _driver(connection: Connection) -> tuple[Psycopg, AdaptersMap]:
    """Return the connection of the driver, and how it was made to read and write values."""
    driver: Psycopg = connection.connection.driver_connection  # type: ignore[assignment]
    adapters: AdaptersMap = connection.info.setdefault("orchestrator_adapters", AdaptersMap(driver.adapters))
    return driver, adapters


@contextlib.contextmanager
def _rows_as_made(driver: Psycopg) -> Iterator[None]:
    """Take back what a step sets on the driver's connection of how it reads rows: SQLAlchemy goes on with it."""
    rows, cursors = driver.row_factory, driver.cursor_factory
    try:
        yield
    finally:
        driver.row_factory, driver.cursor_factory = rows, cursors


def _is_unanswered(connection: Connection, error: DBAPIError) -> bool:
    """Tell whether Postgres may have committed: it has said that it did not if it goes on with the connection."""
    return (
        connection.closed
        or connection.invalidated
        or (isinstance(error, OperationalError) and getattr(error.orig, "sqlstate", None) is None)
    )


def _innermost_first(connection: Connection, inner: NestedTransaction) -> Iterator[NestedTransaction]:
    """Give the savepoints down to that of the engine; a Session's own is one, and SQLAlchemy warns if it stays open."""
    connection.execution_options(stream_results=False, yield_per=0)  # which a step may have set, and no savepoint takes
    while (nested := connection.get_nested_transaction()) not in (inner, None) and nested.is_active:
        yield nested
    yield inner


def _refuse_ended(
    connection: Connection,
    outer: RootTransaction,
    inner: NestedTransaction,
    error: BaseException,
    ends: Sequence[bool],
) -> None:
    """Go back to the savepoint, which the server knows of only while the transaction lasts.  Raises: TransactionEnded.

    There are more ways to end it than can be taken from user code: a statement, the driver, what SQLAlchemy began.
    """
    try:
        for nested in _innermost_first(connection, inner):
            if nested.is_active:  # SQLAlchemy knows of it when what it began was ended, and warns
                nested.rollback()
        ended = _was_ended(connection, outer, None)
    except (SQLAlchemyError, REFUSED) as refused:
        ended = _was_ended(connection, outer, refused)
    if ends or ended:
        raise _ended() from error


@contextlib.contextmanager
def _watched(driver: Psycopg, ends: list[bool]) -> Iterator[None]:
    """Note whether the transaction ends before its time: where the connection is lost after that, nobody could tell."""
    wait = driver.wait

    def watch(*args: Any, **options: Any) -> Any:
        try:
            return wait(*args, **options)
        finally:
            if driver.pgconn.transaction_status == TransactionStatus.IDLE:
                ends.append(True)

    driver.wait = watch  # type: ignore[method-assign]
    try:
        yield
    finally:
        del driver.wait


def _was_ended(connection: Connection, outer: RootTransaction, error: BaseException | None) -> bool:
    """Tell whether user code has ended the transaction; one whose connection was lost it has not, and left nothing."""
    if connection.closed or connection.invalidated:
        return False
    return not outer.is_active or getattr(getattr(error, "orig", None), "sqlstate", "") in _NO_SAVEPOINT


def _ended() -> TransactionEnded:
    return TransactionEnded(
        "the step has committed its transaction by itself, or rolled it back, so that what it wrote before may stay; "
        "leave that to the saga, with whose record of the step it commits, and use begin_nested() for a part"
    )


def _is_busy(driver: Psycopg) -> bool:
    return driver.pgconn.transaction_status == TransactionStatus.ACTIVE


def _stop(driver: Psycopg, *_: Any) -> None:
    """Cancel what a step was interrupted in, before its connection is closed: at the server it would go on.

    It would hold its rows for as long, and the next attempt would wait for them up to its own time.
    """
    if _is_busy(driver):
        with contextlib.suppress(REFUSED):
            driver.cancel_safe(timeout=_CANCEL_S)


_CANCEL_S = 5.0


def _look_at_session(driver: Psycopg, record: Any) -> None:
    """Keep what makes a session as it was when it was opened, and a listener of the app had set it up."""
    with _at_once(driver) if is_at_rest(driver) else contextlib.nullcontext():
        given = driver.execute(_GIVEN).fetchall()
    again = [sql.SQL("SELECT set_config({}, {}, false)").format(*map(sql.Literal, each)) for each in given]
    record.info[_AS_OPENED] = sql.SQL("; ").join([sql.SQL(_END_SESSION), *again]).as_bytes(driver)


def _end_session(connection: Connection, driver: Psycopg, as_opened: bytes) -> None:
    """Take back what a step has set for more than its transaction: the next one in this process may be of anybody."""
    try:
        driver.rollback()
        with _at_once(driver):
            driver.execute(as_opened, prepare=False)
    except REFUSED:
        connection.invalidate()


@contextlib.contextmanager
def _at_once(driver: Psycopg) -> Iterator[None]:
    driver.autocommit = True
    try:
        yield
    finally:
        driver.autocommit = False


_AS_OPENED = "orchestrator_session"
# What DISCARD ALL does, but for the plans of the driver's own statements.
_END_SESSION = (
    "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; UNLISTEN *; DISCARD TEMP; "
    "SELECT pg_advisory_unlock_all()"
)
_GIVEN = """
SELECT name, setting FROM pg_settings WHERE source = 'session'
UNION ALL SELECT 'role', current_setting('role') WHERE current_setting('role') <> 'none'
"""
_NO_SAVEPOINT = ("3B001", "25P01")  # there is no such savepoint, or no transaction at all


class _without_endings:  # noqa: N801 - a context manager reads like a function
    """For as long as user code runs, what ends its transaction, or a Session in it, raises."""

    _NAMES = ("commit", "rollback", "close", "reset")

    def __init__(self, *handed: Any) -> None:
        self._handed = handed

    def __enter__(self) -> None:
        for handed in self._handed:
            for name in self._NAMES:
                setattr(handed, name, _refusal(name))

    def __exit__(self, *exc: object) -> None:
        for handed in self._handed:
            for name in self._NAMES:
                handed.__dict__.pop(name, None)


def _refusal(name: str) -> Callable[..., None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise UsageError(
            f"{name}() on the connection of a transactional step: its transaction belongs to the saga and commits with "
            "the step's completion; raise an exception to roll back, or use begin_nested() for a part"
        )

    return refuse
