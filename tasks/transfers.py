"""Owns the moves of a transfer, each next to its undo; must never touch a balance.

Between customers money travels over the house's transit account: the debit puts it there, the credit takes it from
there. These steps are transactional: their postings and the step's completion commit together, so each takes effect
exactly once, and one that timed out has done nothing. Money from another bank is different. It is pulled by HTTP,
and a pull that timed out may have happened. It travels over the house's account at that bank.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from sqlalchemy import Connection

from orchestrator import RetryPolicy, step
from tasks import ledger
from tasks.ledger import House, InsufficientFunds, Posting
from tasks.money import Money
from tasks.outside import client

OTHER_BANK = "iban:"

RETRY = RetryPolicy(
    initial_interval=timedelta(milliseconds=200),
    maximum_attempts=4,
    non_retryable_error_types=(InsufficientFunds,),
)


class Transfer(BaseModel):
    """Ask to move money from one customer to another, or from an account at another bank (``iban:...``)."""

    model_config = ConfigDict(frozen=True)

    id: str
    source: str
    target: str
    money: Money

    @property
    def from_other_bank(self) -> bool:
        """Tell whether the money comes from another bank."""
        return self.source.startswith(OTHER_BANK)

    @field_validator("money")
    @classmethod
    def _positive(cls, money: Money) -> Money:
        if money.amount <= 0:
            raise ValueError("a transfer moves a positive amount")
        return money

    @model_validator(mode="after")
    def _between_two(self) -> Self:
        if self.source == self.target:
            raise ValueError("a transfer needs two accounts")
        return self


@step(transactional=True)
def undo_debit(conn: Connection, transfer: Transfer) -> None:
    """Give the source its money back, if it was taken."""
    ledger.reverse(conn, "debit", transfer.id)


@step(transactional=True, compensate=undo_debit, retry=RETRY)
def debit(conn: Connection, transfer: Transfer) -> Posting:
    """Take the money from the source. Raises: InsufficientFunds, a rejection: nothing to give back."""
    transit = House.TRANSIT.account(transfer.money.currency)
    return ledger.post(conn, "debit", transfer.id, transfer.source, transit, transfer.money)


@step(retry=RetryPolicy(initial_interval=timedelta(milliseconds=500), maximum_attempts=6))
def return_to_bank(transfer: Transfer) -> None:
    """Give the money back to the other bank, if it was taken; a pull that comes later will be refused."""
    client.undo("debits", transfer.id)


@step(compensate=return_to_bank, retry=RETRY, start_to_close_timeout=timedelta(seconds=10))
def pull(transfer: Transfer) -> None:
    """Take the money from an account at another bank. Raises: Refused, a rejection; httpx.HTTPError if nobody knows."""
    body = {"iban": transfer.source.removeprefix(OTHER_BANK), "money": transfer.money.model_dump(mode="json")}
    client.do("debits", transfer.id, body)


@step(transactional=True)
def undo_credit(conn: Connection, transfer: Transfer) -> None:
    """Take the money back from the target, if it was given; parks the run if the target has spent it."""
    ledger.reverse(conn, "credit", transfer.id)


@step(transactional=True, compensate=undo_credit, retry=RETRY)
def credit(conn: Connection, transfer: Transfer) -> Posting:
    """Give the money to the target."""
    house = House.NOSTRO if transfer.from_other_bank else House.TRANSIT
    source = house.account(transfer.money.currency)
    return ledger.post(conn, "credit", transfer.id, source, transfer.target, transfer.money)
