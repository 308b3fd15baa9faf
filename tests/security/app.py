"""The app of a worker that is sent what nobody should send; a test never imports it."""

from __future__ import annotations

from celery import Celery

from orchestrator import Orchestrator

app = Celery("security", include=["tests.security.sagas"])
app.conf.broker_connection_retry_on_startup = True
orchestrator = Orchestrator(app)
