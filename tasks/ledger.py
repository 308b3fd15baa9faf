"""Owns the double-entry ledger: accounts, postings and their entries; must never commit or call outside.

Every posting moves one amount from one account to another and writes two entries that sum to zero, so the
sum over all entries of a currency is zero at every moment, also while a transfer is under way: its money
then stands on a house account. Customer accounts carry a running balance, guarded by a row lock and a
CHECK. House and merchant accounts do not: their balance is the sum of their entries, or every transfer
would queue on one hot row.

A posting's reference is not unique: that a transactional step takes effect exactly once is the
orchestrator's promise, and the checks count postings to see it kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Numeric,
    Row,
    Table,
    Text,
    func,
    insert,
    select,
    text,
    update,
)

from orchestrator import Rejected
from tasks.database import metadata
from tasks.money import Currency, Money

MONEY = Numeric(20, 4)  # finer than any currency's minor unit, never a float

accounts = Table(
    "accounts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("currency", Text, nullable=False),
    Column("status", Text, nullable=False, server_default="open"),
    Column("balance", MONEY),
    CheckConstraint("kind in ('customer', 'merchant', 'house')", name="accounts_kind"),
    CheckConstraint("status in ('open', 'frozen', 'closed')", name="accounts_status"),
    CheckConstraint("(kind = 'customer') = (balance is not null)", name="accounts_customers_carry_a_balance"),
    CheckConstraint("balance >= 0", name="accounts_never_overdrawn"),
    schema="ledger",
)

postings = Table(
    "postings",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("reference", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("reverses", BigInteger, ForeignKey("ledger.postings.id"), unique=True),
    Column("posted_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Index("postings_by_reference", "reference", "kind"),
    schema="ledger",
)

entries = Table(
    "entries",
    metadata,
    Column("posting_id", BigInteger, ForeignKey("ledger.postings.id"), primary_key=True),
    Column("account_id", Text, ForeignKey("ledger.accounts.id"), primary_key=True),
    Column("currency", Text, nullable=False),
    Column("amount", MONEY, nullable=False),
    CheckConstraint("amount <> 0", name="entries_amount_not_zero"),
    Index("entries_by_account", "account_id"),
    schema="ledger",
)


POST_MANY = text("""
    with given as (
        select * from unnest(cast(:references as text[]), cast(:amounts as numeric[])) as given (reference, amount)
    ), posted as (
        insert into ledger.postings (kind, reference) select :kind, reference from given returning id, reference
    )
    insert into ledger.entries (posting_id, account_id, currency, amount)
    select posted.id, side.account_id, :currency, side.sign * given.amount
    from posted join given on given.reference = posted.reference
    cross join (values (cast(:source as text), -1), (cast(:target as text), 1)) as side (account_id, sign)
""")


class House(StrEnum):
    """Name the house accounts; there is one of each per currency."""

    EQUITY = "house:equity"
    TRANSIT = "house:transit"
    PENDING = "house:pending"
    NOSTRO = "house:nostro"  # ours, at another bank

    def account(self, currency: Currency) -> str:
        """Return the account id for one currency."""
        return f"{self.value}:{currency}"


class Posting(BaseModel):
    """Say what was posted."""

    model_config = ConfigDict(frozen=True)

    id: int
    reference: str
    kind: str
    money: Money


class InsufficientFunds(Rejected):
    """Say that an account does not hold the amount; nothing was posted."""


class AccountUnusable(Rejected):
    """Say that an account is missing, closed or in another currency; nothing was posted."""


class AccountFrozenError(Exception):
    """Say that an account is frozen for now: worth another try later."""


def open_account(conn: Connection, account_id: str, kind: str, currency: Currency) -> None:
    """Open an account with nothing on it, in the caller's transaction; keep it as it is if it exists."""
    exists = conn.scalar(select(accounts.c.id).where(accounts.c.id == account_id))
    if exists is None:
        balance = Decimal(0) if kind == "customer" else None
        conn.execute(insert(accounts).values(id=account_id, kind=kind, currency=currency, balance=balance))


def post(conn: Connection, kind: str, reference: str, source: str, target: str, money: Money) -> Posting:
    """Move ``money`` from ``source`` to ``target`` in the caller's transaction; do not commit.

    Raises: InsufficientFunds, AccountUnusable, AccountFrozenError; then nothing was posted.
    """
    held = _lock(conn, source, target)
    for account_id in (source, target):
        _require_usable(account_id, held.get(account_id), money)
    return _write(conn, held, _Move(kind, reference, source, target, money))


