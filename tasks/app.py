"""Owns the Celery app and binds the orchestrator to it; must never hold business code.

The database comes from ORCHESTRATOR_DATABASE_URL, the broker from CELERY_BROKER_URL.
"""

from __future__ import annotations

from typing import Any

from celery import Celery, signals

from orchestrator import Orchestrator
from tasks.database import create_tables, ledger_engine

app = Celery(
    "tasks",
    include=[
        "tasks.inventory",
        "tasks.notifications",
        "tasks.payments",
        "tasks.transfers",
        "sagas.order",
        "sagas.payment",
        "sagas.transfer",
    ],
)
orchestrator = Orchestrator(app)


@signals.worker_init.connect
def prepare(**_: Any) -> None:
    """Create the business tables, so that ``saga dev`` has something to work on; they are kept if they are there."""
    engine = ledger_engine()
    create_tables(engine)
    engine.dispose()  # the pool forks next, and a child opens its own
