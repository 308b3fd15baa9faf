"""Runs with their whole journals as JSON, to be kept as files and replayed later.

Owns that form as it is read from the database; `orchestrator.testing.replay` takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from orchestrator.store import runs
from orchestrator.store.connection import Connection
from orchestrator.store.journals import with_journals
from orchestrator.store.missing import unknown_run

_AT_ONCE = 100  # runs of several that are in memory


def recorded(connection: Connection, run_id: str) -> dict[str, Any]:
    """Return a run as it was recorded so far.  Raises: UnknownRunError."""
    row = runs.run(connection, run_id)
    if row is None:
        raise unknown_run(run_id, connection)
    journal = [[at.isoformat(), entries] for _, at, entries in runs.history(connection, run_id)]
    return {**head(row), "journal": journal}


def head(row: dict[str, Any]) -> dict[str, Any]:
    """Return what is recorded of a run besides its journal, from its row."""
    family = {
        "parent": row["parent_id"] if row["root_id"] != row["id"] else None,
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
    }


_ROWS = f"SELECT {', '.join(runs.RUN_COLUMNS)} FROM orchestrator.runs WHERE id = ANY (%s) ORDER BY id"


def several(
    connection: Connection, run_ids: Sequence[str]
) -> Iterator[tuple[dict[str, Any], Iterator[tuple[datetime, str]]]]:
    """Yield the rows of those of these runs that are there, each with its journal: instants, and entries as JSON text.

    A journal is to be read before the next row is; few rows and no whole journal are in memory (primary keys).  The
    caller opens the transaction, a snapshot.
    """
    for first in range(0, len(run_ids), _AT_ONCE):
        ids = list(run_ids[first : first + _AT_ONCE])
        found = connection.execute(_ROWS, (ids,)).fetchall()
        rows = {row[0]: dict(zip(runs.RUN_COLUMNS, row, strict=True)) for row in found}
        yield from with_journals(connection, rows, "run_id = ANY (%s)", (ids,), "at, entries::text")
