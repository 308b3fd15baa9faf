"""What is said of a run that is not there: there never was one, or it was pruned.

Owns that sentence.  Reads only.
"""

from __future__ import annotations

from orchestrator.errors import UnknownRunError
from orchestrator.store.connection import Connection

_PRUNED = "SELECT saga, state, pruned_at FROM orchestrator.pruned WHERE id = %s"


def unknown_run(run_id: str, connection: Connection | None = None) -> UnknownRunError:
    """Return the error for an id that no run has; with a connection it knows whether the run was pruned."""
    known = connection.execute(_PRUNED, (run_id,)).fetchone() if connection is not None else None
    if known is None:
        return UnknownRunError(f"there is no run {run_id!r:.600} in this database; look it up with `saga list`")
    saga, state, at = known
    return UnknownRunError(
        f"run {run_id!r:.600} of {saga} ended {state} and was pruned on {at:%Y-%m-%d}: what is left of it is in the "
        "archive, if there is one"
    )
