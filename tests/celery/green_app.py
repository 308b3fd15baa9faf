"""The app of a worker with a pool that is said to be made of greenlets; started as a process of its own."""

from __future__ import annotations

from celery import Celery
from celery.concurrency.solo import TaskPool

from orchestrator import Orchestrator


class Green(TaskPool):
    """What Celery asks to tell pools of gevent and eventlet, neither of which is needed to test this."""

    is_green = True


app = Celery("green")
app.conf.task_default_queue = "green"
orchestrator = Orchestrator(app, database_url="postgresql://nobody@127.0.0.1:1/none")
