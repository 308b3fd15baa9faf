"""Owns who is a customer: the profile, its ledger accounts and its link to another bank, each do next to its undo."""

from __future__ import annotations

from datetime import timedelta

from pydantic import BaseModel, ConfigDict
from sqlalchemy import CheckConstraint, Column, Connection, Table, Text, delete, select, update
from sqlalchemy.dialects.postgresql import insert

from orchestrator import Effect, Rejected, RetryPolicy, step
from tasks import ledger
from tasks.database import metadata
from tasks.money import Currency
from tasks.outside import client

RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_attempts=4)

profiles = Table(
    "profiles",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("email", Text, nullable=False, unique=True),
    Column("status", Text, nullable=False, server_default="new"),
    CheckConstraint("status in ('new', 'active')", name="profiles_status"),
    schema="customers",
)


class Signup(BaseModel):
    """Ask to become a customer; without an `iban` there is no other bank to link to."""

    model_config = ConfigDict(frozen=True)

    id: str
    name: str
    email: str
    document: str
    currencies: tuple[Currency, ...] = ("EUR",)
    iban: str | None = None
    follow_up_after: timedelta = timedelta(hours=24)


class Decision(BaseModel):
    """Hold what the identity check came to. A no is an answer like another, and no failure of the check."""

    approved: bool
    reason: str = ""


class EmailTaken(Rejected):
    """Say that somebody else has this address; no profile was made."""


@step(transactional=True)
def remove_profile(conn: Connection, signup: Signup) -> None:
    """Remove the profile, if it was made."""
    conn.execute(delete(profiles).where(profiles.c.id == signup.id))


@step(transactional=True, compensate=remove_profile, retry=RETRY)
def create_profile(conn: Connection, signup: Signup) -> str:
    """Make the profile. Raises: EmailTaken, a rejection."""
    row = insert(profiles).values(id=signup.id, name=signup.name, email=signup.email)
    made = conn.scalar(row.on_conflict_do_nothing(index_elements=["email"]).returning(profiles.c.id))
    if made is None:
        raise EmailTaken(f"There is a customer with the address {signup.email}.")
    return signup.id


@step(effect=Effect.NONE, retry=RETRY, start_to_close_timeout=timedelta(seconds=10))
def check_identity(signup: Signup) -> Decision:
    """Have somebody else check who it is. Raises: httpx.HTTPError while there is no answer."""
    body = signup.model_dump(include={"name", "document"})
    return Decision.model_validate(client.do("checks", signup.id, body))


@step(transactional=True)
def close_accounts(conn: Connection, signup: Signup) -> None:
    """Remove the accounts that were opened; nobody can have used them yet."""
    conn.execute(delete(ledger.accounts).where(ledger.accounts.c.id.in_(account_ids(signup))))


@step(transactional=True, compensate=close_accounts, retry=RETRY)
def open_accounts(conn: Connection, signup: Signup) -> list[str]:
    """Open a ledger account for each currency."""
    for account_id, currency in zip(account_ids(signup), signup.currencies, strict=True):
        ledger.open_account(conn, account_id, "customer", currency)
    return account_ids(signup)


def account_ids(signup: Signup) -> list[str]:
    """Return the ids of the customer's accounts, in the order of the currencies."""
    return [f"customer:{signup.id}:{currency}" for currency in signup.currencies]


@step(retry=RETRY)
def revoke_link(signup: Signup) -> None:
    """Give the leave to read the other bank's account back, if it was got."""
    client.undo("links", signup.id)


@step(compensate=revoke_link, retry=RETRY, start_to_close_timeout=timedelta(seconds=10))
def link_bank(signup: Signup) -> str:
    """Get leave to read an account at another bank, and return its token. Raises: httpx.HTTPError."""
    return str(client.do("links", signup.id, {"iban": signup.iban})["token"])


@step(transactional=True, effect=Effect.PIVOT, retry=RETRY)
def activate(conn: Connection, signup: Signup) -> None:
    """Make the customer one. The point of no return: from here on nothing that fails takes it back."""
    conn.execute(update(profiles).values(status="active").where(profiles.c.id == signup.id))


def status_of(conn: Connection, customer_id: str) -> str | None:
    """Return new, active, or None for who is no customer."""
    return conn.scalar(select(profiles.c.status).where(profiles.c.id == customer_id))
