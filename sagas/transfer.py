"""Owns the transfer: money leaves where it was and reaches a customer, or stays where it was."""

from __future__ import annotations

from datetime import timedelta

from pydantic import BaseModel

from orchestrator import saga
from tasks import transfers
from tasks.money import Money
from tasks.transfers import Transfer


class TransferReceipt(BaseModel):
    """Confirm a transfer with the ledger postings that made it; what another bank debited is no posting of ours."""

    transfer_id: str
    moved: Money
    debit_posting: int | None
    credit_posting: int


@saga.define(version=1, deadline=timedelta(hours=1))
async def transfer(request: Transfer) -> TransferReceipt:
    """Debit the source, credit the target. If the credit cannot be made, the debit is reversed."""
    debit = None
    if request.from_other_bank:
        await saga.step(transfers.pull, request)
    else:
        debit = (await saga.step(transfers.debit, request)).id
    credit = await saga.step(transfers.credit, request)
    return TransferReceipt(transfer_id=request.id, moved=request.money, debit_posting=debit, credit_posting=credit.id)
