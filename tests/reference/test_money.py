"""Money is exact, has a canonical form, and is never finer than its currency's minor unit."""

from __future__ import annotations

from decimal import Decimal

import pytest
from pydantic import ValidationError

from tasks.money import Currency, Money, eur


def test_equal_amounts_have_one_form() -> None:
    assert eur("5").model_dump_json() == eur("5.00").model_dump_json() == '{"currency":"EUR","amount":"5.00"}'


@pytest.mark.parametrize(
    ("currency", "amount"), [("EUR", "0.001"), ("JPY", "0.5"), ("USD", "NaN"), ("USD", "Infinity")]
)
def test_amounts_that_cannot_be_paid_are_refused(currency: Currency, amount: str) -> None:
    with pytest.raises(ValidationError, match="amount"):
        Money(currency=currency, amount=Decimal(amount))


def test_an_unknown_currency_is_the_error_that_is_reported() -> None:
    with pytest.raises(ValidationError, match="currency"):
        Money.model_validate({"currency": "XAU", "amount": "1"})
