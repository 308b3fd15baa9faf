"""Owns the world that the demo plays in: who has accounts, and what goes wrong outside."""

from __future__ import annotations

import random
from decimal import Decimal
from typing import Any

import httpx
from sqlalchemy import Connection, insert, update

from tasks import ledger
from tasks.ledger import House
from tasks.money import MINOR_DIGITS, Currency, Money

OPENING: dict[Currency, Decimal] = {"EUR": Decimal(2000), "USD": Decimal(2200), "JPY": Decimal(300_000)}
NAMES = ("ada", "bo", "chloe", "dario", "emre", "fatima", "goran", "hana", "ines", "jonas", "kofi", "lena")
SHOPS = ("bakery", "books", "bikes")
CROWD, PLANTED = 3000, 3  # accounts that only the reconciliation looks at, and some that are wrong
GOODS = ("SKU-LAMP", "SKU-CHAIR", "SKU-KETTLE")

# What a request must have in it to meet trouble outside.
LOST_CARD, REFUND_FAILS_TWICE, REFUND_DOWN = "tok_lost", "tok_refund_fails_twice", "tok_refund_down"
LOST_SKU = "SKU-LOST"
LOST_IBAN = "NL00LOST"
DOWN_HOST = "down.example"

LOST: dict[str, Any] = {"what": "lost", "verb": "do", "seconds": 0.05}  # it happens, and no answer comes
FAULTS: dict[str, dict[str, Any]] = {
    "a charge takes its time": {"what": "slow", "kind": "charges", "verb": "do", "seconds": 0.02},
    "charges without an answer": {**LOST, "kind": "charges", "holding": LOST_CARD},
    "picks without an answer": {**LOST, "kind": "picks", "holding": LOST_SKU},
    "debits without an answer": {**LOST, "kind": "debits", "holding": LOST_IBAN},
    "links without an answer": {**LOST, "kind": "links", "holding": LOST_IBAN},
    "refunds that fail twice": {
        "what": "error", "kind": "charges", "verb": "undo", "holding": REFUND_FAILS_TWICE, "times": 2
    },
    "refunds that fail": {"what": "error", "kind": "charges", "verb": "undo", "holding": REFUND_DOWN},
    "a host that is down": {"what": "error", "kind": "mails", "holding": DOWN_HOST},
    "a bank that stumbles": {"what": "error", "kind": "feeds", "times": 2},
}  # fmt: skip


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
    crowd = [{"id": f"crowd:{number:04}", "balance": 0} for number in range(CROWD)]
    planted = [{"id": f"planted:{number}", "balance": 5} for number in range(PLANTED)]  # and no entry says so
    conn.execute(insert(ledger.accounts).values(kind="customer", currency="EUR"), crowd + planted)
    for status in ("closed", "frozen"):
        named = ledger.accounts.c.id.like(f"%:{status}:%")
        conn.execute(update(ledger.accounts).values(status=status).where(named))


def switch_faults_on(outside_url: str) -> None:
    """Tell the outside world how to misbehave."""
    with httpx.Client(base_url=outside_url, trust_env=False) as http:
        for name, fault in FAULTS.items():
            http.put(f"/faults/{name}", json=fault).raise_for_status()


def a_currency(chance: random.Random) -> Currency:
    """Draw a currency."""
    return chance.choice(("EUR", "EUR", "EUR", "USD", "USD", "JPY"))


def an_amount(chance: random.Random, currency: Currency, *, too_much: bool = False) -> Money:
    """Draw an amount so small that no customer runs dry by chance, or more than all of them ever hold."""
    most = OPENING[currency] / 100 if not too_much else OPENING[currency] * 2
    share = Decimal(chance.randint(10, 100)) / 100 if not too_much else Decimal(1)
    return Money(currency=currency, amount=round(most * share, MINOR_DIGITS[currency]))


def a_card(twist: str) -> str:
    """Return the card that a twist asks for, else a good one."""
    return twist if twist.startswith("tok_") else "tok_visa"


def an_address(name: str, twist: str) -> str:
    """Return an address at the host that a twist asks for, else at a good one."""
    return f"{name}@{twist if twist.endswith('.example') else 'post.example'}"
