"""The reference sagas, on their own ledger and with their own providers, keep their promises whatever fails."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

import pytest
from sqlalchemy import select

from orchestrator import testing
from orchestrator.testing import Environment, EnvironmentRun
from sagas.order import Order, order
from sagas.payment import Payment, payment
from sagas.transfer import Transfer, transfer
from tasks import ledger, provider, warehouse
from tasks.database import create_tables, ledger_engine, metadata, outside_engine
from tasks.ledger import House
from tasks.money import eur

TRANSFER = Transfer(id="t1", source="ann", target="bob", money=eur(40))
ORDER = Order(id="o1", sku="lamp", quantity=3, total=eur(25), card="tok_visa", email="ann@post.example")
PAYMENT = Payment(
    id="p1", customer="ann", merchant="bakery", card="tok_visa", money=eur(30),
    customer_email="ann@post.example", merchant_email="bakery@post.example",
)  # fmt: skip


@pytest.fixture
def fresh(saga_environment: Environment, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the world what it is at first: ann has 100 EUR, and there are ten lamps."""
    monkeypatch.setenv("LEDGER_DATABASE_URL", saga_environment.database_url)
    create_tables(ledger_engine())

    def fresh() -> None:
        with ledger_engine().begin() as conn:
            for table in reversed(metadata.sorted_tables):
                conn.execute(table.delete())
            for house in House:
                ledger.open_account(conn, house.account("EUR"), "house", "EUR")
            for customer in ("ann", "bob"):
                ledger.open_account(conn, customer, "customer", "EUR")
            ledger.open_account(conn, "bakery", "merchant", "EUR")
            ledger.post(conn, "opening", "ann", House.EQUITY.account("EUR"), "ann", eur(100))
        warehouse.receive("lamp", 10)

    return fresh


def held(account: str) -> Decimal:
    with ledger_engine().connect() as conn:
        return ledger.available(conn, account).amount


def charged() -> bool:
    """Tell whether the provider keeps the customer's money."""
    with outside_engine().begin() as conn:
        return "charged" in conn.scalars(select(provider.charges.c.state)).all()


def test_a_transfer_is_made_whole_or_not_at_all(saga_environment: Environment, fresh: Callable[[], None]) -> None:
    def conserved(run: EnvironmentRun) -> None:
        assert (held("ann"), held("bob")) == ((60, 40) if run.state == "completed" else (100, 0))

    found = testing.explore(transfer, TRANSFER, invariant=conserved, setup=fresh, pairs=5, environment=saga_environment)
    assert {"completed", "compensated", "failed", "cancelled"} <= found.ends.keys() and not found.exhausted


def test_an_order_is_paid_and_picked_or_neither(saga_environment: Environment, fresh: Callable[[], None]) -> None:
    def fair(run: EnvironmentRun) -> None:
        done = run.state == "completed"
        assert (charged(), warehouse.on_hand()) == (done, 7 if done else 10)

    found = testing.explore(order, ORDER, invariant=fair, setup=fresh, pairs=5, environment=saga_environment)
    assert {"completed", "compensated", "failed", "cancelled"} <= found.ends.keys() and not found.exhausted


def test_a_payment_is_settled_for_good_or_released(saga_environment: Environment, fresh: Callable[[], None]) -> None:
    def settled(run: EnvironmentRun) -> None:
        done = run.state == "completed"
        assert (held("ann"), charged()) == ((70, True) if done else (100, False))

    found = testing.explore(payment, PAYMENT, invariant=settled, setup=fresh, pairs=5, environment=saga_environment)
    assert {"completed", "compensated", "failed", "cancelled"} <= found.ends.keys() and not found.exhausted
