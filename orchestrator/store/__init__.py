"""Everything that is SQL: schema, named statements, connections.

Functions take the caller's connection and never commit; the schema functions open their own.
"""

from orchestrator.store.schema import HEAD, check, migrate

__all__ = ["HEAD", "check", "migrate"]
