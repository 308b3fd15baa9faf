"""Alembic's environment: runs on the connection that `orchestrator.store.migration` hands over."""

from __future__ import annotations

from alembic import context

from orchestrator.store.tables import SCHEMA, metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    version_table_schema=SCHEMA,
    include_schemas=True,
    transaction_per_migration=True,
)
with context.begin_transaction():
    context.run_migrations()
