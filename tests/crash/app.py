"""The app of the workers that die at the failpoints of the Celery layer; a test never imports it."""

from __future__ import annotations

from celery import Celery

from orchestrator import Orchestrator

app = Celery("crash", include=["tests.crash.workload"])
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1
app.conf.broker_transport_options = {"visibility_timeout": 3}  # what a dead worker had not acknowledged comes again
orchestrator = Orchestrator(app)
