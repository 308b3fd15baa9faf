"""Owns the transactions that the bank has of an account: made up, and the same at every look.

An account's name says how many it has: ``checking-3000`` has 3,000. One whose name begins with ``noisy`` has its
categories all mixed up. Must never know HTTP.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

SHOPS = {
    "groceries": ("GREEN GROCER", "CORNER MARKET", "DAILY BREAD BAKERY", "FARM SHOP"),
    "transport": ("CITY METRO", "NATIONAL RAIL", "FUEL STATION", "BIKE RENTAL"),
    "eating out": ("NOODLE BAR", "CAFE CENTRAL", "PIZZA OVEN", "THE OLD INN"),
    "home": ("POWER AND WATER", "HOUSING RENT", "FURNITURE HALL", "PAINT AND TOOLS"),
    "leisure": ("CINEMA PALACE", "BOOK CELLAR", "SWIMMING POOL", "GAMES ARCADE"),
    "health": ("TOWN PHARMACY", "DENTAL SURGERY", "EYE CLINIC", "SPORTS PHYSIO"),
}
TOWNS = ("NORTHTON", "EASTHAM", "SOUTHPORT", "WESTFORD", "MIDDLEBY")
ODD_ONE_IN = 500  # one in so many is far too large
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def page(account: str, cursor: int, limit: int) -> dict[str, Any]:
    """Return transactions from `cursor` on, the cursor of the next page (None at the end), and the total."""
    total = int(account.rpartition("-")[2])
    end = min(cursor + limit, total)
    found = [_transaction(account, number) for number in range(cursor, end)]
    return {"transactions": found, "next": end if end < total else None, "total": total}


def _transaction(account: str, number: int) -> dict[str, Any]:
    chance = random.Random(f"{account} {number}")
    category = chance.choice(tuple(SHOPS))
    shop = chance.choice(SHOPS[category])
    if account.startswith("noisy"):
        category = chance.choice(tuple(SHOPS))
    cents = chance.randint(150, 9_900)
    if number % ODD_ONE_IN == ODD_ONE_IN - 1:
        cents *= 1_000
    return {
        "id": f"{account}/{number:07}",
        "booked_at": (BEGAN + timedelta(minutes=number)).isoformat(),
        "amount": f"{cents / 100:.2f}",
        "currency": "EUR",
        "text": f"CARD {chance.randint(1000, 9999)} {shop} {chance.choice(TOWNS)}",
        "category": category,
    }
