"""Owns mail to customers and merchants; a mail cannot be undone, and must never make anything undone.

A small table stands in for the mail provider. It takes a mail once per reference and recipient; addresses at
``bounce.example`` are refused, and those at ``down.example`` cannot be reached.
"""

from __future__ import annotations

from datetime import timedelta

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Column, DateTime, Table, Text, func
from sqlalchemy.dialects.postgresql import insert

from orchestrator import Effect, Rejected, RetryPolicy, step
from tasks import effects
from tasks.database import metadata, outside_engine

RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_attempts=3)

mails = Table(
    "mails",
    metadata,
    Column("reference", Text, primary_key=True),
    Column("recipient", Text, primary_key=True),
    Column("subject", Text, nullable=False),
    Column("sent_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    schema="mail",
)


class Mail(BaseModel):
    """Ask for one mail, sent once per reference and recipient."""

    model_config = ConfigDict(frozen=True)

    reference: str
    recipient: str
    subject: str


class AddressRefused(Rejected):
    """Say that nothing was sent: the address does not exist."""


@step(effect=Effect.NONE, retry=RETRY)
def send(mail: Mail) -> None:
    """Send a mail. Raises: AddressRefused, a rejection; ConnectionError while the host is down."""
    host = mail.recipient.rpartition("@")[2]
    if host == "bounce.example":
        raise AddressRefused(f"There is no {mail.recipient}.")
    if host == "down.example":
        raise ConnectionError(f"The host of {mail.recipient} does not answer.")
    with outside_engine().begin() as conn:
        row = insert(mails).values(mail.model_dump()).on_conflict_do_nothing().returning(mails.c.reference)
        new = conn.scalar(row) is not None
    if new:
        effects.record("mail", f"{mail.reference} {mail.recipient}")
