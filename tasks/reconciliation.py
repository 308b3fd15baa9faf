"""Owns the nightly look at the ledger: accounts in batches, findings as rows, and a report that compliance gets.

It changes nothing in the ledger. A finding is keyed by day, subject (an account or a posting) and what is wrong
with it, so that it is there once however often, and from however many accounts, it is found.
"""

from __future__ import annotations

import csv
import hashlib
import os
from datetime import date, timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Column, Connection, Date, Integer, Table, Text, func, select, text
from sqlalchemy.dialects.postgresql import insert

from orchestrator import Effect, RetryPolicy, step
from tasks import ledger
from tasks.database import ledger_engine, metadata
from tasks.outside import client

RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_attempts=5)
BATCH = 100

findings = Table(
    "findings",
    metadata,
    Column("day", Date, primary_key=True),
    Column("subject", Text, primary_key=True),
    Column("what", Text, primary_key=True),
    Column("detail", Text, nullable=False),
    schema="reconciliation",
)
reports = Table(
    "reports",
    metadata,
    Column("day", Date, primary_key=True),
    Column("accounts", Integer, nullable=False),
    Column("findings", Integer, nullable=False),
    Column("unchecked", Integer, nullable=False),
    Column("file", Text, nullable=False),
    schema="reconciliation",
)

# One statement sees one moment: a posting and the balance that it changes are always seen together.
CHECK = text("""
    with batch as (
        select id, currency, balance from ledger.accounts where id between :first and :last and status = 'open'
    ), booked as (
        select b.id, b.currency, b.balance, coalesce(sum(e.amount), 0) as entries
        from batch b left join ledger.entries e on e.account_id = b.id group by 1, 2, 3
    )
    insert into reconciliation.findings (day, subject, what, detail)
    select cast(:day as date), id, 'balance', 'carries ' || balance || ', its entries say ' || entries
    from booked where balance <> entries
    union
    select :day, 'posting ' || p.id, 'sum', 'its entries sum to ' || sum(e.amount)
    from ledger.postings p join ledger.entries e on e.posting_id = p.id
    where p.id in (select posting_id from ledger.entries where account_id in (select id from batch))
    group by p.id having sum(e.amount) <> 0
    union
    select :day, 'posting ' || e.posting_id, 'currency', 'has ' || e.currency || ' on an account in ' || b.currency
    from batch b join ledger.entries e on e.account_id = b.id where e.currency <> b.currency
    on conflict do nothing
""")


class Batch(BaseModel):
    """Name a hundred accounts by the first and the last of them."""

    model_config = ConfigDict(frozen=True)

    day: date
    first: str
    last: str


class Report(BaseModel):
    """Say what came of a day: how many accounts there were, and how many of them could not be looked at."""

    model_config = ConfigDict(frozen=True)

    day: date
    accounts: int
    findings: int
    unchecked: int
    file: str
    sha256: str


def batches(day: date, after: str, limit: int) -> list[Batch]:
    """Return the next batches of active accounts, in order of their ids."""
    account = ledger.accounts.c
    active = select(account.id).where(account.status == "open", account.kind == "customer", account.id > after)
    with ledger_engine().connect() as conn:
        ids = list(conn.scalars(active.order_by(account.id).limit(limit * BATCH)))
    parts = [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]
    return [Batch(day=day, first=part[0], last=part[-1]) for part in parts]


@step(transactional=True, effect=Effect.NONE, retry=RETRY)
def check(conn: Connection, batch: Batch) -> int:
    """Look at a batch, write down what is wrong, and return how much was found now."""
    return conn.execute(CHECK, batch.model_dump()).rowcount


@step(effect=Effect.NONE, retry=RETRY)
def report(day: date, unchecked: int) -> Report:
    """Write the day's report, as a file and as a row; written again it is the same."""
    with ledger_engine().begin() as conn:
        mine = select(findings).where(findings.c.day == day).order_by(findings.c.subject, findings.c.what)
        found = conn.execute(mine).all()
        active = select(func.count()).where(ledger.accounts.c.status == "open", ledger.accounts.c.kind == "customer")
        accounts = int(conn.scalar(active) or 0)
        file = _write(day, [tuple(row) for row in found])
        told = Report(
            day=day,
            accounts=accounts,
            findings=len(found),
            unchecked=unchecked,
            file=str(file),
            sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        )
        row = told.model_dump(exclude={"sha256"})
        conn.execute(insert(reports).values(row).on_conflict_do_update(index_elements=["day"], set_=row))
    return told


def _write(day: date, rows: list[tuple[object, ...]]) -> Path:
    """Write the file so that it is whole or not there."""
    file = Path(os.environ.get("REPORTS_DIR", ".dev/reports")) / f"{day}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    with part.open("w", newline="") as output:
        csv.writer(output).writerows([("day", "subject", "what", "detail"), *rows])
    return part.replace(file)


@step(effect=Effect.NONE, retry=RETRY, start_to_close_timeout=timedelta(seconds=10))
def send_to_compliance(told: Report) -> str:
    """Send the report, once for each day, and return the receipt. Raises: httpx.HTTPError."""
    body = told.model_dump(mode="json", exclude={"file"})
    return str(client.do("reports", str(told.day), body)["receipt"])
