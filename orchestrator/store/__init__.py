"""Everything that is SQL: schema, named statements, connections.

Functions take the caller's connection and never commit; the schema functions open their own.
"""

from __future__ import annotations

from orchestrator.store.schema import HEAD, check

__all__ = ["HEAD", "check", "migrate"]


def migrate(database_url: str) -> list[str]:
    """Bring the schema up to this release; see `orchestrator.store.migration.migrate`."""
    from orchestrator.store.migration import (
        migrate,
    )  # Alembic takes half a second to import, and workers do not need it

    return migrate(database_url)
