"""What beat may do at night, as Celery tasks: ``orchestrator.prune`` and ``orchestrator.reconcile``.

Owns their names and arguments, which are text and numbers, as an entry of beat's holds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.retention import age

if TYPE_CHECKING:
    from orchestrator.celery.app import Orchestrator


class Prune:
    """Let runs go that ended longer ago, such as ``90d``."""

    name = "orchestrator.prune"
    orchestrator: Orchestrator
    ignore_result = True

    def run(
        self,
        older_than: str,
        states: Sequence[str] = (),
        saga: str = "",
        limit: int | None = None,
        archive: str | None = None,
    ) -> dict[str, Any]:
        """Prune; returns what has gone."""
        told = self.orchestrator.prune(age(older_than), states=states, saga=saga, limit=limit, archive=archive)
        return told.as_json()


class Reconcile:
    """Run checks, or all of them, and write the report into a directory."""

    name = "orchestrator.reconcile"
    orchestrator: Orchestrator
    ignore_result = True

    def run(self, checks: Sequence[str] = (), directory: str | None = "reports") -> dict[str, Any]:
        """Reconcile; returns what the report came to."""
        report = self.orchestrator.reconcile(checks, directory=directory)
        return {"report": report.id, "breaks": report.breaks, "exit_code": report.exit_code}


TASKS = (Prune, Reconcile)
