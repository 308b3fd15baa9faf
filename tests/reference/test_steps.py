"""Each step and its undo, called as plain functions: outside a saga, a step is just that."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine

from tasks import inventory, ledger, notifications, payments, provider, transfers, warehouse
from tasks.inventory import Pick
from tasks.ledger import AccountUnusable, InsufficientFunds
from tasks.money import Money, eur
from tasks.notifications import AddressRefused, Mail
from tasks.payments import Bill, InvalidPayment, Payment
from tasks.provider import CardDeclined, ChargeRefused
from tasks.transfers import Transfer
from tasks.warehouse import OutOfStock, PickRefused

TRANSFER = Transfer(id="t1", source="ann", target="bob", money=eur(40))
PICK = Pick(reference="o1", sku="lamp", quantity=3)


def bill(card: str = "tok_visa", amount: int = 25) -> Bill:
    """Return a bill of the reference o1."""
    return Bill(reference="o1", card=card, money=eur(amount))


def wallet_payment(money: Money, merchant: str = "bakery") -> Payment:
    """Return a payment by ann."""
    return Payment(
        id="p1",
        customer="ann",
        merchant=merchant,
        card="tok_visa",
        money=money,
        customer_email="ann@post.example",
        merchant_email="shop@post.example",
    )


def balances(conn: Connection) -> tuple[Money, Money]:
    """Return what ann and bob hold."""
    return ledger.available(conn, "ann"), ledger.available(conn, "bob")


# Transfers


def test_a_transfer_and_its_undo(conn: Connection) -> None:
    transfers.debit(conn, TRANSFER)
    transfers.credit(conn, TRANSFER)
    assert balances(conn) == (eur(60), eur(40))

    transfers.undo_credit(conn, TRANSFER)
    transfers.undo_debit(conn, TRANSFER)
    assert balances(conn) == (eur(100), eur(0))


def test_undoing_a_debit_that_never_happened_creates_no_money(conn: Connection) -> None:
    transfers.undo_debit(conn, TRANSFER)

    assert balances(conn) == (eur(100), eur(0))


def test_undoing_a_debit_twice_gives_back_once(conn: Connection) -> None:
    transfers.debit(conn, TRANSFER)

    transfers.undo_debit(conn, TRANSFER)
    transfers.undo_debit(conn, TRANSFER)

    assert balances(conn) == (eur(100), eur(0))


def test_a_transfer_of_nothing_is_no_transfer() -> None:
    with pytest.raises(ValueError, match="positive"):
        Transfer(id="t1", source="ann", target="bob", money=eur(0))


def test_a_transfer_to_oneself_is_no_transfer() -> None:
    with pytest.raises(ValueError, match="two accounts"):
        Transfer(id="t1", source="ann", target="ann", money=eur(1))


# Cards


@pytest.mark.usefixtures("engine")
def test_a_card_is_charged_once_per_reference(effect_log: Path) -> None:
    assert payments.charge(bill()) == payments.charge(bill()) == payments.find_charge(bill())
    assert effect_log.read_text().count("charge") == 1


@pytest.mark.usefixtures("engine")
def test_a_charge_is_refunded_once(effect_log: Path) -> None:
    payments.charge(bill())

    payments.refund(bill())
    payments.refund(bill())

    assert payments.find_charge(bill()) is None
    assert effect_log.read_text().count("refund") == 1


@pytest.mark.usefixtures("engine")
def test_a_charge_that_arrives_after_its_refund_is_refused() -> None:
    payments.refund(bill())

    with pytest.raises(ChargeRefused):
        payments.charge(bill())


@pytest.mark.usefixtures("engine")
def test_one_reference_is_one_amount() -> None:
    payments.charge(bill(amount=25))

    with pytest.raises(ChargeRefused):
        payments.charge(bill(amount=26))


@pytest.mark.usefixtures("engine")
def test_a_declined_card_is_not_charged() -> None:
    with pytest.raises(CardDeclined):
        payments.charge(bill(provider.DECLINED))

    assert payments.find_charge(bill()) is None


@pytest.mark.usefixtures("engine")
def test_a_charge_without_an_answer_is_found() -> None:
    with pytest.raises(TimeoutError):
        payments.charge(bill(provider.TIMEOUT_AFTER_CHARGE))

    found = payments.find_charge(bill())
    assert found is not None
    assert found.money == eur(25)


@pytest.mark.usefixtures("engine")
def test_a_refund_that_fails_twice_succeeds_then() -> None:
    payments.charge(bill(provider.REFUND_FAILS_TWICE))

    for _ in range(2):
        with pytest.raises(ConnectionError):
            payments.refund(bill())
    payments.refund(bill())

    assert payments.find_charge(bill()) is None


# Wallet payments


@pytest.mark.parametrize("amount", [0, -1, 5001])
def test_a_payment_that_breaks_a_rule_is_refused(amount: int) -> None:
    with pytest.raises(InvalidPayment):
        payments.validate(wallet_payment(eur(amount)))


@pytest.mark.usefixtures("engine")
def test_the_wallet_is_looked_at_first() -> None:
    assert payments.check_balance(wallet_payment(eur(100))) == eur(100)
    with pytest.raises(InsufficientFunds):
        payments.check_balance(wallet_payment(eur(101)))


def test_a_look_at_the_wallet_is_no_promise(engine: Engine) -> None:
    payments.check_balance(wallet_payment(eur(80)))
    with engine.begin() as conn:
        transfers.debit(conn, TRANSFER)

    with pytest.raises(InsufficientFunds), engine.begin() as conn:
        payments.hold(conn, wallet_payment(eur(80)))


def test_a_hold_is_released(conn: Connection) -> None:
    payments.hold(conn, wallet_payment(eur(80)))
    assert balances(conn)[0] == eur(20)

    payments.release(conn, wallet_payment(eur(80)))
    assert balances(conn)[0] == eur(100)


def test_a_payment_is_settled_with_the_merchant(conn: Connection) -> None:
    payments.hold(conn, wallet_payment(eur(80)))

    assert payments.finalise(conn, wallet_payment(eur(80))).money == eur(80)


def test_a_merchant_that_does_not_exist_is_not_paid(conn: Connection) -> None:
    payments.hold(conn, wallet_payment(eur(80), merchant="nobody"))

    with pytest.raises(AccountUnusable):
        payments.finalise(conn, wallet_payment(eur(80), merchant="nobody"))


# Inventory


@pytest.mark.usefixtures("engine")
def test_goods_are_picked_and_returned_once(effect_log: Path) -> None:
    inventory.deduct(PICK)
    inventory.deduct(PICK)
    assert warehouse.on_hand() == 7

    inventory.restock(PICK)
    inventory.restock(PICK)
    assert warehouse.on_hand() == 10
    assert len(effect_log.read_text().splitlines()) == 2


@pytest.mark.usefixtures("engine")
def test_a_pick_that_arrives_after_its_return_is_refused() -> None:
    inventory.restock(PICK)

    with pytest.raises(PickRefused):
        inventory.deduct(PICK)
    assert warehouse.on_hand() == 10


@pytest.mark.usefixtures("engine")
def test_what_is_not_on_hand_is_not_picked() -> None:
    with pytest.raises(OutOfStock):
        inventory.deduct(Pick(reference="o1", sku="lamp", quantity=11))
    assert warehouse.on_hand() == 10


@pytest.mark.usefixtures("engine")
def test_a_pick_without_an_answer_is_returned() -> None:
    warehouse.receive(warehouse.SLOW_SKU, 5)
    pick = Pick(reference="o1", sku=warehouse.SLOW_SKU, quantity=5)

    with pytest.raises(TimeoutError):
        inventory.deduct(pick)
    inventory.restock(pick)

    assert warehouse.on_hand() == 15


# Notifications


@pytest.mark.usefixtures("engine")
def test_a_mail_is_sent_once(effect_log: Path) -> None:
    mail = Mail(reference="o1", recipient="ann@post.example", subject="Hello")

    notifications.send(mail)
    notifications.send(mail)

    assert len(effect_log.read_text().splitlines()) == 1


@pytest.mark.parametrize(("host", "error"), [("bounce.example", AddressRefused), ("down.example", ConnectionError)])
def test_a_mail_that_cannot_be_sent(host: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        notifications.send(Mail(reference="o1", recipient=f"ann@{host}", subject="Hello"))
