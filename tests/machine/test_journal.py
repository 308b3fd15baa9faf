"""Entries as they are stored: short, and the same when they are read."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from orchestrator.machine.journal import Asked, Settled, decode_entry, encode, encode_row, with_begin


@pytest.mark.parametrize(
    ("key", "task", "stored"),
    [
        ("shop.charge#0", "shop.charge", False),
        ("0.1/shop.charge#12", "shop.charge", False),
        ("orders/42#0", "orders/42", True),
        ("my own key", "shop.charge", True),
        ("", "shop.charge", True),
        ("a#b#1", "a#b", False),
    ],
)
def test_a_request_is_stored_with_its_task_only_where_the_key_does_not_name_it(
    key: str, task: str, stored: bool
) -> None:
    asked = Asked(key, task, {"n": 1})
    assert ("task" in encode(asked)) == stored
    assert decode_entry(encode(asked)) == asked


def test_what_goes_without_saying_is_not_stored_and_read_all_the_same() -> None:
    assert encode(Asked("shop.look#0", "shop.look")) == {"e": "asked", "key": "shop.look#0"}
    assert decode_entry({"e": "asked", "key": "shop.look#0"}) == Asked("shop.look#0", "shop.look", {})
    assert encode(Settled("shop.look#0")) == {"e": "settled", "key": "shop.look#0"}
    assert decode_entry({"e": "settled", "key": "shop.look#0", "outcome": "succeeded"}) == Settled("shop.look#0")
    assert encode(Settled("shop.look#0", "rejected"))["outcome"] == "rejected"


def test_an_outcome_is_stored_with_its_begin_only_if_that_was_not_the_instant_of_the_row_before() -> None:
    before, later = datetime(2026, 12, 1, tzinfo=UTC), datetime(2026, 12, 1, 0, 0, 1, tzinfo=UTC)
    at_once, taken, decided = (
        Settled("shop.look#0", attempt=1, worker=worker, began=began)
        for worker, began in [("w", before.isoformat()), ("w", later.isoformat()), ("", "")]
    )
    row = encode_row([at_once, taken, decided], before)
    assert ["began" in form for form in row] == [False, True, False]
    assert [with_begin(decode_entry(form), before) for form in row] == [at_once, taken, decided]
