"""Owns starting the jobs at a steady pace, as clients would, also while no worker is alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from sqlalchemy import Engine

import tasks.app  # noqa: F401 - binds the sagas to Celery, as an application does when it starts
from sagas.demo import promises
from sagas.demo.story import Job

RETRIED = 10  # every tenth client does not trust its luck and starts its run twice


class Feed(threading.Thread):
    """Start every job, at ``per_second``, and write down each whose start has returned."""

    def __init__(self, engine: Engine, jobs: Sequence[Job], per_second: float) -> None:
        super().__init__(name="feed", daemon=True)
        self.started = 0
        self._error: Exception | None = None
        self._engine, self._jobs, self._per_second = engine, jobs, per_second

    def run(self) -> None:
        """Start the jobs; an error ends the feed and is kept for the main thread."""
        began = time.monotonic()
        try:
            with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
                for number, job in enumerate(self._jobs):
                    time.sleep(max(0.0, began + number / self._per_second - time.monotonic()))
                    for _ in range(1 if number % RETRIED else 2):
                        job.act.saga.apply_async(job.arguments, task_id=job.id)
                    promises.note(conn, job)
                    self.started += 1
        except Exception as error:
            self._error = error

    def require_well(self) -> None:
        """Raises: what ended the feed before its last job."""
        if self._error is not None:
            raise self._error
