"""Owns the steps that take money: card charges and wallet payments, each do next to its undo.

Steps that post to the ledger are transactional. The card is charged by somebody else: that can have happened
although no answer came, so it has an undo that needs no answer, and a probe that asks.
"""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection

from orchestrator import Effect, Rejected, RetryPolicy, step
from tasks import ledger
from tasks.database import ledger_engine
from tasks.ledger import House, InsufficientFunds, Posting
from tasks.money import Money
from tasks.outside import client

LIMITS = {"EUR": Decimal(5000), "USD": Decimal(5000), "JPY": Decimal(750_000)}

RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_attempts=4)
REFUND_RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=500), maximum_attempts=4)


class Bill(BaseModel):
    """Ask for a card to be charged, once per reference."""

    model_config = ConfigDict(frozen=True)

    reference: str
    card: str
    money: Money


class Charge(BaseModel):
    """Prove that a card was charged."""

    model_config = ConfigDict(frozen=True)

    id: str
    money: Money


class Payment(BaseModel):
    """Ask to pay a merchant from a customer's wallet."""

    model_config = ConfigDict(frozen=True)

    id: str
    customer: str
    merchant: str
    card: str
    money: Money
    customer_email: str
    merchant_email: str

    @property
    def bill(self) -> Bill:
        """Return what the provider is asked to charge."""
        return Bill(reference=self.id, card=self.card, money=self.money)


class InvalidPayment(Rejected):
    """Say that the payment breaks a rule; nothing was done."""


# Cards ----------------------------------------------------------------------------------------------------


@step(retry=REFUND_RETRY)
def refund(bill: Bill) -> None:
    """Refund a charge that happened, or may have: the bill's reference is all the provider needs."""
    client.undo("charges", bill.reference)


@step(compensate=refund, retry=RETRY, start_to_close_timeout=timedelta(seconds=10))
def charge(bill: Bill) -> Charge:
    """Charge a card. Raises: Refused, a rejection; httpx.HTTPError if nobody knows."""
    # The key is the bill's own reference and not step.current().idempotency_key: the refund must find the
    # charge also when its answer was lost, and then knows of it only what went in.
    body = bill.model_dump(mode="json", include={"card", "money"})
    return Charge.model_validate(client.do("charges", bill.reference, body))


@charge.probe
def find_charge(bill: Bill) -> Charge | None:
    """Ask the provider whether a charge without an answer happened; one that did not is refused should it come yet."""
    found = client.find_for_good("charges", bill.reference)
    return None if found is None else Charge.model_validate(found)


# Wallet payments ------------------------------------------------------------------------------------------


@step(effect=Effect.NONE)
def validate(payment: Payment) -> None:
    """Refuse a payment that breaks a rule."""
    limit = LIMITS[payment.money.currency]
    if not 0 < payment.money.amount <= limit:
        raise InvalidPayment(f"A payment is more than 0 and at most {limit:,}, not {payment.money}.")


@step(effect=Effect.NONE)
def check_balance(payment: Payment) -> Money:
    """Return what the wallet holds, and refuse early and kindly what it cannot pay.

    A look, not a promise: another payment may come between. What decides is ``hold``, under the account's
    lock.
    """
    with ledger_engine().connect() as conn:
        held = ledger.available(conn, payment.customer)
    if held.amount < payment.money.amount:
        raise InsufficientFunds(f"Account {payment.customer} holds less than {payment.money}.")
    return held


@step(transactional=True)
def release(conn: Connection, payment: Payment) -> None:
    """Give the held money back to the wallet, if it was held."""
    ledger.reverse(conn, "hold", payment.id)


@step(transactional=True, compensate=release, retry=RETRY)
def hold(conn: Connection, payment: Payment) -> Posting:
    """Make the payment pending: its money leaves the wallet and waits on the house's pending account."""
    pending = House.PENDING.account(payment.money.currency)
    return ledger.post(conn, "hold", payment.id, payment.customer, pending, payment.money)


@step(transactional=True, effect=Effect.PIVOT, retry=RETRY)
def finalise(conn: Connection, payment: Payment) -> Posting:
    """Settle: the pending money becomes the merchant's. The point of no return."""
    pending = House.PENDING.account(payment.money.currency)
    return ledger.post(conn, "settle", payment.id, pending, payment.merchant, payment.money)
