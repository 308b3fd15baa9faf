"""The app of the workers; a test never imports it."""

from __future__ import annotations

from celery import Celery

from orchestrator import Orchestrator

app = Celery("limits", include=["tests.limits.steps"])
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1
orchestrator = Orchestrator(app)
