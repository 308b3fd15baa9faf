"""What can be stored, and the text by which values are compared."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.codec import MAX_DEPTH, Json, canonical_text, check, dumps, dumps_rows, loads
from orchestrator.errors import PayloadError

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
numbers = st.integers() | st.integers(-(10**60), 10**60) | st.floats(allow_nan=False, allow_infinity=False)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=5),
    max_leaves=20,
)


def nested(depth: int) -> Json:
    value: Json = []
    for _ in range(depth - 1):
        value = [value]
    return value


@given(json_values)
def test_a_stored_value_comes_back(value: Json) -> None:
    assert loads(dumps(value)) == value
    assert json.loads(dumps(value)) == value


@given(st.text())
def test_any_text_is_stored_exactly_or_refused(text: str) -> None:
    storable = "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)
    if storable:
        assert loads(check(text)) == text
    else:
        with pytest.raises(PayloadError):
            check(text)


def looped() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"order": {"note": "a\0b"}}, "at .order.note contains the character NUL"),
        ({"a\0b": 1}, "contains the character NUL"),
        ({"x": [1.0, math.nan]}, "at .x[1] is nan"),
        ([math.inf], "at [0] is inf"),
        (-math.inf, "is -inf"),
        ({"x": "\ud800"}, "at .x contains a lone surrogate"),
        ({"\udfff": 1}, "contains a lone surrogate"),
        ({"n": 10**4300}, "at .n is an integer of more than 4,300 digits"),
        (-(10**5000), "is an integer of more than 4,300 digits"),
        (nested(MAX_DEPTH + 1), "nests deeper than 100 levels"),
        (nested(100_000), "nests deeper than 100 levels"),
        (looped(), "nests deeper than 100 levels"),
        (object(), "is of type object"),
        ({"when": [lambda: None]}, "at .when[0] is of type function"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "value",
)
def test_what_cannot_be_stored_is_named(value: Any, told: str) -> None:
    with pytest.raises(PayloadError) as caught:
        check(value, what="the input of run order-42")
    assert told in str(caught.value)
    assert str(caught.value).startswith("the input of run order-42")
    str(caught.value).encode()


@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "\\u0000", "[" * 500, 10**4300 - 1, nested(MAX_DEPTH), "7" * 5000, [[]] * 300],
)
def test_what_only_looks_wrong_is_stored(value: Any) -> None:
    assert loads(check(value)) == value


def test_the_limit_counts_bytes_not_characters() -> None:
    assert check("é" * 9, limit_bytes=20)
    with pytest.raises(PayloadError, match=r"takes 22 bytes as JSON, the limit is 20"):
        check("é" * 10, limit_bytes=20)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "1e400", '"\\ud800"', "[", "", "9" * 4301, "[" * 10**5, b"\xff"])
def test_text_that_is_not_strict_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(PayloadError):
        loads(text)


@given(json_values)
def test_the_order_of_keys_does_not_count(value: Json) -> None:
    def turned(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: turned(part[key]) for key in reversed(part)}
        return [turned(item) for item in part] if isinstance(part, list) else part

    assert canonical_text(turned(value)) == canonical_text(value)


@pytest.mark.parametrize(("ours", "from_jsonb"), [(1e22, 10**22), (1e308, 10**308), (-0.0, 0.0), (1e-7, 0.0000001)])
def test_a_number_that_jsonb_writes_otherwise_is_the_same(ours: Json, from_jsonb: Json) -> None:
    assert canonical_text({"n": ours}) == canonical_text({"n": from_jsonb})


@pytest.mark.parametrize(("one", "other"), [(True, 1), ("1", 1), (None, 0), (10**20 + 1, 1e20), ([], {}), (1.5, 1)])
def test_different_values_have_different_texts(one: Json, other: Json) -> None:
    assert canonical_text([one]) != canonical_text([other])


def test_rows_are_written_at_once_and_each_is_checked() -> None:
    many = [{"number": number, "nested": [[[]]]} for number in range(100)]
    assert loads(dumps_rows(many)) == many  # more brackets than one value may have
    assert loads(dumps_rows([{"said": "NaN"}])) == [{"said": "NaN"}]
    for flaw in ("\0", float("nan"), float("inf"), "\ud800", object()):
        with pytest.raises(PayloadError):
            dumps_rows([{}, {"flaw": flaw}])
