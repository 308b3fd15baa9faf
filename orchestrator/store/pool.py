"""Connections of a client process: few, shared by its threads, never across a fork.

Owns the pool of a process.  Must never hold one while nobody uses it for longer than the pool does.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from orchestrator.errors import StoreUnavailableError
from orchestrator.store.connection import UNAVAILABLE, Connection, open_connection, unavailable

if TYPE_CHECKING:
    from sqlalchemy.pool import QueuePool


class ClientPool:
    """A pool of autocommit connections, opened on first use and made anew after a fork."""

    def __init__(self, dsn: str, size: int, *, prepare: bool = True) -> None:
        self._dsn = dsn
        self._prepare = prepare
        self._size = max(1, size)
        self._pool: QueuePool | None = None
        self._owner = 0
        self._abandoned: list[QueuePool] = []  # a parent's sockets must not be closed by its child

    def _current(self) -> QueuePool:
        if self._pool is None or self._owner != os.getpid():
            if self._pool is not None:
                self._abandoned.append(self._pool)
            from sqlalchemy.pool import QueuePool  # not at the top: a worker that starts no runs has no use for it

            self._pool = QueuePool(
                lambda: open_connection(self._dsn, name="client", prepare=self._prepare),  # type: ignore[arg-type]
                pool_size=self._size, max_overflow=0, timeout=10, reset_on_return=None,
            )  # fmt: skip
            self._owner = os.getpid()
        return self._pool

    @contextlib.contextmanager
    def connection(self) -> Iterator[Connection]:
        """Lend a connection; one that breaks is dropped.  Raises: StoreUnavailableError."""
        fairy = self._lent()
        try:
            yield fairy.driver_connection
        except UNAVAILABLE as error:
            lost = fairy.driver_connection.closed
            fairy.invalidate()
            self._current().dispose()  # whatever ended this connection has most likely ended the idle ones too
            raise unavailable(error, in_doubt=lost) from error
        finally:
            if self._pool is None:  # closed meanwhile: what comes back to it nobody would close
                fairy.invalidate()
            fairy.close()

    def _lent(self) -> Any:
        """Take a connection; if the server has ended the one at hand, it most likely has ended the idle ones too."""
        from sqlalchemy.exc import TimeoutError as PoolTimeout

        try:
            fairy: Any = self._current().connect()
            if _is_over(fairy.driver_connection):
                fairy.invalidate()
                self._current().dispose()
                fairy = self._current().connect()
        except PoolTimeout:
            raise StoreUnavailableError(
                f"all {self._size} database connections of this process were in use for 10 s; raise "
                "ORCHESTRATOR_MAX_CONNECTIONS or start fewer threads"
            ) from None
        return fairy

    def close(self) -> None:
        """Close what is idle now, and what is lent when it comes back."""
        if self._pool is not None and self._owner == os.getpid():
            self._pool.dispose()
            self._pool = None


def _is_over(connection: Connection) -> bool:
    """Tell, without asking, whether the server has ended a connection that nothing was asked of: it has said so."""
    if connection.closed:
        return True
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    return bool(waiting.poll(0))
