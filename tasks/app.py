"""Owns the Celery app and binds the orchestrator to it; must never hold business code.

The database comes from ORCHESTRATOR_DATABASE_URL, the broker from CELERY_BROKER_URL.
"""

from __future__ import annotations

from celery import Celery

from orchestrator import Orchestrator

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
