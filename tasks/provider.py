"""Stands in for a payment provider: its own schema, its own connections, its own rules.

What the application may know of it is what a real provider tells: the answers of ``charge``, ``refund`` and
``find``. It keeps the contract that an external effect must keep to be undoable:

- a charge is made once per idempotency key, however often it is asked for;
- a refund is remembered even if there is nothing to refund, and a charge that arrives after it is refused.

Some card tokens misbehave, as the test cards of real providers do. PROVIDER_LATENCY_SECONDS is the time
that the answer to a charge takes.
"""

from __future__ import annotations

import os
import time

from pydantic import BaseModel, ConfigDict
from sqlalchemy import (
    CheckConstraint,
    Column,
    Connection,
    DateTime,
    Integer,
    Numeric,
    Table,
    Text,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from orchestrator import Rejected
from tasks import effects
from tasks.database import metadata, outside_engine
from tasks.money import Money

DECLINED = "tok_declined"
TIMEOUT_AFTER_CHARGE = "tok_timeout_after_charge"
REFUND_FAILS_TWICE = "tok_refund_fails_twice"
REFUND_DOWN = "tok_refund_down"

charges = Table(
    "charges",
    metadata,
    Column("key", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("card", Text),
    Column("currency", Text),
    Column("amount", Numeric(20, 4)),
    Column("refund_attempts", Integer, nullable=False, server_default="0"),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    CheckConstraint("state in ('charged', 'refunded', 'never')", name="charges_state"),
    CheckConstraint("(state = 'never') = (amount is null)", name="charges_amount"),
    schema="provider",
)


class Charge(BaseModel):
    """Prove that a card was charged."""

    model_config = ConfigDict(frozen=True)

    id: str
    money: Money


class CardDeclined(Rejected):
    """Say that the card was not charged: the bank said no."""


class ChargeRefused(Rejected):
    """Say that nothing was charged: this key was refunded before, or names another amount."""


def charge(key: str, card: str, money: Money) -> Charge:
    """Charge a card, once per key.

    Raises: CardDeclined, ChargeRefused; TimeoutError if the provider does not answer, charged or not.
    """
    if card == DECLINED:
        raise CardDeclined("The bank declined the card.")
    with outside_engine().begin() as conn:
        row = {
            "key": key,
            "state": "charged",
            "card": card,
            "currency": money.currency,
            "amount": money.amount,
        }
        new = conn.scalar(insert(charges).values(row).on_conflict_do_nothing().returning(charges.c.key)) is not None
        found = _find(conn, key)
    if new:
        effects.record("charge", key)
    time.sleep(float(os.environ.get("PROVIDER_LATENCY_SECONDS", "0")))  # charged already, and nobody knows yet
    if found != Charge(id=key, money=money):
        raise ChargeRefused(f"The key {key} was refunded before, or names another amount.")
    if card == TIMEOUT_AFTER_CHARGE:
        raise TimeoutError("The provider did not answer in time.")
    return found


def refund(key: str) -> None:
    """Refund the charge made under ``key``, once; with none there, remember to refuse it.

    Raises: ConnectionError while refunds are out of order for this card.
    """
    with outside_engine().begin() as conn:
        conn.execute(insert(charges).values(key=key, state="never").on_conflict_do_nothing())
        counted = update(charges).values(refund_attempts=charges.c.refund_attempts + 1)
        row = conn.execute(counted.where(charges.c.key == key).returning(charges)).one()
    if row.card == REFUND_DOWN or (row.card == REFUND_FAILS_TWICE and row.refund_attempts <= 2):
        raise ConnectionError("The provider cannot refund this card right now.")
    with outside_engine().begin() as conn:
        refunded = update(charges).values(state="refunded", updated_at=func.now())
        done = conn.execute(refunded.where(charges.c.key == key, charges.c.state == "charged")).rowcount
    if done:
        effects.record("refund", key)


def find(key: str) -> Charge | None:
    """Return the charge made under ``key`` and not refunded, if there is one."""
    with outside_engine().begin() as conn:
        return _find(conn, key)


def _find(conn: Connection, key: str) -> Charge | None:
    row = conn.execute(select(charges).where(charges.c.key == key, charges.c.state == "charged")).one_or_none()
    return None if row is None else Charge(id=key, money=Money(currency=row.currency, amount=row.amount))
