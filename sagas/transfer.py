"""Owns the transfer: money leaves one customer and reaches another, or stays where it was."""

from __future__ import annotations

from datetime import timedelta

from pydantic import BaseModel

from orchestrator import saga
from tasks import transfers
from tasks.money import Money
from tasks.transfers import Transfer


class TransferReceipt(BaseModel):
    """Confirm a transfer with the ledger postings that made it."""

    transfer_id: str
    moved: Money
    debit_posting: int
    credit_posting: int


@saga.define(version=1, deadline=timedelta(hours=1))
async def transfer(request: Transfer) -> TransferReceipt:
    """Debit the source, credit the target. If the credit cannot be made, the debit is reversed."""
    debit = await saga.step(transfers.debit, request)
    credit = await saga.step(transfers.credit, request)
    return TransferReceipt(
        transfer_id=request.id, moved=request.money, debit_posting=debit.id, credit_posting=credit.id
    )
