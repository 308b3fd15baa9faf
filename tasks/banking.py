"""Owns the transactions of accounts at other banks: fetched page by page, looked at, and booked once.

What is fetched lies in tables; a journal holds only which page it was. Everything is keyed by the bank's own id of a
transaction, so that whatever is done twice changes nothing. There is nothing to undo: what the bank has booked has
happened, and a sync that ends early leaves what it has for the next one.
"""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import (
    ARRAY,
    Boolean,
    Column,
    Connection,
    DateTime,
    Numeric,
    Row,
    Table,
    Text,
    cast,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from orchestrator import Effect, RetryPolicy, step
from tasks import ledger, model, models
from tasks.database import ledger_engine, metadata
from tasks.ledger import House
from tasks.outside import client

RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_attempts=6)
LARGE = Decimal(1000)
UNKNOWN = "unknown"

transactions = Table(
    "transactions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("booked_at", DateTime(timezone=True), nullable=False),
    Column("amount", Numeric(20, 4), nullable=False),
    Column("text", Text, nullable=False),
    Column("booked", Boolean, nullable=False, server_default="false"),
    schema="bank",
)
merchants = Table(
    "merchants",
    metadata,
    Column("id", Text, primary_key=True),
    Column("merchant", Text, nullable=False),
    schema="bank",
)
categories = Table(
    "categories",
    metadata,
    Column("id", Text, primary_key=True),
    Column("category", Text, nullable=False),
    schema="bank",
)
anomalies = Table(
    "anomalies",
    metadata,
    Column("id", Text, primary_key=True),
    Column("what", Text, nullable=False),
    schema="bank",
)


class Page(BaseModel):
    """Name a page of an account's transactions: the first and the last id on it, and the cursor of the next page.

    A page without transactions, as a new account has, has no ids.
    """

    model_config = ConfigDict(frozen=True)

    account: str
    first: str
    last: str
    count: int
    total: int
    next: int | None


def mirror(account: str) -> str:
    """Return the ledger account that shows what was spent from an account at another bank."""
    return f"mirror:{account}"


@step(effect=Effect.NONE, retry=RETRY, start_to_close_timeout=timedelta(seconds=30))
def fetch(account: str, cursor: int, size: int) -> Page:
    """Fetch a page and keep it. Raises: httpx.HTTPError."""
    told = client.page(account, cursor, size)
    found = told["transactions"]
    rows = [{name: each[name] for name in ("id", "booked_at", "amount", "text")} for each in found]
    _keep(transactions, rows)
    ends = {"first": found[0]["id"], "last": found[-1]["id"]} if found else {"first": "", "last": ""}
    return Page(account=account, **ends, count=len(found), total=told["total"], next=told["next"])


@step(effect=Effect.NONE, retry=RETRY)
def enrich(page: Page) -> None:
    """Find out who got the money: ``CARD 4711 DAILY BREAD BAKERY NORTHTON`` was paid to the bakery."""
    _keep(merchants, [{"id": row.id, "merchant": " ".join(row.text.split()[2:-1]).title()} for row in _rows(page)])


@step(effect=Effect.NONE, retry=RETRY)
def categorise(page: Page, alias: str) -> None:
    """Have the model that serves under the alias tell what the money was spent on; without one nobody knows."""
    rows = _rows(page)
    with ledger_engine().connect() as conn:
        weights = models.serving(conn, alias)
    told = model.categorise(weights, [row.text for row in rows]) if weights else [UNKNOWN] * len(rows)
    _keep(categories, [{"id": row.id, "category": category} for row, category in zip(rows, told, strict=True)])


@step(effect=Effect.NONE, retry=RETRY)
def detect_anomalies(page: Page) -> int:
    """Write down what looks odd, and return how much does."""
    odd = [{"id": row.id, "what": "far too large"} for row in _rows(page) if row.amount > LARGE]
    _keep(anomalies, odd)
    return len(odd)


@step(transactional=True, effect=Effect.NONE, retry=RETRY)
def book(conn: Connection, page: Page) -> int:
    """Post each transaction of the page that was not posted before; return how many."""
    mine = _of(page) & ~transactions.c.booked
    taken = update(transactions).values(booked=True).where(mine).returning(transactions.c.id, transactions.c.amount)
    amounts = {row.id: row.amount for row in conn.execute(taken)}
    ledger.open_account(conn, mirror(page.account), "merchant", "EUR")
    ledger.post_many(conn, "spent", House.NOSTRO.account("EUR"), mirror(page.account), "EUR", amounts)
    return len(amounts)


def count(table: Table, account: str) -> int:
    """Return how many rows of a table belong to an account."""
    with ledger_engine().connect() as conn:
        mine = select(func.count()).select_from(table).where(table.c.id.startswith(f"{account}/"))
        return int(conn.scalar(mine) or 0)


def _of(page: Page) -> Any:
    return transactions.c.id.between(page.first, page.last)


def _rows(page: Page) -> list[Row[Any]]:
    with ledger_engine().connect() as conn:
        return list(conn.execute(select(transactions).where(_of(page)).order_by(transactions.c.id)))


def _keep(table: Table, rows: list[dict[str, Any]]) -> None:
    """Insert what is not there yet, in one statement; ids are the bank's own."""
    if not rows:
        return
    names = tuple(rows[0])
    columns = [cast([row[name] for row in rows], ARRAY(table.c[name].type)) for name in names]
    given = func.unnest(*columns).table_valued(*names).render_derived()
    with ledger_engine().begin() as conn:
        conn.execute(insert(table).from_select(names, select(*given.c)).on_conflict_do_nothing())
