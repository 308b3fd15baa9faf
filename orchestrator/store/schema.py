"""Does a database fit this code?

Owns the answer; `migration` makes the schema.
"""

from __future__ import annotations

from orchestrator.errors import SchemaError
from orchestrator.store.connection import Connection

HEAD = "0009"


def check(connection: Connection) -> None:
    """Compare the database with this code.  Raises: SchemaError that says what to do."""
    exists = connection.execute("SELECT to_regclass('orchestrator.alembic_version')").fetchone()
    if exists is None or exists[0] is None:
        raise SchemaError("the database has no orchestrator schema; create it with `celery -A <your app> saga migrate`")
    row = connection.execute("SELECT version_num FROM orchestrator.alembic_version").fetchone()
    revision = row[0] if row else ""
    if revision > HEAD:
        raise SchemaError(newer(revision))
    if revision < HEAD:
        raise SchemaError(
            f"the orchestrator schema is at revision {revision or 'none'}, this release needs {HEAD}; "
            "run `celery -A <your app> saga migrate`"
        )


def newer(revision: str) -> str:
    """Say what to do about a database that is ahead of this code."""
    return (
        f"the orchestrator schema is at revision {revision}, newer than this release knows (it knows {HEAD}); "
        "deploy the newer release here, or restore the older database"
    )
