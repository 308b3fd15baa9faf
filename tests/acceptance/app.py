"""The app of the acceptance tests: imported by the tests, and by the workers that they start."""

from __future__ import annotations

import os

from celery import Celery

from orchestrator import Orchestrator

app = Celery("acceptance", include=["tests.acceptance.steps", "tests.acceptance.sagas", "tests.acceptance.links"])
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1
app.conf.result_expires = 60
app.conf.task_default_queue = os.environ.get("ACCEPTANCE_QUEUE", "celery")  # a worker's steps stay on its own queue
if os.environ.get("ACCEPTANCE_POOL") == "spawn":
    app.conf.worker_pool_start_method = "spawn"
if os.environ.get("ACCEPTANCE_RESULTS"):
    app.conf.result_backend = os.environ["ACCEPTANCE_RESULTS"]
orchestrator = Orchestrator(app)
