"""Connections to Postgres, and what their failures mean to a person.

Owns how a connection is opened.  One that was opened before a fork must never be used after it: owners look at the pid.
"""

from __future__ import annotations

from typing import Any

import psycopg

from orchestrator.errors import StoreUnavailableError

Connection = psycopg.Connection[Any]
UNAVAILABLE = (psycopg.OperationalError, psycopg.InterfaceError)
REFUSED = psycopg.Error  # what is not a lost connection: a statement that the database refused


class CommitUnknown(Exception):
    """The connection was lost at COMMIT: nobody knows yet whether it happened."""


class TransactionFailed(Exception):
    """The transaction was rolled back for a reason that shows only when it ends; `reason` says which."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__(str(reason))
        self.reason = reason


def open_connection(dsn: str, *, name: str, prepare: bool = True) -> Connection:
    """Open an autocommit connection that Postgres shows as `name`.

    `prepare` off is for poolers that lend a connection for one transaction: no statement is prepared, and nothing is
    asked of the session but its time zone, which such poolers carry along.  Raises: StoreUnavailableError.
    """
    # Plans are kept, and every statement has its index: one that was planned while the tables were empty must not go on
    # scanning them when they are full.
    kept: Any = {"options": "-c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c timezone=UTC"}
    try:
        connection = psycopg.connect(
            dsn,
            autocommit=True,
            application_name=f"orchestrator {name}"[:63],
            connect_timeout=5,
            prepare_threshold=1 if prepare else None,
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
            tcp_user_timeout=25_000,  # keepalives are silent while something is under way and nobody takes it
            **(kept if prepare else {}),
        )
        if not prepare:
            connection.execute("SET timezone TO 'UTC'")
    except psycopg.OperationalError as error:
        raise unavailable(error) from None
    return connection


def unavailable(error: Exception) -> StoreUnavailableError:
    """Return the error that tells a person what to do; the connection string never shows in it."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return StoreUnavailableError(
        f"Postgres cannot be reached: {reason}. Nothing was recorded; "
        "check that it runs and that ORCHESTRATOR_DATABASE_URL points to it, then try again."
    )
