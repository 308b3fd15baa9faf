"""What beat does at night, as Celery tasks: ``orchestrator.prune`` and ``orchestrator.reconcile``.

Owns their names and arguments, which are text and numbers, as an entry of beat's holds them, and the entries that beat
has of itself: an application's own entry for one of these tasks takes the place of ours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery.schedules import crontab

from orchestrator.engine.report_page import sentence
from orchestrator.retention import age
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.celery.app import Orchestrator

logger = logging.getLogger(__name__)


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
        logger.info("prune: %s runs are gone, %s were kept", told.total, told.kept)
        return told.as_json()


class Reconcile:
    """Run checks, or all of them, and write the report into a directory."""

    name = "orchestrator.reconcile"
    orchestrator: Orchestrator
    ignore_result = True

    def run(self, checks: Sequence[str] = (), directory: str | None = "reports") -> dict[str, Any]:
        """Reconcile; returns what the report came to."""
        report = self.orchestrator.reconcile(checks, directory=directory)
        for each in report.checks:
            if each.error:
                logger.error("reconcile: check %r could not be completed: %s", each.name, each.error)
        for problem in report.problems:
            logger.error("reconcile: %s", problem)
        logger.log(logging.WARNING if report.breaks else logging.INFO, "reconcile %s: %s", report.id, sentence(report))
        return {"report": report.id, "breaks": report.breaks, "exit_code": report.exit_code}


TASKS = (Prune, Reconcile)


def entries(settings: Settings, configured: Any) -> dict[str, Any]:
    """Return beat's own entries: reconcile every night; prune, where `retention` says what is old enough."""
    if not settings.nightly:
        return {}
    own = {"orchestrator.reconcile": {"task": Reconcile.name, "schedule": crontab(hour=3, minute=30)}}
    if settings.retention:
        prune = {"task": Prune.name, "schedule": crontab(hour=4, minute=30), "args": [settings.retention]}
        own["orchestrator.prune"] = prune
    known = configured.values() if isinstance(configured, Mapping) else ()
    theirs = [each.get("task") if isinstance(each, Mapping) else getattr(each, "task", None) for each in known]
    return {name: entry for name, entry in own.items() if entry["task"] not in theirs}
