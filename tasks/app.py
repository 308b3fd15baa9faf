"""Owns the Celery app and binds the orchestrator to it; must never hold business code.

The database comes from ORCHESTRATOR_DATABASE_URL, the broker from CELERY_BROKER_URL, the outside world from
OUTSIDE_URL; a worker that has none starts one of its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Celery, signals
from celery.schedules import crontab

from orchestrator import Orchestrator
from tasks.database import create_tables, ledger_engine
from tasks.outside.process import Process

app = Celery(
    "tasks",
    include=[
        "tasks.banking",
        "tasks.checks",
        "tasks.customers",
        "tasks.inventory",
        "tasks.models",
        "tasks.notifications",
        "tasks.payments",
        "tasks.reconciliation",
        "tasks.transfers",
        "sagas.onboarding",
        "sagas.order",
        "sagas.payment",
        "sagas.reconciliation",
        "sagas.sync",
        "sagas.training",
        "sagas.transfer",
    ],
)
app.conf.beat_schedule = {
    "reconcile": {
        "task": "sagas.reconciliation.reconciliation",
        "schedule": crontab(hour=2, minute=30),
        "options": {"overlap": "skip"},
    },
    "reconcile the runs": {"task": "orchestrator.reconcile", "schedule": crontab(hour=3, minute=30)},
}
orchestrator = Orchestrator(app)
started: list[Process] = []  # ends with the worker that keeps it


@signals.worker_init.connect
def prepare(**_: Any) -> None:
    """Create the business tables, so that ``saga dev`` has something to work on; they are kept if they are there."""
    engine = ledger_engine()
    create_tables(engine)
    engine.dispose()  # the pool forks next, and a child opens its own
    if "OUTSIDE_URL" not in os.environ:
        started.append(Process(Path(".dev/outside.jsonl")))
        os.environ["OUTSIDE_URL"] = started[0].url
