"""A doorbell as a worker's main process handles it.

Owns what differs there from any other message.  Must be imported by workers alone, as they import much.
"""

from __future__ import annotations

from datetime import UTC, datetime

from celery.worker.request import Request


class DoorbellRequest(Request):
    """The message of a doorbell; one that comes too late is passed over and forgotten."""

    def maybe_expire(self) -> bool:
        """Tell whether it is too late; Celery's own keeps the ids of all that were, up to 50,000 for three hours."""
        return self.expires is not None and datetime.now(UTC) > self.expires
