"""Statements in a transaction that belongs to the caller: SQLAlchemy (sync or async), psycopg, or a Django alias.

Owns the translation of one statement to the kinds of connection that people have.  Must never commit or roll back.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg.rows import tuple_row
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session, scoped_session

from orchestrator.errors import SchemaError, UsageError
from orchestrator.store.connection import is_at_rest
from orchestrator.store.forks import refuse_inherited

_NAMED = re.compile(r"%\((\w+)\)s")
_PENDING = "orchestrator_rings"
_NO_SCHEMA = (psycopg.errors.UndefinedFunction, psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName)


@functools.lru_cache(maxsize=64)
def _sqlalchemy(statement: str) -> Any:
    return text(_NAMED.sub(r":\1", statement))


def execute(transaction: Any, statement: str, values: dict[str, Any]) -> tuple[Any, ...] | None:
    """Run a statement in the caller's transaction and return its first row.

    Raises: UsageError for something that is no connection to Postgres, or one that was opened before a fork;
    SchemaError if its database has no orchestrator schema.
    """
    try:
        if isinstance(transaction, (Session, scoped_session)):
            transaction = transaction.connection()
        if isinstance(transaction, Connection):
            _refuse_others(transaction.dialect.name)
            _refuse_unjoinable(transaction.connection)
            row = transaction.execute(_sqlalchemy(statement), values).first()
            return tuple(row) if row else None
        if isinstance(transaction, psycopg.Connection):
            _refuse_inherited(transaction)
            _refuse_autocommit(transaction)
            with psycopg.Cursor(transaction, row_factory=tuple_row) as cursor:
                return cursor.execute(statement, values).fetchone()
        if isinstance(transaction, str):
            return _django(transaction, statement, values)
    except _NO_SCHEMA as error:
        raise _no_schema() from error
    except ProgrammingError as error:
        if _says_no_schema(error):
            raise _no_schema() from error
        raise
    raise _not_a_transaction(transaction)


async def aexecute(transaction: Any, statement: str, values: dict[str, Any]) -> tuple[Any, ...] | None:
    """Run a statement in the caller's async transaction; sync ones are accepted as well.  Raises: as `execute`."""
    try:
        transaction = _unscoped(transaction)
        if _is_async(transaction, "AsyncSession"):
            transaction = await transaction.connection()
        if _is_async(transaction, "AsyncConnection"):
            _refuse_others(transaction.dialect.name)
            _refuse_unjoinable(await transaction.get_raw_connection())
            row = (await transaction.execute(_sqlalchemy(statement), values)).first()
            return tuple(row) if row else None
        if isinstance(transaction, psycopg.AsyncConnection):
            _refuse_inherited(transaction)
            _refuse_autocommit(transaction)
            async with psycopg.AsyncCursor(transaction, row_factory=tuple_row) as cursor:
                return await (await cursor.execute(statement, values)).fetchone()
    except _NO_SCHEMA as error:
        raise _no_schema() from error
    except ProgrammingError as error:
        if _says_no_schema(error):
            raise _no_schema() from error
        raise
    return execute(transaction, statement, values)


def after_commit(transaction: Any, ring: Callable[[], None]) -> None:
    """Call `ring` once the transaction's connection goes back to its pool.

    Where SQLAlchemy cannot tell, the pump rings.  After a rollback it is called as well, which costs one needless
    doorbell.
    """
    transaction = _unscoped(transaction)
    if _is_async(transaction, "AsyncSession") or _is_async(transaction, "AsyncConnection"):
        transaction = getattr(transaction, "sync_session", None) or transaction.sync_connection
    if isinstance(transaction, (Session, scoped_session)):
        transaction = transaction.connection()
    if isinstance(transaction, Connection) and transaction.connection.dbapi_connection is not None:
        pool = transaction.engine.pool
        if not event.contains(pool, "checkin", _checked_in):
            event.listen(pool, "checkin", _checked_in)
        transaction.connection.info.setdefault(_PENDING, []).append(ring)


def _checked_in(dbapi_connection: Any, record: Any) -> None:
    """Ring; beside an event loop, which is not to stand still for as long as a broker does not answer."""
    for ring in record.info.pop(_PENDING, ()):
        loop = asyncio._get_running_loop()
        if loop is None:
            ring()
            continue
        with contextlib.suppress(RuntimeError):  # it is being closed
            loop.run_in_executor(None, ring)


def _is_async(transaction: Any, name: str) -> bool:
    """SQLAlchemy's asyncio part needs greenlet, so it is looked for only where the caller has imported it."""
    module = sys.modules.get("sqlalchemy.ext.asyncio")
    return module is not None and isinstance(transaction, getattr(module, name))


def _unscoped(transaction: Any) -> Any:
    return transaction() if _is_async(transaction, "async_scoped_session") else transaction


def _django(alias: str, statement: str, values: dict[str, Any]) -> tuple[Any, ...] | None:
    try:
        from django.db import connections
    except ImportError:
        raise UsageError(f"transaction={alias!r} names a Django database, but Django is not installed") from None
    connection = connections[alias]
    _refuse_others(connection.vendor)
    if not connection.in_atomic_block:
        raise UsageError(f"transaction={alias!r}: open `transaction.atomic(using={alias!r})` around the start")
    _refuse_inherited(connection.connection)
    with connection.cursor() as cursor:
        cursor.execute(statement, values)
        row = cursor.fetchone()
    return tuple(row) if row else None


def _refuse_others(database: str) -> None:
    """By the name that SQLAlchemy and Django have for it: what it would say itself shows the input of the run."""
    if database != "postgresql":
        raise UsageError(
            f"transaction= got a connection of {database}: a run can only join a transaction of the Postgres that "
            "holds the runs; start the run after your commit"
        )


def _refuse_inherited(driver: Any) -> None:
    """Some drivers do not tell their socket; a connection that is closed has none, and says so itself."""
    if callable(getattr(driver, "fileno", None)) and not driver.closed:
        refuse_inherited(driver.fileno())


def _refuse_unjoinable(pooled: Any) -> None:
    """Of SQLAlchemy: one that has none of its own, as each of its statements commits by itself, joins nothing."""
    _refuse_inherited(pooled.driver_connection)
    if getattr(pooled.dbapi_connection, "autocommit", False) is True:
        raise _autocommits()


def _refuse_autocommit(connection: Any) -> None:
    if connection.autocommit and is_at_rest(connection):
        raise _autocommits()


def _autocommits() -> UsageError:
    return UsageError("transaction= got an autocommit connection outside of a transaction; open one around the start")


def _says_no_schema(error: ProgrammingError) -> bool:
    sqlstate = getattr(error.orig, "sqlstate", getattr(error.orig, "pgcode", ""))
    return sqlstate in [kind.sqlstate for kind in _NO_SCHEMA]


def _no_schema() -> SchemaError:
    return SchemaError(
        "the database of transaction= has no orchestrator schema: a run can only join a transaction of the database "
        "that holds the runs; migrate it with `celery -A <your app> saga migrate`, or start the run after your commit"
    )


def _not_a_transaction(transaction: Any) -> UsageError:
    kind = type(transaction)
    hint = " (await aapply_async(...) for an async one)" if kind.__name__.lower().startswith("async") else ""
    return UsageError(
        f"transaction= takes a SQLAlchemy Connection or Session, a psycopg Connection or a Django alias, "
        f"not {kind.__module__}.{kind.__qualname__}{hint}"
    )
