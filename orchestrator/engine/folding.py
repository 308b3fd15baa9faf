"""A run folded from what the database has of it, for whoever only looks.

Owns how a row of `runs` names what never changes about a run.  Must never drive a run: `cache` loads those that are.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from orchestrator.machine.fold import Fold, RunInfo
from orchestrator.machine.journal import decode_entry


def fold_of(run: dict[str, Any], rows: Iterable[tuple[int, datetime, Any]]) -> Fold:
    """Return the fold of a run's row and its journal rows."""
    parent = run["parent_id"] if run["root_id"] != run["id"] else ""  # a correcting run or an ended link is no child
    info = RunInfo(
        run["id"], run["saga"], run["version"], run["input"], run["started_at"], run["queue"], run["deadline_at"],
        run["priority"], parent, run["link"], run["since"],
    )  # fmt: skip
    fold = Fold(info)
    for _, at, entries in rows:
        fold.apply_row(at, [decode_entry(entry) for entry in entries])
    return fold
