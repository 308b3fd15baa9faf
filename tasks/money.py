"""Owns amounts of money: a Decimal in a currency, never finer than its minor unit, never a float."""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

Currency = Literal["EUR", "USD", "JPY"]

MINOR_DIGITS: dict[Currency, int] = {"EUR": 2, "USD": 2, "JPY": 0}


class Money(BaseModel):
    """Hold an amount in one currency, in canonical form: EUR 5 and EUR 5.00 are the same value."""

    model_config = ConfigDict(frozen=True)

    currency: Currency
    amount: Decimal

    @field_validator("amount")
    @classmethod
    def _in_minor_units(cls, amount: Decimal, info: ValidationInfo) -> Decimal:
        currency = info.data.get("currency")
        if currency is None:  # the currency itself was refused, and that error is the one to show
            return amount
        if not amount.is_finite():
            raise ValueError("an amount of money must be a finite number")
        exact = amount.quantize(Decimal(1).scaleb(-MINOR_DIGITS[currency]))
        if exact != amount:
            raise ValueError(f"{amount} {currency} is finer than the currency's minor unit")
        return exact

    def __str__(self) -> str:
        return f"{self.amount:,} {self.currency}"


def eur(amount: int | str) -> Money:
    """Return an amount in euros, for readable code and tests."""
    return Money(currency="EUR", amount=Decimal(amount))
