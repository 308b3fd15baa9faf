"""The reference application for workers that die, and for a beat whose nights are short.

A pool child ends as SIGKILL ends it, where an order says so. An order is a file ``<run> <task>``: the child that runs
this task for this run, or for a child of this run, dies when the task's code is through and before its outcome is
committed, the moment that hurts most. An order is obeyed once.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from celery.signals import task_postrun

from orchestrator import step
from tasks.app import app, orchestrator
from tests.reference import regretted

__all__ = ["app", "orchestrator", "regretted"]

app.conf.beat_schedule["reconcile"]["schedule"] = 1.0  # a night a second


@task_postrun.connect
def obey(task: Any, **_: Any) -> None:
    """Die, if there is an order."""
    try:
        run = step.current().run_id.partition("/")[0]
        (Path(os.environ["REFERENCE_ORDERS"]) / f"{run} {task.name}").unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
