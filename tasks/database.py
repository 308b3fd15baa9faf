"""Owns the application's connections and its table registry; must never hold business rules.

Two doors, on purpose apart: a *transactional* step is handed its connection by the orchestrator and opens none;
``ledger_engine`` serves everything outside of a saga's transaction.
"""

from __future__ import annotations

import os
from functools import cache

from sqlalchemy import Engine, MetaData, create_engine, make_url, text
from sqlalchemy.schema import CreateSchema

metadata = MetaData()


def ledger_url() -> str:
    """Return the ledger's database URL: LEDGER_DATABASE_URL, else ORCHESTRATOR_DATABASE_URL."""
    url = os.environ.get("LEDGER_DATABASE_URL") or os.environ.get("ORCHESTRATOR_DATABASE_URL")
    if not url:
        raise RuntimeError("No database: set LEDGER_DATABASE_URL or ORCHESTRATOR_DATABASE_URL (postgresql://...).")
    return url


def ledger_engine() -> Engine:
    """Return this process's engine; never part of a saga's transaction."""
    return _engine(ledger_url())


def create_tables(engine: Engine) -> None:
    """Create every schema and table that the imported task modules declare; keep what exists."""
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(4201)"))  # several workers may start at once
        for schema in sorted({table.schema for table in metadata.tables.values() if table.schema}):
            connection.execute(CreateSchema(schema, if_not_exists=True))
        metadata.create_all(connection)


@cache
def _engine(url: str) -> Engine:
    # Built on first use, hence after the worker's fork. Two connections are plenty: one step runs at a time.
    return create_engine(
        make_url(url).set(drivername="postgresql+psycopg"),
        pool_size=2,
        pool_pre_ping=True,
        connect_args={"application_name": "tasks"},
    )
