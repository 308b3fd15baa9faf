"""Owns the wallet payment: reversible until it is finalised, and never reversed after."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from pydantic import BaseModel

from orchestrator import saga
from tasks import notifications, payments
from tasks.money import Money
from tasks.notifications import Mail
from tasks.payments import Payment


class PaymentReceipt(BaseModel):
    """Confirm a settled payment; ``notified`` counts the parties that could be told."""

    payment_id: str
    charge_id: str
    settled: Money
    notified: int


@saga.define(version=1, deadline=timedelta(hours=1))
async def payment(request: Payment) -> PaymentReceipt:
    """Hold the money, have the provider process it, settle, and tell both parties."""
    saga.tag(customer=request.customer, merchant=request.merchant)
    await saga.step(payments.validate, request)
    async with saga.lock("wallet", request.customer):  # no other payment comes between the look and the hold
        await saga.step(payments.check_balance, request)
        await saga.step(payments.hold, request)
    charge = await saga.step(payments.charge, request.bill)
    settled = await saga.step(payments.finalise, request)  # the pivot: from here only forward
    told = await asyncio.gather(
        saga.step(notifications.send, _mail(request, request.customer_email, "You paid")),
        saga.step(notifications.send, _mail(request, request.merchant_email, "You were paid")),
        return_exceptions=True,
    )
    return PaymentReceipt(
        payment_id=request.id,
        charge_id=charge.id,
        settled=settled.money,
        notified=sum(1 for outcome in told if not isinstance(outcome, BaseException)),
    )


def _mail(request: Payment, recipient: str, verb: str) -> Mail:
    return Mail(reference=request.id, recipient=recipient, subject=f"{verb} {request.money}: {request.id}")
