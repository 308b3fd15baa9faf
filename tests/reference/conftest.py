"""A ledger with a few accounts, in a database of the test's own; steps are called as plain functions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine

from tasks import inventory, ledger, notifications, payments, transfers, warehouse
from tasks.database import create_tables, ledger_engine, outside_engine
from tasks.ledger import House
from tasks.money import eur

__all__ = ["inventory", "notifications", "payments", "transfers"]  # imported: they declare tables


@pytest.fixture
def effect_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File that every external effect of the test is written to."""
    path = tmp_path / "effects.log"
    monkeypatch.setenv("EFFECT_LOG", str(path))
    return path


@pytest.fixture
def engine(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Database in which ann has 100 EUR, bob and the bakery nothing, and ten lamps are on hand."""
    monkeypatch.setenv("LEDGER_DATABASE_URL", database_url)
    engine = ledger_engine()
    create_tables(engine)
    with engine.begin() as conn:
        for house in House:
            ledger.open_account(conn, house.account("EUR"), "house", "EUR")
        for customer in ("ann", "bob"):
            ledger.open_account(conn, customer, "customer", "EUR")
        ledger.open_account(conn, "bakery", "merchant", "EUR")
        ledger.post(conn, "opening", "ann", House.EQUITY.account("EUR"), "ann", eur(100))
    warehouse.receive("lamp", 10)
    yield engine
    engine.dispose()
    outside_engine().dispose()


@pytest.fixture
def conn(engine: Engine) -> Iterator[Connection]:
    """Connection as a transactional step gets it: in a transaction that is not the step's to end."""
    with engine.begin() as connection:
        yield connection
