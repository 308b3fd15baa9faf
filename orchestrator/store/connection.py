"""Connections to Postgres, and what their failures mean to a person.

Owns how a connection is opened.  One that was opened before a fork must never be used after it: owners look at the pid.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from datetime import UTC, datetime
from functools import cached_property
from time import monotonic
from typing import Any

import psycopg
from psycopg import postgres
from psycopg.abc import RV, Buffer, PQGen
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_to_dict
from psycopg.types import TypesRegistry
from psycopg.types.array import register_all_arrays
from psycopg.types.datetime import TimestamptzLoader
from psycopg.types.json import set_json_loads

from orchestrator.errors import ConfigurationError, StoreUnavailableError, UsageError

Connection = psycopg.Connection[Any]
READ_ONLY = psycopg.errors.ReadOnlySqlTransaction
# A standby takes no writes.  A process that stood still within a transaction has lost its connection.
UNAVAILABLE = (
    psycopg.OperationalError, psycopg.InterfaceError, READ_ONLY, psycopg.errors.IdleInTransactionSessionTimeout,
    psycopg.errors.TransactionTimeout,
)  # fmt: skip
CLOCK = "coalesce(%(now)s::timestamptz, orchestrator.now())"  # the database's, unless a caller names the moment
REFUSED = psycopg.Error  # what is not a lost connection: a statement that the database refused


class CommitUnknown(Exception):
    """The connection was lost at COMMIT: nobody knows yet whether it happened."""


class TransactionEnded(Exception):
    """A step's own code has ended its transaction, and not the engine: what it wrote before may stay."""


