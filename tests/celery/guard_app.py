"""The app of the guard's tests: its worker is a real one, started as a process of its own."""

from __future__ import annotations

import os
from typing import Any

import redis
from celery import Celery

from orchestrator.celery import guard

broker = os.environ["CELERY_BROKER_URL"]
url = os.environ.get("GUARD_RESULTS", broker)  # a broker that keeps no results needs another place for them
app = Celery("guarded", broker=broker, backend=url)
app.conf.update(worker_hijack_root_logger=True, worker_cancel_long_running_tasks_on_connection_loss=True)
app.conf.broker_connection_retry_on_startup = True
guard.install(
    app,
    guard.Limits(
        body_bytes=1024 * 1024,
        unknown_first_delay_s=0.1,
        unknown_longest_delay_s=0.2,
        unknown_patience_s=float(os.environ.get("GUARD_PATIENCE_S", "60")),
    ),
)


@app.task(name="add")
def add(x: int, y: int) -> int:
    return x + y


@app.task(name="note")
def note(*seen: Any) -> None:
    with redis.Redis.from_url(url) as client:
        client.rpush("noted", repr(seen))


@app.task(name="ring", bind=True, embeds_ignored=True)
def ring(self: Any) -> Any:
    request = self.request
    return [request.callbacks, request.errbacks, request.chain, request.chord, list(request.timelimit or ())]


if os.environ.get("GUARD_NEWER") == "1":

    @app.task(name="newer")
    def newer() -> str:
        return "done by the newer worker"
