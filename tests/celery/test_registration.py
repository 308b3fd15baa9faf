"""What a declared step is as a Celery task."""

from __future__ import annotations

import warnings

from celery import Celery

from orchestrator import Orchestrator, step


def test_a_step_has_its_queue_and_options_without_a_warning_of_celery() -> None:
    with Celery("registers", broker="memory://", set_as_current=False) as app:
        Orchestrator(app, database_url="postgresql://host/db")
        with warnings.catch_warnings():
            warnings.simplefilter("error")

            @step(name="registers.declared", queue="fast", rate_limit="3/s", throws=(KeyError,))
            def declared() -> None: ...

        task = app.tasks["registers.declared"]
        assert (task.queue, task.rate_limit, task.throws) == ("fast", "3/s", (KeyError,))
