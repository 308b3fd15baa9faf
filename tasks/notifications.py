"""Owns mail to customers and merchants; a mail cannot be undone, and must never make anything undone."""

from __future__ import annotations

from datetime import timedelta

from pydantic import BaseModel, ConfigDict

from orchestrator import Effect, RetryPolicy, step
from tasks.outside import client

RETRY = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_attempts=3)


class Mail(BaseModel):
    """Ask for one mail, sent once for each reference and recipient."""

    model_config = ConfigDict(frozen=True)

    reference: str
    recipient: str
    subject: str


@step(effect=Effect.NONE, retry=RETRY, start_to_close_timeout=timedelta(seconds=10))
def send(mail: Mail) -> None:
    """Send a mail. Raises: Refused, a rejection; httpx.HTTPError if nobody knows."""
    key = f"{mail.reference} {mail.recipient}"
    client.do("mails", key, mail.model_dump(include={"recipient", "subject"}))
