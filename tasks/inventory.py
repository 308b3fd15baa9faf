"""Owns taking goods for an order, next to its undo; the shelves themselves are the warehouse's matter.

There is no probe: the warehouse cannot be asked, so that goods of which nobody knows whether they were taken go back.
"""

from __future__ import annotations

from datetime import timedelta

from pydantic import BaseModel, ConfigDict, PositiveInt

from orchestrator import RetryPolicy, step
from tasks.outside import client

RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_attempts=3)


class Pick(BaseModel):
    """Ask for goods, once per reference."""

    model_config = ConfigDict(frozen=True)

    reference: str
    sku: str
    quantity: PositiveInt


@step
def restock(pick: Pick) -> None:
    """Return goods that were picked, or may have been; a pick that comes late will be refused."""
    client.undo("picks", pick.reference)


@step(compensate=restock, retry=RETRY, start_to_close_timeout=timedelta(seconds=10))
def deduct(pick: Pick) -> None:
    """Take goods from the shelf. Raises: Refused, a rejection; httpx.HTTPError if nobody knows."""
    client.do("picks", pick.reference, pick.model_dump(include={"sku", "quantity"}))
