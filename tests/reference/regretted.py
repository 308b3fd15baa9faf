"""A saga of which a transfer is a part, so that a transfer that was made is taken back."""

from __future__ import annotations

from orchestrator import saga
from sagas.transfer import Transfer, transfer


@saga.define(name="tests.regretted")
async def regretted(request: Transfer) -> None:
    """Make a transfer, and fail."""
    await saga.child(transfer, request)
    raise ConnectionError("the larger thing failed")
