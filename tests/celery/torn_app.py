"""The app of a worker that gets a SIGQUIT just when it has written the first part of a message to a pool child.

Owns that moment: it is when the file TORN_WHEN is there.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import billiard.pool
from celery import Celery

from orchestrator import Orchestrator
from orchestrator.celery import worker

app = Celery("torn", broker=os.environ.get("CELERY_BROKER_URL"))
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_soft_shutdown_timeout = 0.5
orchestrator = Orchestrator(app)
worker._COLD_S = 3.0
_main, _when = os.getpid(), os.environ.get("TORN_WHEN", "")
_really: Callable[[Any], Callable[[Any, int], int]] = billiard.pool._get_send_offset


def _get_send_offset(connection: Any) -> Callable[[Any, int], int]:
    send = _really(connection)

    def torn(part: Any, offset: int) -> int:
        sent = send(part, offset)
        if os.getpid() == _main and len(part) == 4 and os.path.exists(_when):
            os.unlink(_when)
            os.kill(_main, signal.SIGQUIT)
        return sent

    return torn


billiard.pool._get_send_offset = _get_send_offset
