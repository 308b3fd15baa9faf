"""The app of the fault tests: imported by the workers that they start, and by nobody else.

Doorbells may be written to another broker than they are read from, so that a postman can stand between.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from celery import Celery

from orchestrator import Orchestrator, telemetry

app = Celery("faults", include=["tests.faults.steps", "tests.faults.sagas"])
if os.environ.get("FAULTS_NEWER"):
    app.conf.include = [*app.conf.include, "tests.faults.newer"]
if os.environ.get("FAULTS_BEAT_S"):
    app.conf.beat_schedule = {
        "often": {
            "task": "faults.trip", "schedule": float(os.environ["FAULTS_BEAT_S"]),
            "args": (json.loads(os.environ.get("FAULTS_BEAT_STOPS", "[]")),),
            "options": {"catch_up": os.environ.get("FAULTS_BEAT_CATCH_UP", "last")},
        }
    }  # fmt: skip
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_prefetch_multiplier = 1
app.conf.broker_heartbeat = 2
app.conf.worker_cancel_long_running_tasks_on_connection_loss = False
if os.environ.get("FAULTS_WRITE_TO"):
    app.conf.broker_write_url = os.environ["FAULTS_WRITE_TO"]
if os.environ.get("FAULTS_CONFIRM"):
    app.conf.broker_transport_options = {"confirm_publish": True}
if os.environ.get("FAULTS_POOL_START"):
    app.conf.worker_pool_start_method = os.environ["FAULTS_POOL_START"]
if os.environ.get("FAULTS_SOFT"):
    app.conf.worker_soft_shutdown_timeout = float(os.environ["FAULTS_SOFT"])
orchestrator = Orchestrator(app)


def _tell(event: telemetry.Event) -> None:
    """Write down what metrics and traces are made of."""
    with (Path(os.environ["FAULTS_FOLDER"]) / "telemetry").open("a") as file:
        file.write(f"{event!r}\n")


if os.environ.get("FAULTS_FOLDER"):
    telemetry.subscribe(_tell)
