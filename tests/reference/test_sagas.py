"""The three sagas with their own steps on a real ledger, in-process: every way to end, and what stays."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Connection, select, update

from orchestrator import testing
from orchestrator.testing import TestRun
from sagas.order import Order, OrderReceipt, order
from sagas.payment import Payment, PaymentReceipt, payment
from sagas.transfer import Transfer, transfer
from tasks import inventory, ledger, notifications, payments, provider, transfers, warehouse
from tasks.database import outside_engine
from tasks.ledger import House
from tasks.money import Money, eur

TRANSFER = Transfer(id="t1", source="ann", target="bob", money=eur(40))


def an_order(*, sku: str = "lamp", card: str = "tok_visa", email: str = "ann@post.example") -> Order:
    """Return an order of three pieces for 25 EUR."""
    return Order(id="o1", sku=sku, quantity=3, total=eur(25), card=card, email=email)


def a_payment(*, card: str = "tok_visa", merchant: str = "bakery", money: Money | None = None) -> Payment:
    """Return a payment by ann, of 30 EUR if nothing else is said."""
    return Payment(
        id="p1",
        customer="ann",
        merchant=merchant,
        card=card,
        money=money or eur(30),
        customer_email="ann@post.example",
        merchant_email="bakery@post.example",
    )


def undone(run: TestRun) -> list[str]:
    """Return the compensations that a run performed, in order."""
    return [call.name for call in run.calls if call.role == "undo" and call.error is None]


def balances(conn: Connection) -> tuple[Money, Money]:
    """Return what ann and bob hold."""
    return ledger.available(conn, "ann"), ledger.available(conn, "bob")


def charge_state() -> str | None:
    """Return what the provider says about the only charge, or None."""
    with outside_engine().connect() as outside:
        return outside.scalar(select(provider.charges.c.state))


# Transfer


def test_a_transfer_moves_the_money(conn: Connection) -> None:
    run = testing.run(transfer, TRANSFER, connection=conn)

    assert run.result().moved == eur(40)
    assert balances(conn) == (eur(60), eur(40))


def test_a_rejected_debit_is_not_reversed(conn: Connection) -> None:
    too_much = TRANSFER.model_copy(update={"money": eur(101)})

    run = testing.run(transfer, too_much, connection=conn)

    assert (run.state, undone(run)) == ("failed", [])
    assert balances(conn) == (eur(100), eur(0))


def test_a_debit_that_timed_out_leaves_the_money_where_it_was(
    conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def post_then_time_out(*args: Any) -> None:
        post(*args)
        raise TimeoutError

    post = ledger.post
    monkeypatch.setattr(ledger, "post", post_then_time_out)

    run = testing.run(transfer, TRANSFER, connection=conn)

    assert run.state in ("failed", "compensated")
    assert balances(conn) == (eur(100), eur(0))


@pytest.mark.parametrize("status", ["closed", "frozen"])
def test_a_credit_that_cannot_be_made_gives_the_money_back(conn: Connection, status: str) -> None:
    conn.execute(update(ledger.accounts).values(status=status).where(ledger.accounts.c.id == "bob"))

    run = testing.run(transfer, TRANSFER, connection=conn)

    assert run.state == "compensated"
    assert balances(conn) == (eur(100), eur(0))


# Order


@pytest.mark.usefixtures("engine")
def test_an_order_is_charged_and_picked() -> None:
    run = testing.run(order, an_order())

    assert run.result() == OrderReceipt(order_id="o1", charge_id="o1", paid=eur(25), confirmed=True)
    assert (charge_state(), warehouse.on_hand()) == ("charged", 7)


@pytest.mark.usefixtures("engine")
def test_a_declined_card_ends_an_order_before_it_began() -> None:
    run = testing.run(order, an_order(card=provider.DECLINED))

    assert (run.state, undone(run)) == ("failed", [])
    assert (charge_state(), warehouse.on_hand()) == (None, 10)


@pytest.mark.usefixtures("engine")
def test_a_charge_without_an_answer_is_found_and_kept() -> None:
    run = testing.run(order, an_order(card=provider.TIMEOUT_AFTER_CHARGE))

    assert run.state == "completed"
    assert [call.role for call in run.calls if call.role == "probe"] == ["probe"]
    assert charge_state() == "charged"


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("card", ["tok_visa", provider.REFUND_FAILS_TWICE, provider.TIMEOUT_AFTER_CHARGE])
def test_an_order_that_cannot_be_filled_is_refunded(card: str) -> None:
    run = testing.run(order, an_order(sku="sold out", card=card))

    assert (run.state, undone(run)) == ("compensated", ["tasks.payments.refund"])
    assert charge_state() == "refunded"


@pytest.mark.usefixtures("engine")
def test_goods_picked_without_an_answer_go_back_before_the_money() -> None:
    warehouse.receive(warehouse.SLOW_SKU, 5)

    run = testing.run(order, an_order(sku=warehouse.SLOW_SKU))

    assert undone(run) == ["tasks.inventory.restock", "tasks.payments.refund"]
    assert (charge_state(), warehouse.on_hand()) == ("refunded", 15)


@pytest.mark.usefixtures("engine")
def test_a_refund_that_keeps_failing_parks_the_order_until_a_person_acts() -> None:
    run = testing.run(order, an_order(sku="sold out", card=provider.REFUND_DOWN))

    assert run.state == "parked"
    assert charge_state() == "charged"


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("host", ["bounce.example", "down.example"])
def test_a_mail_that_fails_undoes_nothing(host: str) -> None:
    run = testing.run(order, an_order(email=f"ann@{host}"))

    assert run.result().confirmed is False
    assert undone(run) == []
    assert charge_state() == "charged"


# Payment


def test_a_payment_reaches_the_merchant(conn: Connection) -> None:
    run = testing.run(payment, a_payment(), connection=conn)

    assert run.result() == PaymentReceipt(payment_id="p1", charge_id="p1", settled=eur(30), notified=2)
    assert balances(conn)[0] == eur(70)
    assert charge_state() == "charged"


@pytest.mark.parametrize("amount", [101, 5001])
def test_a_payment_that_is_refused_at_the_door_leaves_no_trace(conn: Connection, amount: int) -> None:
    run = testing.run(payment, a_payment(money=eur(amount)), connection=conn)

    assert (run.state, undone(run)) == ("failed", [])
    assert balances(conn)[0] == eur(100)


def test_a_wallet_emptied_after_the_look_is_not_overdrawn(conn: Connection) -> None:
    def look_then_lose_the_race(request: Payment) -> Money:
        transfers.debit.function(conn, TRANSFER.model_copy(update={"money": eur(90)}))
        return eur(100)

    stubs = {payments.check_balance: look_then_lose_the_race}
    run = testing.run(payment, a_payment(), connection=conn, stubs=stubs)

    assert run.state == "failed"
    assert balances(conn)[0] == eur(10)


def test_a_declined_payment_releases_the_hold(conn: Connection) -> None:
    run = testing.run(payment, a_payment(card=provider.DECLINED), connection=conn)

    assert (run.state, undone(run)) == ("compensated", ["tasks.payments.release"])
    assert balances(conn)[0] == eur(100)


def test_a_payment_that_cannot_be_settled_is_undone(conn: Connection) -> None:
    run = testing.run(payment, a_payment(merchant="nobody"), connection=conn)

    assert undone(run) == ["tasks.payments.refund", "tasks.payments.release"]
    assert balances(conn)[0] == eur(100)
    assert charge_state() == "refunded"


@pytest.mark.parametrize("failure", [ConnectionError("mail is down"), notifications.AddressRefused("who?")])
def test_a_settled_payment_is_never_reversed(conn: Connection, failure: Exception) -> None:
    run = testing.run(payment, a_payment(), connection=conn, stubs={notifications.send: failure})

    assert run.result().notified == 0
    assert undone(run) == []
    assert balances(conn)[0] == eur(70)


# All of them


def test_every_undo_is_declared_next_to_its_do() -> None:
    for do in (transfers.debit, transfers.credit, payments.charge, payments.hold, inventory.deduct):
        assert do.options.compensate.__module__ == do.__module__


def test_what_is_on_the_way_belongs_to_the_house(conn: Connection) -> None:
    testing.run(transfer, TRANSFER, connection=conn, stubs={transfers.credit: ConnectionError("not now")})

    transit = House.TRANSIT.account("EUR")
    rest = select(ledger.entries.c.amount).where(ledger.entries.c.account_id == transit)
    assert sum(conn.scalars(rest)) == 0
