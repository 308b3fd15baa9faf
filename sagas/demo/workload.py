"""Owns the demo's input: who has accounts, and a mix of requests in which every kind of trouble occurs.

Deterministic for a seed. Each job knows how it must end, so that the outcome can be judged, not just admired.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection, update

from sagas.order import Order, order
from sagas.payment import payment
from sagas.transfer import transfer
from tasks import ledger, provider, warehouse
from tasks.ledger import House
from tasks.money import MINOR_DIGITS, Currency, Money
from tasks.payments import Payment
from tasks.transfers import Transfer

OPENING: dict[Currency, Decimal] = {"EUR": Decimal(2000), "USD": Decimal(2200), "JPY": Decimal(300_000)}
NAMES = ("ada", "bo", "chloe", "dario", "emre", "fatima", "goran", "hana", "ines", "jonas", "kofi", "lena")
SHOPS = ("bakery", "books", "bikes")
GOODS = ("SKU-LAMP", "SKU-CHAIR", "SKU-KETTLE")
SOLD_OUT = "SKU-GONE"
PIECES = 1000
STARTS_PER_SECOND = 75.0

COMPLETED, UNDONE, PARKED = "completed", "undone", "parked"


@dataclass(frozen=True, slots=True)
class Story:
    """Describe one kind of request: its share of the whole, what is special about it, how it must end."""

    share: int
    says: str
    ends: str
    twist: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """A request to start, and how it must end."""

    id: str
    saga: Any
    request: Transfer | Order | Payment
    story: Story

    @property
    def money(self) -> Money:
        """Return the amount at stake."""
        return self.request.total if isinstance(self.request, Order) else self.request.money


TRANSFERS = (
    Story(100, "everything in order", COMPLETED),
    Story(15, "more than the account holds", UNDONE, "too much"),
    Story(12, "the receiving account is closed", UNDONE, "closed"),
    Story(8, "the receiving account is frozen: retried, then given up", UNDONE, "frozen"),
)
ORDERS = (
    Story(50, "everything in order", COMPLETED),
    Story(8, "the card is declined", UNDONE, provider.DECLINED),
    Story(8, "charged, but the answer is lost: the probe finds it", COMPLETED, provider.TIMEOUT_AFTER_CHARGE),
    Story(8, "sold out: the charge is refunded", UNDONE, SOLD_OUT),
    Story(6, "picked, but the answer is lost: goods and money go back", UNDONE, warehouse.SLOW_SKU),
    Story(4, "sold out, and the refund fails twice", UNDONE, provider.REFUND_FAILS_TWICE),
    Story(4, "the confirmation bounces: no reason to undo", COMPLETED, "bounce.example"),
    Story(2, "sold out, and the refund keeps failing: parked for a person", PARKED, provider.REFUND_DOWN),
)
PAYMENTS = (
    Story(45, "everything in order", COMPLETED),
    Story(8, "more than the wallet holds", UNDONE, "too much"),
    Story(8, "the card is declined: the hold is released", UNDONE, provider.DECLINED),
    Story(8, "charged, but the answer is lost: the probe finds it", COMPLETED, provider.TIMEOUT_AFTER_CHARGE),
    Story(3, "the merchant is closed: refused at the pivot, all undone", UNDONE, "closed"),
    Story(3, "settled, both mails fail: never reversed", COMPLETED, "down.example"),
)


def open_books(conn: Connection) -> None:
    """Open every account and give the customers their opening balance, in the caller's transaction."""
    for currency in OPENING:
        for house in House:
            ledger.open_account(conn, house.account(currency), "house", currency)
        for shop in (*SHOPS, "closed"):
            ledger.open_account(conn, f"merchant:{shop}:{currency}", "merchant", currency)
        for name in (*NAMES, "closed", "frozen"):
            account = f"customer:{name}:{currency}"
            ledger.open_account(conn, account, "customer", currency)
            opening = Money(currency=currency, amount=OPENING[currency])
            ledger.post(conn, "opening", account, House.EQUITY.account(currency), account, opening)
    for status in ("closed", "frozen"):
        named = ledger.accounts.c.id.like(f"%:{status}:%")
        conn.execute(update(ledger.accounts).values(status=status).where(named))


def fill_shelves() -> None:
    """Put goods on the warehouse's shelves."""
    for sku in (*GOODS, warehouse.SLOW_SKU):
        warehouse.receive(sku, PIECES)


def jobs(seed: int) -> list[Job]:
    """Return all jobs, shuffled, the same for the same seed."""
    chance = random.Random(seed)
    mixed = [
        *_jobs("transfer", transfer, TRANSFERS, _transfer, chance),
        *_jobs("order", order, ORDERS, _order, chance),
        *_jobs("payment", payment, PAYMENTS, _payment, chance),
    ]
    chance.shuffle(mixed)
    return mixed


def _jobs(name: str, saga: Any, stories: tuple[Story, ...], make: Any, chance: random.Random) -> Iterator[Job]:
    told = [story for story in stories for _ in range(story.share)]
    for number, story in enumerate(told, start=1):
        job_id = f"{name}-{number:03}"
        yield Job(job_id, saga, make(job_id, story.twist, chance), story)


def _transfer(job_id: str, twist: str, chance: random.Random) -> Transfer:
    currency = _currency(chance)
    source, target = chance.sample(NAMES, 2)
    if twist in ("closed", "frozen"):
        target = twist
    money = _money(chance, currency, too_much=twist == "too much")
    return Transfer(
        id=job_id, source=f"customer:{source}:{currency}", target=f"customer:{target}:{currency}", money=money
    )


def _order(job_id: str, twist: str, chance: random.Random) -> Order:
    sold_out = twist in (SOLD_OUT, provider.REFUND_FAILS_TWICE, provider.REFUND_DOWN)
    sku = twist if twist == warehouse.SLOW_SKU else SOLD_OUT if sold_out else chance.choice(GOODS)
    return Order(
        id=job_id,
        sku=sku,
        quantity=chance.randint(1, 4),
        total=_money(chance, "EUR"),
        card=_card(twist),
        email=_email(chance.choice(NAMES), twist),
    )


def _payment(job_id: str, twist: str, chance: random.Random) -> Payment:
    currency = _currency(chance)
    customer, shop = chance.choice(NAMES), chance.choice(SHOPS)
    return Payment(
        id=job_id,
        customer=f"customer:{customer}:{currency}",
        merchant=f"merchant:{'closed' if twist == 'closed' else shop}:{currency}",
        card=_card(twist),
        money=_money(chance, currency, too_much=twist == "too much"),
        customer_email=_email(customer, twist),
        merchant_email=_email(shop, twist),
    )


def _currency(chance: random.Random) -> Currency:
    return chance.choice(("EUR", "EUR", "EUR", "USD", "USD", "JPY"))


def _money(chance: random.Random, currency: Currency, *, too_much: bool = False) -> Money:
    # Small enough that no customer can run dry by chance, or more than all customers together ever hold.
    most = OPENING[currency] / 100 if not too_much else OPENING[currency] * 2
    share = Decimal(chance.randint(10, 100)) / 100 if not too_much else Decimal(1)
    return Money(currency=currency, amount=round(most * share, MINOR_DIGITS[currency]))


def _card(twist: str) -> str:
    return twist if twist.startswith("tok_") else "tok_visa"


def _email(name: str, twist: str) -> str:
    return f"{name}@{twist if twist.endswith('.example') else 'post.example'}"
