"""Owns what each party of the outside world does and refuses; must never remember anything itself.

A rule is asked when something is really to happen: with the key, what is asked, and everything of the same kind
that has happened before. It returns the answer, or refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.outside.book import Record

Body = dict[str, Any]

DECLINED = "tok_declined"
FORGED = "doc_forged"
EMPTY_IBAN = "XX00"
NO_SUCH_HOST = "bounce.example"
SHELF = 1000  # pieces of each article, before anything is picked
SOLD_OUT = "SKU-GONE"


class Refusal(Exception):
    """Say no, for a reason in one word and in a sentence; nothing has happened."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason, self.sentence = reason, sentence
        self.status = 409 if reason in ("undone", "conflict") else 422


def _charge(key: str, body: Body, before: Sequence[Record]) -> Body:
    if body["card"] == DECLINED:
        raise Refusal("declined", "The bank declined the card.")
    return {"id": key, "money": body["money"]}


def _pick(key: str, body: Body, before: Sequence[Record]) -> Body:
    sku, quantity = body["sku"], body["quantity"]
    if quantity > on_hand(sku, before):
        raise Refusal("sold out", f"There are no {quantity} pieces of {sku} on hand.")
    return {"id": key}


def on_hand(sku: str, picks: Sequence[Record]) -> int:
    """Count the pieces of an article on the shelf, after these picks."""
    taken = sum(pick.body["quantity"] for pick in picks if pick.state == "done" and pick.body["sku"] == sku)
    return (0 if sku == SOLD_OUT else SHELF) - int(taken)


def _check(key: str, body: Body, before: Sequence[Record]) -> Body:
    approved = body["document"] != FORGED
    return {"id": key, "approved": approved, "reason": "" if approved else "The document is forged."}


def _link(key: str, body: Body, before: Sequence[Record]) -> Body:
    return {"id": key, "token": f"link-{len(before) + 1}"}


def _debit(key: str, body: Body, before: Sequence[Record]) -> Body:
    if body["iban"].startswith(EMPTY_IBAN):
        raise Refusal("no funds", f"The account {body['iban']} does not hold so much.")
    return {"id": key, "money": body["money"]}


def _mail(key: str, body: Body, before: Sequence[Record]) -> Body:
    if body["recipient"].endswith(f"@{NO_SUCH_HOST}"):
        raise Refusal("bounced", f"There is no {body['recipient']}.")
    return {"id": key}


def _report(key: str, body: Body, before: Sequence[Record]) -> Body:
    return {"id": key, "receipt": body["sha256"][:12]}


RULES: dict[str, Callable[[str, Body, Sequence[Record]], Body]] = {
    "charges": _charge,  # the card provider
    "picks": _pick,  # the warehouse
    "checks": _check,  # the identity check
    "links": _link,  # the bank: leave to read an account
    "debits": _debit,  # the bank: money taken from an account there
    "mails": _mail,
    "reports": _report,  # compliance
}
