"""Calls of a function by parameter name."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from orchestrator.codec import FunctionCodec
from orchestrator.errors import DefinitionError, PayloadError

if TYPE_CHECKING:
    from sqlalchemy import Connection


class Order(BaseModel):
    id: str
    amount: Decimal


@dataclass
class Receipt:
    id: str
    codes: tuple[int, ...] = ()


def charge(order: Order, amount: Decimal = Decimal(1), *, note: str = "") -> Receipt: ...
def move(connection: Connection, source: str, amount: Decimal) -> None: ...
def every(a: int, /, b: Decimal, *rest: Decimal, c: int = 3, **extra: Decimal) -> Any: ...
def only(a: int = 1, b: int = 2, /, c: int = 3) -> Any: ...
def bare(a, b=2):  # type: ignore[no-untyped-def]
    ...


async def book(order: Order) -> Receipt | None: ...


def codec(function: Any, **options: Any) -> FunctionCodec:
    return FunctionCodec(function, **options)


def test_a_call_is_encoded_by_parameter_name_without_defaults() -> None:
    order = Order(id="o", amount=Decimal("1.50"))
    encoded = codec(charge).encode_call((order,), {"note": "n"})
    assert encoded == {"order": {"id": "o", "amount": "1.50"}, "note": "n"}
    assert codec(charge).decode_call(encoded) == ((order,), {"note": "n"})


def test_what_the_engine_injects_is_no_part_of_the_call() -> None:
    transfer = codec(move, skip=1)
    assert transfer.parameters == ("source", "amount")
    assert transfer.encode_call(("a",), {"amount": 2}) == {"source": "a", "amount": "2"}


integers = st.integers()
decimals = st.decimals(allow_nan=False, allow_infinity=False)


@given(integers, st.lists(decimals, min_size=1), st.dictionaries(st.sampled_from("cxyz"), integers))
def test_every_kind_of_parameter_comes_back(a: int, rest: list[Decimal], names: dict[str, int]) -> None:
    called = {name: value if name == "c" else Decimal(value) for name, value in names.items()}
    args, kwargs = codec(every).decode_call(codec(every).encode_call((a, *rest), called))
    assert args == (a, *rest)
    assert kwargs == called


def test_stars_are_kept_under_their_names() -> None:
    encoded = codec(every).encode_call((1, 2, 3), {"x": 4, "a": 5})
    assert encoded == {"a": 1, "b": "2", "*rest": ["3"], "**extra": {"x": "4", "a": "5"}}
    assert codec(every).decode_call(encoded) == ((1, 2, 3), {"x": 4, "a": 5})


def test_a_gap_before_a_positional_argument_is_filled_with_the_default() -> None:
    assert codec(only).decode_call({"b": 5}) == ((1, 5), {})


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "told"),
    [
        (charge, (), {}, "missing a required argument: 'order'"),
        (charge, (1, 2, 3), {}, "too many positional arguments"),
        (charge, ({"id": "o", "amount": 1},), {"order": {}}, "multiple values for argument 'order'"),
        (charge, ({"id": "o", "amount": 1},), {"nota": ""}, "unexpected keyword argument 'nota'"),
        (only, (), {"a": 1}, "'a'"),
    ],
)
def test_a_wrong_call_is_a_type_error_with_the_name(function: Any, args: Any, kwargs: Any, told: str) -> None:
    with pytest.raises(TypeError, match=f"tasks.{function.__name__}: .*{told}"):
        codec(function, what=f"tasks.{function.__name__}").encode_call(args, kwargs)


def test_a_value_that_does_not_fit_is_named_but_not_repeated() -> None:
    with pytest.raises(PayloadError) as caught:
        codec(charge, what="tasks.charge").encode_call(({"id": "o", "amount": "card 4711"},), {})
    assert str(caught.value).startswith("tasks.charge: parameter 'order' cannot be stored: amount: ")
    assert "4711" not in str(caught.value)


@pytest.mark.parametrize("value", [(i for i in ()), object(), iter([]), print], ids=["gen", "obj", "iter", "func"])
def test_a_value_that_is_not_data_names_function_and_parameter(value: Any) -> None:
    for call in ((value,), ([value],), ({"a": value},)):
        with pytest.raises(PayloadError, match=r"^bare: parameter 'a' cannot be stored"):
            codec(bare).encode_call(call, {})
        with pytest.raises(PayloadError, match=r"^bare: the result cannot be stored"):
            codec(bare).encode_result(call)


def test_results_are_encoded_by_the_return_annotation() -> None:
    for function in (charge, book):
        encoded = codec(function).encode_result(Receipt("r", (1, 2)))
        assert encoded == {"id": "r", "codes": [1, 2]}
        assert codec(function).decode_result(encoded) == Receipt("r", (1, 2))
    assert codec(book).result_annotation == Receipt | None
    assert codec(bare).result_annotation is Any
    with pytest.raises(PayloadError, match="the result cannot be stored"):
        codec(charge).encode_result(None)


def test_values_read_from_json_are_decoded_first() -> None:
    def store(raw: bytes) -> None: ...

    assert codec(store).encode_call(("_w==",), {}, from_json=True) == {"raw": "_w=="}


@pytest.mark.parametrize("raw", [b"abcd", b"\xff"])
def test_bytes_that_a_message_has_brought_are_not_read_as_their_own_text(raw: bytes) -> None:
    """Celery's JSON has an envelope for them; what looks like base64 was read as such."""

    def store(raw: bytes) -> None: ...

    store_codec = codec(store)
    assert store_codec.decode_call(store_codec.encode_call((raw,), {}, from_json=True)) == ((raw,), {})


def test_inputs_are_compared_with_todays_annotations() -> None:
    today = codec(charge)
    one = today.canonical({"order": {"id": "o", "amount": 1}, "amount": "2.0"})
    assert one == today.canonical({"amount": "2.0", "order": {"amount": "1", "id": "o", "old": True}})
    assert one != today.canonical({"order": {"id": "o", "amount": 2}, "amount": "2.0"})


def test_an_input_that_no_longer_fits_is_compared_as_recorded() -> None:
    assert codec(charge).canonical({"gone": 1, "b": 1.0}) == '{"b":1,"gone":1}'


@pytest.mark.parametrize(
    ("encoded", "told"),
    [
        ({"order": {"id": "o", "amount": "1"}, "gone": 1}, "has no parameter gone today"),
        ({}, "requires order today"),
        ({"order": 3}, "parameter 'order' as recorded does not fit"),
        ({"order": {"id": "o", "amount": "1"}, "return": 1}, "has no parameter return"),
    ],
)
def test_a_recorded_call_that_no_longer_fits_says_why(encoded: Any, told: str) -> None:
    with pytest.raises(PayloadError, match=told):
        codec(charge).decode_call(encoded)


def test_annotations_are_resolved_at_first_use() -> None:
    def uses(x: NotYetKnown) -> None: ...  # type: ignore[name-defined] # noqa: F821

    known = codec(uses)
    with pytest.raises(DefinitionError, match="NotYetKnown"):
        known.prepare()


def test_wrapped_partial_and_bound_functions_work() -> None:
    @functools.wraps(charge)
    def wrapped(*args: Any, **kwargs: Any) -> Any: ...

    class Service:
        def pay(self, amount: Decimal) -> None: ...
        def __call__(self, amount: Decimal) -> None: ...

    assert codec(wrapped).parameters == ("order", "amount", "note")
    for function in (Service().pay, Service(), functools.partial(move, None, "a")):
        assert codec(function).encode_call((), {"amount": 1}) == {"amount": "1"}
