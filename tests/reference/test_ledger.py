"""The ledger keeps its own rules, whoever posts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
from sqlalchemy import Connection, Engine, func, select, update
from sqlalchemy.exc import IntegrityError

from tasks import ledger
from tasks.ledger import AccountFrozenError, AccountUnusable, InsufficientFunds
from tasks.money import Money, eur


def net(conn: Connection, account_id: str) -> Decimal:
    """Return the sum of an account's entries."""
    amounts = select(func.coalesce(func.sum(ledger.entries.c.amount), 0))
    return Decimal(conn.scalar(amounts.where(ledger.entries.c.account_id == account_id)) or 0)


def total(conn: Connection) -> Decimal:
    """Return the sum over all entries."""
    return Decimal(conn.scalar(select(func.sum(ledger.entries.c.amount))) or 0)


def test_a_posting_moves_money_and_creates_none(conn: Connection) -> None:
    ledger.post(conn, "gift", "g1", "ann", "bob", eur(30))

    assert (net(conn, "ann"), net(conn, "bob"), total(conn)) == (70, 30, 0)
    assert ledger.available(conn, "ann") == eur(70)
    assert ledger.available(conn, "bob") == eur(30)


def test_nobody_spends_what_he_does_not_have(conn: Connection) -> None:
    with pytest.raises(InsufficientFunds):
        ledger.post(conn, "gift", "g1", "ann", "bob", eur("100.01"))

    assert (net(conn, "ann"), net(conn, "bob")) == (100, 0)


def test_the_table_itself_refuses_an_overdraft(engine: Engine) -> None:
    with pytest.raises(IntegrityError, match="never_overdrawn"), engine.begin() as conn:
        conn.execute(update(ledger.accounts).values(balance=-1).where(ledger.accounts.c.id == "ann"))


def test_two_at_once_cannot_spend_the_same_money(engine: Engine) -> None:
    def spend(number: int) -> bool:
        try:
            with engine.begin() as conn:
                ledger.post(conn, "gift", f"g{number}", "ann", "bob", eur(60))
        except InsufficientFunds:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(spend, range(2))) == [False, True]


def test_customers_who_pay_each_other_at_once_do_not_deadlock(engine: Engine) -> None:
    def pay(number: int) -> None:
        source, target = ("ann", "bob") if number % 2 else ("bob", "ann")
        with engine.begin() as conn:
            ledger.post(conn, "gift", f"g{number}", source, target, eur(1))

    with engine.begin() as conn:
        ledger.post(conn, "gift", "start", "ann", "bob", eur(50))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(pay, range(40)))

    with engine.begin() as conn:
        assert (net(conn, "ann"), net(conn, "bob")) == (50, 50)


@pytest.mark.parametrize(("status", "error"), [("closed", AccountUnusable), ("frozen", AccountFrozenError)])
def test_an_account_out_of_use_takes_nothing(conn: Connection, status: str, error: type[Exception]) -> None:
    conn.execute(update(ledger.accounts).values(status=status).where(ledger.accounts.c.id == "bob"))

    with pytest.raises(error):
        ledger.post(conn, "gift", "g1", "ann", "bob", eur(1))


@pytest.mark.parametrize(("target", "money"), [("nobody", eur(1)), ("bob", Money(currency="JPY", amount=Decimal(1)))])
def test_an_account_must_exist_in_the_currency(conn: Connection, target: str, money: Money) -> None:
    with pytest.raises(AccountUnusable):
        ledger.post(conn, "gift", "g1", "ann", target, money)


def test_a_posting_is_reversed_once(conn: Connection) -> None:
    ledger.post(conn, "gift", "g1", "ann", "bob", eur(30))

    assert ledger.reverse(conn, "gift", "g1") is not None
    assert ledger.reverse(conn, "gift", "g1") is None
    assert (net(conn, "ann"), net(conn, "bob"), total(conn)) == (100, 0, 0)


def test_what_was_never_posted_is_not_reversed(conn: Connection) -> None:
    assert ledger.reverse(conn, "gift", "g1") is None
    assert net(conn, "ann") == 100


def test_money_goes_back_also_to_a_closed_account(conn: Connection) -> None:
    ledger.post(conn, "gift", "g1", "ann", "bob", eur(30))
    conn.execute(update(ledger.accounts).values(status="closed").where(ledger.accounts.c.id == "ann"))

    ledger.reverse(conn, "gift", "g1")

    assert net(conn, "ann") == 100


def test_what_the_receiver_spent_cannot_be_taken_back(conn: Connection) -> None:
    ledger.post(conn, "gift", "g1", "ann", "bob", eur(30))
    ledger.post(conn, "purchase", "p1", "bob", "bakery", eur(10))

    with pytest.raises(InsufficientFunds):
        ledger.reverse(conn, "gift", "g1")
