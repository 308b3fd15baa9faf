"""Owns the nightly look at the ledger: accounts in batches, findings as rows, and a report that compliance gets.

It changes nothing in the ledger. A finding is keyed by its subject (an account or a posting) and by what is wrong with
it, so that it is there once, however often and from however many accounts it is found; it knows when it was first and
last seen, by the clock of the database that it lies in.
"""

from __future__ import annotations

import csv
import hashlib
import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Boolean, Column, Connection, DateTime, Integer, Select, Table, Text, func, select, text
from sqlalchemy.dialects.postgresql import insert

from orchestrator import Effect, RetryPolicy, step
from tasks import ledger
from tasks.database import ledger_engine, metadata
from tasks.outside import client

RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_attempts=5)
BATCH = 100  # accounts
PAGE = 50 * BATCH  # accounts that are listed at once

findings = Table(
    "findings",
    metadata,
    Column("subject", Text, primary_key=True),
    Column("what", Text, primary_key=True),
    Column("detail", Text, nullable=False),
    Column("first_seen_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("last_seen_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    schema="reconciliation",
)
reports = Table(
    "reports",
    metadata,
    Column("night", Text, primary_key=True),
    Column("accounts", Integer, nullable=False),
    Column("findings", Integer, nullable=False),
    Column("unchecked", Integer, nullable=False),
    Column("complete", Boolean, nullable=False),
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
    insert into reconciliation.findings (subject, what, detail)
    select id, 'balance', 'carries ' || balance || ', its entries say ' || entries
    from booked where balance <> entries
    union
    select 'posting ' || p.id, 'sum', 'its entries sum to ' || sum(e.amount)
    from ledger.postings p join ledger.entries e on e.posting_id = p.id
    where p.id in (select posting_id from ledger.entries where account_id in (select id from batch))
    group by p.id having sum(e.amount) <> 0
    union
    select 'posting ' || e.posting_id, 'currency', 'has ' || e.currency || ' on an account in ' || b.currency
    from batch b join ledger.entries e on e.account_id = b.id where e.currency <> b.currency
    on conflict (subject, what) do update set detail = excluded.detail, last_seen_at = now()
""")


class Batch(BaseModel):
    """Name a hundred accounts by the first and the last of them."""

    model_config = ConfigDict(frozen=True)

    first: str
    last: str


class Night(BaseModel):
    """Name a reconciliation, and say when it began by the clock that stamps findings."""

    model_config = ConfigDict(frozen=True)

    id: str
    began_at: datetime


class Report(BaseModel):
    """Say what came of a night: how many accounts there were, and how many batches could not be looked at."""

    model_config = ConfigDict(frozen=True)

    night: str
    accounts: int
    findings: int
    unchecked: int
    complete: bool
    file: str
    sha256: str


@step(effect=Effect.NONE, retry=RETRY)
def begin(night_id: str) -> Night:
    """Begin a night: what is found from now on belongs to it."""
    with ledger_engine().connect() as conn:
        return Night(id=night_id, began_at=conn.execute(select(func.now())).scalar_one())


@step(effect=Effect.NONE, retry=RETRY)
def batches(after: str | None) -> tuple[list[Batch], str | None]:
    """Return the next batches of active accounts in order of their ids, and the last id, or None at the end."""
    with ledger_engine().connect() as conn:
        ids = list(conn.scalars(_active(ledger.accounts.c.id).where(ledger.accounts.c.id > (after or "")).limit(PAGE)))
    parts = [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]
    return [Batch(first=part[0], last=part[-1]) for part in parts], ids[-1] if len(ids) == PAGE else None


def _active(column: Any) -> Select[Any]:
    account = ledger.accounts.c
    return select(column).where(account.status == "open", account.kind == "customer").order_by(account.id)


@step(transactional=True, effect=Effect.NONE, retry=RETRY)
def check(conn: Connection, batch: Batch) -> None:
    """Look at a batch, and write down what is wrong."""
    conn.execute(CHECK, batch.model_dump())


@step(effect=Effect.NONE, retry=RETRY)
def report(night: Night, unchecked: list[str], complete: bool) -> Report:
    """Write the night's report, as a file and as a row; written again it is the same."""
    with ledger_engine().begin() as conn:
        seen = select(findings).where(findings.c.last_seen_at >= night.began_at)
        found = conn.execute(seen.order_by(findings.c.subject, findings.c.what)).all()
        lines = [(row.subject, row.what, row.detail) for row in found]
        file = _write(night, [*lines, *(("not looked at", "", each) for each in unchecked)])
        told = Report(
            night=night.id,
            accounts=conn.execute(
                select(func.count()).select_from(_active(ledger.accounts.c.id).subquery())
            ).scalar_one(),
            findings=len(found),
            unchecked=len(unchecked),
            complete=complete,
            file=str(file),
            sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        )
        row = told.model_dump(exclude={"sha256"})
        conn.execute(insert(reports).values(row).on_conflict_do_update(index_elements=["night"], set_=row))
    return told


def _write(night: Night, rows: list[tuple[str, str, str]]) -> Path:
    """Write the file so that it is whole or not there."""
    file = Path(os.environ.get("REPORTS_DIR", ".dev/reports")) / f"{quote(night.id, safe='')}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    with part.open("w", newline="") as output:
        csv.writer(output).writerows([("subject", "what", "detail"), *rows])
    return part.replace(file)


@step(effect=Effect.NONE, retry=RETRY, start_to_close_timeout=timedelta(seconds=10))
def send_to_compliance(told: Report) -> str:
    """Send the report, once for each night, and return the receipt. Raises: httpx.HTTPError."""
    body = told.model_dump(mode="json", exclude={"file"})
    return str(client.do("reports", told.night, body)["receipt"])
