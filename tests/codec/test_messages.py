"""What plain Celery tasks are given and return, as Celery's own JSON carries it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from kombu.utils import json as kombu_json
from pydantic import BaseModel, SecretStr

from orchestrator import PayloadError
from orchestrator.codec import PlainCodec, from_message, to_message, without_envelopes

PRICE = Decimal("9.90")
ENVELOPE = {"__type__": "decimal", "__value__": "9.90"}


@dataclass(frozen=True)
class Money:
    cents: int


class Token:
    """What pydantic cannot write."""


class Order(BaseModel):
    id: str
    price: Decimal


@pytest.fixture
def money() -> Iterator[None]:
    """A type that a user has registered with kombu, for all their tasks."""
    kombu_json.register_type(Money, "money", lambda money: money.cents, Money)
    yield
    del kombu_json._encoders[Money], kombu_json._decoders["money"]


def test_the_form_is_kombus() -> None:
    value = {"prices": [PRICE, (PRICE, None, 1, 1.5, True, "text")]}
    assert to_message(value) == {"prices": [ENVELOPE, [ENVELOPE, None, 1, 1.5, True, "text"]]}
    assert from_message(to_message(value)) == kombu_json.loads(kombu_json.dumps(value))
    assert without_envelopes(to_message(value)) == {"prices": ["9.90", ["9.90", None, 1, 1.5, True, "text"]]}


def test_a_type_that_users_registered_with_kombu_comes_back(money: None) -> None:
    assert from_message(to_message([Money(5)])) == [Money(5)]


def test_what_only_kombu_can_write_is_shown_as_it_is_stored() -> None:
    """As by `saga history`, which must not fail over it."""
    kombu_json.register_type(Token, "token", lambda token: "t", lambda text: Token())
    try:
        stored = to_message([Token()])
        assert without_envelopes(stored) == stored == [{"__type__": "token", "__value__": "t"}]
    finally:
        del kombu_json._encoders[Token], kombu_json._decoders["token"]


@pytest.mark.parametrize(
    "only_like_it",
    [
        {"__type__": "of nobody", "__value__": 1},
        {"__type__": ["x"], "__value__": 1},
        {"__type__": "datetime", "__value__": "not a time"},
        {"__type__": "uuid", "__value__": {}},
        {"__type__": "decimal", "__value__": "9.90", "more": 1},
    ],
    ids=repr,
)
def test_what_only_looks_like_an_envelope_is_data(only_like_it: Any) -> None:
    """Celery refuses the whole message for some of these."""
    assert from_message(to_message([only_like_it])) == [only_like_it]


def test_what_kombu_knows_nothing_of_becomes_plain_json() -> None:
    order = Order(id="7", price=PRICE)
    assert to_message([order, {3, 1}, Money(5)]) == [{"id": "7", "price": "9.90"}, [1, 3], {"cents": 5}]


def _itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "bad",
    [_itself(), float("nan"), SecretStr("s3cret"), (n for n in range(3)), {1: 1, "1": 2}, object()],
    ids=["itself", "NaN", "secret", "generator", "two keys", "object"],
)
def test_what_cannot_be_stored_is_refused(bad: Any) -> None:
    with pytest.raises(PayloadError) as refused:
        to_message({"at": bad})
    assert "s3cret" not in str(refused.value)


def test_a_call_that_was_recorded_without_envelopes_is_the_same_call() -> None:
    codec = PlainCodec(what="the task")
    encoded = codec.encode_call((PRICE,), {"price": PRICE})
    assert encoded == {"*args": [ENVELOPE], "**kwargs": {"price": ENVELOPE}}
    assert codec.decode_call(encoded) == ((PRICE,), {"price": PRICE})
    assert codec.canonical(encoded) == codec.canonical({"*args": ["9.90"], "**kwargs": {"price": "9.90"}})
    assert codec.canonical(encoded) != codec.canonical({"*args": ["9.91"], "**kwargs": {"price": "9.90"}})
    assert codec.decode_result(codec.encode_result(PRICE)) == PRICE
    assert codec.decode_result("9.90") == "9.90", "a result of before"


def test_what_a_compensation_is_given_by_name_arrives_by_name() -> None:
    assert PlainCodec(what="the task").decode_call({"order": "7", "result": None}) == (
        (),
        {"order": "7", "result": None},
    )
