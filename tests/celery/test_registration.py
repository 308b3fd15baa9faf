"""What a declared step is as a Celery task."""

from __future__ import annotations

import warnings

import pytest
from celery import Celery
from celery.exceptions import Reject

from orchestrator import Orchestrator, saga, step


def test_a_step_has_its_queue_and_options_without_a_warning_of_celery() -> None:
    with Celery("registers", broker="memory://", set_as_current=False) as app:
        Orchestrator(app, database_url="postgresql://host/db")
        with warnings.catch_warnings():
            warnings.simplefilter("error")

            @step(name="registers.declared", queue="fast", rate_limit="3/s", throws=(KeyError,))
            def declared() -> None: ...

        task = app.tasks["registers.declared"]
        assert (task.queue, task.rate_limit, task.throws) == ("fast", "3/s", (KeyError,))


def test_a_message_that_comes_before_the_schema_stays_in_the_broker(empty_database_url: str) -> None:
    with Celery("early", broker="memory://", set_as_current=False) as app:
        Orchestrator(app, database_url=empty_database_url)

        @saga.define(name="early.saga")
        async def early() -> None: ...

        task = app.tasks["early.saga"]
        task.push_request(id="m-1", args=[], kwargs={})
        with pytest.raises(Reject, match="saga migrate") as rejected:
            task.run()
        task.pop_request()
        assert rejected.value.requeue