class TransactionFailed(Exception):
    """The transaction was rolled back for a reason that shows only when it ends; `reason` says which."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__(str(reason))
        self.reason = reason


def refuse_lost_rows(handed: Any) -> None:
    """Look whether a Session, if that is what a step was given, has rolled back what it wrote.  Raises: UsageError."""
    if not getattr(handed, "is_active", True):
        raise UsageError(
            "what its Session had written was rolled back as one of its flushes failed, and the step caught that error "
            "and returned; let it pass, or put what may fail into `with session.begin_nested():`"
        )


def refuse_ended(part: Any) -> None:
    """Look whether what a step writes in, a savepoint of SQLAlchemy, was ended by the step.  Raises: UsageError."""
    if not getattr(part, "is_active", True):
        raise UsageError(
            "the step has ended, by get_transaction() or get_nested_transaction(), what it was given to write in, so "
            "that its rows are not kept with its result; raise an exception to roll back, or use begin_nested() for a "
            "part"
        )


WORKER_PATIENCE_S = 20.0
"""How long a worker waits for an answer of the database; its statements take milliseconds, and are tried again."""
_CLIENT_PATIENCE_S = 60.0
ATTENTIVE: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,  # keepalives are silent while something is under way and nobody takes it
    "client_encoding": "UTF8",  # whatever the database's settings are: any text may be said
}
"""How every connection notices that the other side is gone, and what it speaks."""


def _adapters() -> AdaptersMap:
    own = AdaptersMap(types=TypesRegistry(postgres.types))
    postgres.register_default_adapters(own)
    register_all_arrays(own)
    set_json_loads(json.loads, own)
    return own


ADAPTERS = _adapters()
"""How values are read and written, whatever an application has told the driver for all of its connections."""


class _UtcLoader(TimestamptzLoader):
    """Reads an instant in UTC, whatever the time zone of its session is: a clock of a zone jumps."""

    def load(self, data: Buffer) -> datetime:
        return super().load(data).astimezone(UTC)


IN_UTC = AdaptersMap(ADAPTERS)
"""The same for a session that may be of another time zone, which is always UTC in our own."""
IN_UTC.register_loader("timestamptz", _UtcLoader)


class Patient(psycopg.Connection[Any]):
    """Waits for every answer, but not for ever: a peer may take what it is sent and never say anything again."""

    patience_s = _CLIENT_PATIENCE_S

    @cached_property
    def kept(self) -> psycopg.Cursor[Any]:
        """The cursor of `execute_often`, which knows already how values are sent and read."""
        return self.cursor()

    def close(self) -> None:
        """Close the connection, and let go of what refers to it in turn."""
        self.__dict__.pop("kept", None)
        super().close()

    def wait(self, gen: PQGen[RV], *args: Any, **options: Any) -> RV:
        """Wait for one answer; raises OperationalError, and is closed, after `patience_s`."""
        try:
            return super().wait(_within(gen, self.patience_s), *args, **options)
        except _Silent:
            self.close()
            raise
        except psycopg.InternalError as error:
            # Behind PgBouncer two say that the server is gone, it and the server itself: one too many for the driver at
            # a COMMIT or a savepoint.
            if self.closed and not isinstance(error, UNAVAILABLE):
                raise psycopg.OperationalError("the connection was lost") from error
            raise


def execute_often(connection: Connection, statement: str, values: Any) -> psycopg.Cursor[Any]:
    """Execute a statement of the hot path; its rows are to be read before the next one is executed.

    A new cursor finds out anew how each value is sent, which is a third of what a short statement costs the driver.
    """
    cursor = connection.kept if isinstance(connection, Patient) else connection.cursor()
    return cursor.execute(statement, values)


class _Silent(psycopg.OperationalError):
    """No answer came."""


def _within(waiting: PQGen[RV], seconds: float) -> Generator[Any, Any, RV]:
    """Wait as `waiting` does, which is woken several times a second even if nothing comes, for so many seconds."""
    until = monotonic() + seconds
    try:
        wanted = next(waiting)
        while True:
            ready = yield wanted
            if not ready and monotonic() > until:
                raise _Silent(f"no answer within {seconds:g} s; the connection was given up")
            wanted = waiting.send(ready)
    except StopIteration as ended:
        return ended.value  # type: ignore[no-any-return]


def open_connection(dsn: str, *, name: str, prepare: bool = True, patience_s: float = _CLIENT_PATIENCE_S) -> Connection:
    """Open an autocommit connection that Postgres shows as `name`, and that breaks if an answer takes `patience_s`.

    `prepare` off is for poolers that lend a connection for one transaction: no statement is prepared, and nothing is
    asked of the session but its time zone and the form of instants, which such poolers carry along.
    Raises: StoreUnavailableError, ConfigurationError.
    """
    # Plans are kept, and every statement has its index: one that was planned while the tables were empty must not go on
    # scanning them when they are full.  The driver reads instants in the form of ISO alone.  Who stands still within a
    # transaction, for its machine is paused or gone, keeps the rows that it has locked for half a minute at the most.
    kept = "-c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c timezone=UTC -c datestyle=ISO"
    kept += " -c idle_in_transaction_session_timeout=30s"
    kept += r" -c default_transaction_isolation=read\ committed"  # each statement sees what others committed before it
    try:
        given = conninfo_to_dict(dsn).get("options")  # which ours would take the place of
        options: Any = {"options": f"{given} {kept}" if given else kept} if prepare else {}
        connection = Patient.connect(
            dsn,
            autocommit=True,
            context=ADAPTERS,
            application_name=f"orchestrator {name}"[:63],
            prepare_threshold=1 if prepare else None,
            **ATTENTIVE,
            **options,
        )
        connection.patience_s = patience_s
        if not prepare:
            connection.execute("SET timezone TO 'UTC'")
            connection.execute("SET datestyle TO 'ISO'")
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED  # said at each BEGIN
    except psycopg.OperationalError as error:
        raise unavailable(error) from None
    except psycopg.ProgrammingError:  # which shows what it cannot read
        raise ConfigurationError(
            "the driver cannot read the database URL (database_url=, or ORCHESTRATOR_DATABASE_URL); look at its "
            "parameters, behind the question mark"
        ) from None
    return connection


def is_at_rest(connection: Connection) -> bool:
    """Tell whether a connection is open, and neither in a statement nor in a transaction."""
    return connection.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE


def is_in_statement(connection: Connection) -> bool:
    """Tell whether a connection waits for the end of a statement."""
    return connection.pgconn.transaction_status == psycopg.pq.TransactionStatus.ACTIVE


def unavailable(error: Exception, *, in_doubt: bool = False) -> StoreUnavailableError:
    """Return the error that tells a person what to do; the connection string never shows in it.

    `in_doubt` says that the connection was lost while something was under way.
    """
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    what = "takes no writes" if isinstance(error, READ_ONLY) else "cannot be reached"
    then = "check that it runs and that ORCHESTRATOR_DATABASE_URL points to it, then try again"
    if not in_doubt:
        return StoreUnavailableError(f"Postgres {what}: {reason}. Nothing was recorded; {then}.")
    told = StoreUnavailableError(
        f"Postgres {what}: {reason}. The connection was lost under way, so that it may have been recorded all the "
        f"same; {then}, with the same id."
    )
    told.in_doubt = True
    return told
