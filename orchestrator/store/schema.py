"""Making and checking the schema.

Owns migrations (Alembic, inside the package) and the question whether a database fits this code.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from orchestrator.errors import SchemaError, StoreUnavailableError
from orchestrator.failpoints import failpoint
from orchestrator.settings import Settings
from orchestrator.store.connection import Connection as Psycopg
from orchestrator.store.tables import SCHEMA

HEAD = "0003"
_LOCK = 7091237  # any constant: one migration at a time


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def migrate(database_url: str) -> list[str]:
    """Bring the schema up to this release; returns the revisions applied, none if it was up to date.

    Holds a transaction-scoped advisory lock, so that several may try at once.
    Raises: StoreUnavailableError, SchemaError if the database is newer than this code.
    """
    settings = Settings.from_environment(database_url=database_url)
    engine = create_engine(settings.sqlalchemy_url, poolclass=NullPool)
    try:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            failpoint("migrate.locked", connection)
            connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
            applied = _upgrade(connection)
            failpoint("migrate.applied", connection)
        failpoint("migrate.after")
        return applied
    except OperationalError as error:
        raise StoreUnavailableError(f"the database cannot be reached, nothing was migrated: {error.orig}") from None
    finally:
        engine.dispose()


def _upgrade(connection: Connection) -> list[str]:
    before = _revision_of(connection)
    known = [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()][::-1]
    if before is not None and before not in known:
        raise SchemaError(_newer(before))
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    return known[known.index(before) + 1 :] if before else known


def _revision_of(connection: Connection) -> str | None:
    exists = connection.execute(text("SELECT to_regclass(:name)"), {"name": f"{SCHEMA}.alembic_version"}).scalar()
    if exists is None:
        return None
    revision = connection.execute(text(f"SELECT version_num FROM {SCHEMA}.alembic_version")).scalar()
    return str(revision) if revision else None


def check(connection: Psycopg) -> None:
    """Compare the database with this code.  Raises: SchemaError that says what to do."""
    exists = connection.execute("SELECT to_regclass('orchestrator.alembic_version')").fetchone()
    if exists is None or exists[0] is None:
        raise SchemaError("the database has no orchestrator schema; create it with `celery -A <your app> saga migrate`")
    row = connection.execute("SELECT version_num FROM orchestrator.alembic_version").fetchone()
    revision = row[0] if row else ""
    if revision > HEAD:
        raise SchemaError(_newer(revision))
    if revision < HEAD:
        raise SchemaError(
            f"the orchestrator schema is at revision {revision or 'none'}, this release needs {HEAD}; "
            "run `celery -A <your app> saga migrate`"
        )


def _newer(revision: str) -> str:
    return (
        f"the orchestrator schema is at revision {revision}, newer than this release knows (it knows {HEAD}); "
        "deploy the newer release here, or restore the older database"
    )
