"""Owns the order: the card is charged and the goods leave the shelf, or neither; the mail is a courtesy."""

from __future__ import annotations

from datetime import timedelta

from pydantic import BaseModel, ConfigDict, PositiveInt

from orchestrator import StepFailed, saga
from tasks import inventory, notifications, payments
from tasks.inventory import Pick
from tasks.money import Money
from tasks.notifications import Mail
from tasks.payments import Bill


class Order(BaseModel):
    """Ask for goods against a card."""

    model_config = ConfigDict(frozen=True)

    id: str
    sku: str
    quantity: PositiveInt
    total: Money
    card: str
    email: str


class OrderReceipt(BaseModel):
    """Confirm an order; ``confirmed`` says whether the customer has been told."""

    order_id: str
    charge_id: str
    paid: Money
    confirmed: bool


@saga.define(version=1, deadline=timedelta(hours=1))
async def order(request: Order) -> OrderReceipt:
    """Charge the card and take the goods from the shelf; if there are none, the charge is refunded."""
    charge = await saga.step(payments.charge, Bill(reference=request.id, card=request.card, money=request.total))
    await saga.step(inventory.deduct, Pick(reference=request.id, sku=request.sku, quantity=request.quantity))
    try:
        subject = f"Your order {request.id} is on its way"
        await saga.step(notifications.send, Mail(reference=request.id, recipient=request.email, subject=subject))
        confirmed = True
    except StepFailed:  # nobody returns the goods because of a mail
        confirmed = False
    return OrderReceipt(order_id=request.id, charge_id=charge.id, paid=charge.money, confirmed=confirmed)
