"""A doorbell as a worker's main process handles it.

Owns what differs there from any other message.  Must be imported by workers alone, as they import much.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from time import monotonic
from typing import Any, ClassVar
from weakref import ref

from celery.worker import state
from celery.worker.request import Request

_PAUSE_S = 0.05  # a drain that finds nothing costs more than to pass over a doorbell


class DoorbellRequest(Request):
    """The message of a doorbell; one that comes too late is passed over and forgotten, if another one does as well.

    Else it is as good as any: it says that there is work.  Where more are rung than a busy main process can look at,
    all come too late, for as long as the work is not begun for which they are rung.
    """

    _latest: ClassVar[ref[Any] | None] = None  # the one that was let through last: those before it wait no longer
    _latest_at: ClassVar[float] = -math.inf

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.time_limits = None, None  # whatever the message says: a drain ends by itself, its steps have timeouts

    def maybe_expire(self) -> bool:
        """Tell whether it is passed over; Celery's own keeps the ids of all that were, up to 50,000 for three hours."""
        if self.expires is not None and datetime.now(UTC) > self.expires and self._another_does():
            return True
        DoorbellRequest._latest, DoorbellRequest._latest_at = ref(self), monotonic()
        return False

    def _another_does(self) -> bool:
        """Tell whether another one was let through a moment ago, or waits for a pool child still."""
        latest = DoorbellRequest._latest and DoorbellRequest._latest()
        if latest is self:  # Celery asks again before it is given to a pool child
            return False
        if monotonic() - DoorbellRequest._latest_at < _PAUSE_S:
            return True
        return latest is not None and latest in state.reserved_requests and latest not in state.active_requests
