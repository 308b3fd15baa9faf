"""A run with its whole journal as JSON, to be kept as a file and replayed later.

Owns that form as it is read from the database; `orchestrator.testing.replay` takes it.
"""

from __future__ import annotations

from typing import Any

from orchestrator.store import runs
from orchestrator.store.connection import Connection
from orchestrator.store.missing import unknown_run


def recorded(connection: Connection, run_id: str) -> dict[str, Any]:
    """Return a run as it was recorded so far.  Raises: UnknownRunError."""
    row = runs.run(connection, run_id)
    if row is None:
        raise unknown_run(run_id, connection)
    family = {
        "parent": row["parent_id"] if row["root_id"] != run_id else None,
        "link": row["link"],
        "since": row["since"],
    }
    return {
        **{name: value for name, value in family.items() if value},
        "saga": row["saga"],
        "version": row["version"],
        "id": row["id"],
        "input": row["input"],
        "started": row["started_at"].isoformat(),
        "deadline": row["deadline_at"].isoformat() if row["deadline_at"] else None,
        "journal": [[at.isoformat(), entries] for _, at, entries in runs.history(connection, run_id)],
    }
