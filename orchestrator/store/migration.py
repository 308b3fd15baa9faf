"""Making the schema: Alembic, with the migrations inside the package.

Apart from `schema`, since workers check the schema and only people make it.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import NullPool

from orchestrator.codec import first_line
from orchestrator.errors import OrchestratorError, SchemaError, StoreUnavailableError
from orchestrator.failpoints import failpoint
from orchestrator.settings import Settings
from orchestrator.store.connection import ATTENTIVE
from orchestrator.store.schema import newer
from orchestrator.store.tables import SCHEMA

_LOCK = 7091237  # any constant: one migration at a time


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def migrate(database_url: str) -> list[str]:
    """Bring the schema up to this release; returns the revisions applied, none if it was up to date.

    Holds a transaction-scoped advisory lock, so that several may try at once.
    Raises: StoreUnavailableError; SchemaError if the database is newer than this code, or refuses.
    """
    settings = Settings.from_environment(database_url=database_url)
    # Read committed, whatever the role has by default: a migration sees what it has waited for.
    engine = create_engine(
        settings.sqlalchemy_url, poolclass=NullPool, connect_args=ATTENTIVE, isolation_level="READ COMMITTED"
    )
    try:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            failpoint("migrate.locked", connection)
            if connection.execute(text("SELECT to_regnamespace(:name)"), {"name": SCHEMA}).scalar() is None:
                # Not IF NOT EXISTS: who was given a schema may not be allowed to make one, and that is looked at first.
                connection.execute(text(f"CREATE SCHEMA {SCHEMA}"))
            applied = _upgrade(connection)
            failpoint("migrate.applied", connection)
        failpoint("migrate.after")
        return applied
    except DBAPIError as error:
        raise _told(error) from None
    finally:
        engine.dispose()


def _told(error: DBAPIError) -> OrchestratorError:
    if getattr(error.orig, "sqlstate", None) == "55P03":
        return StoreUnavailableError(
            "nothing was migrated: a lock could not be had in time, because another session holds what is to be "
            "changed; try again when it has ended its transaction (`saga doctor` tells of the oldest)"
        )
    if isinstance(error, OperationalError):
        return StoreUnavailableError(f"the database cannot be reached, nothing was migrated: {error.orig}")
    return SchemaError(f"nothing was migrated, Postgres refuses: {first_line(error.orig or error)}")


def _upgrade(connection: Connection) -> list[str]:
    before = _revision_of(connection)
    known = [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()][::-1]
    if before is not None and before not in known:
        raise SchemaError(newer(before))
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