def post_many(
    conn: Connection, kind: str, source: str, target: str, currency: Currency, amounts: Mapping[str, Decimal]
) -> None:
    """Post one movement for each reference, between accounts that carry no balance; do not commit."""
    names = {"kind": kind, "source": source, "target": target, "currency": currency}
    conn.execute(POST_MANY, {**names, "references": list(amounts), "amounts": list(amounts.values())})


def reverse(conn: Connection, kind: str, reference: str) -> Posting | None:
    """Post the opposite of what ``kind`` posted under ``reference``, once; None if nothing is left of it.

    In the caller's transaction; does not commit. A frozen or closed account does not stop it: money goes
    back where it came from. Raises: InsufficientFunds if the receiver no longer holds the amount.
    """
    found = _unreversed(conn, kind, reference)
    if not found:
        return None
    taken, given = found
    held = _lock(conn, taken.account_id, given.account_id)
    money = Money(currency=given.currency, amount=given.amount)
    back = _Move(f"undo {kind}", reference, given.account_id, taken.account_id, money, given.posting_id)
    return _write(conn, held, back)


def available(conn: Connection, account_id: str) -> Money:
    """Return what a customer account holds now. Raises: AccountUnusable."""
    row = conn.execute(select(accounts).where(accounts.c.id == account_id)).one_or_none()
    if row is None or row.balance is None:
        raise AccountUnusable(f"There is no customer account {account_id}.")
    return Money(currency=row.currency, amount=row.balance)


@dataclass(frozen=True, slots=True)
class _Move:
    """What a posting is about to do."""

    kind: str
    reference: str
    source: str
    target: str
    money: Money
    reverses: int | None = None


def _lock(conn: Connection, *account_ids: str) -> dict[str, Row[Any]]:
    # Customer rows are locked, in order of id, so two postings never wait for each other in a ring; the
    # others are only read, because nothing is maintained on them.
    wanted = select(accounts).where(accounts.c.id.in_(account_ids)).order_by(accounts.c.id)
    customers = conn.execute(wanted.where(accounts.c.kind == "customer").with_for_update()).all()
    others = conn.execute(wanted.where(accounts.c.kind != "customer")).all()
    return {row.id: row for row in (*customers, *others)}


def _require_usable(account_id: str, account: Row[Any] | None, money: Money) -> None:
    if account is None:
        raise AccountUnusable(f"There is no account {account_id}.")
    if account.currency != money.currency:
        raise AccountUnusable(f"Account {account_id} is in {account.currency}, not in {money.currency}.")
    if account.status == "closed":
        raise AccountUnusable(f"Account {account_id} is closed.")
    if account.status == "frozen":
        raise AccountFrozenError(f"Account {account_id} is frozen for now.")


def _write(conn: Connection, held: dict[str, Row[Any]], move: _Move) -> Posting:
    money, balance = move.money, held[move.source].balance
    if balance is not None and balance < money.amount:
        raise InsufficientFunds(f"Account {move.source} holds less than {money}.")
    header = insert(postings).values(kind=move.kind, reference=move.reference, reverses=move.reverses)
    posting_id = conn.execute(header.returning(postings.c.id)).scalar_one()
    lines = {move.source: -money.amount, move.target: money.amount}
    common = {"posting_id": posting_id, "currency": money.currency}
    conn.execute(insert(entries), [{**common, "account_id": a, "amount": m} for a, m in lines.items()])
    for account_id, amount in lines.items():
        if held[account_id].kind == "customer":
            changed = update(accounts).values(balance=accounts.c.balance + amount)
            conn.execute(changed.where(accounts.c.id == account_id))
    return Posting(id=posting_id, reference=move.reference, kind=move.kind, money=money)


def _unreversed(conn: Connection, kind: str, reference: str) -> list[Row[Any]]:
    """Return the two entries, payer first, of a posting not reversed yet; its row is locked."""
    undo = postings.alias("undo")
    found = conn.scalar(
        select(postings.c.id)
        .where(postings.c.reference == reference, postings.c.kind == kind)
        .where(~select(undo.c.id).where(undo.c.reverses == postings.c.id).exists())
        .order_by(postings.c.id)
        .limit(1)
        .with_for_update()
    )
    if found is None:
        return []
    return list(conn.execute(select(entries).where(entries.c.posting_id == found).order_by(entries.c.amount)))
