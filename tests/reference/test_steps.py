"""Each step and its undo, called as plain functions: outside a saga, a step is just that."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Connection, Engine, func, insert, select, update

from tasks import banking, customers, inventory, ledger, notifications, payments, reconciliation, transfers
from tasks.customers import Decision, EmailTaken, Signup
from tasks.database import ledger_engine
from tasks.inventory import Pick
from tasks.ledger import AccountUnusable, InsufficientFunds
from tasks.money import Money, eur
from tasks.notifications import Mail
from tasks.outside.client import Refused
from tasks.outside.rules import FORGED, SOLD_OUT
from tasks.payments import Bill, InvalidPayment, Payment
from tasks.reconciliation import Batch, Night
from tasks.transfers import Transfer
from tests.reference.conftest import Outside

TRANSFER = Transfer(id="t1", source="ann", target="bob", money=eur(40))
SIGNUP = Signup(
    id="s1", name="Sue", email="sue@post.example", document="pass-1", currencies=("EUR", "USD"), iban="DE02"
)
FROM_BANK = Transfer(id="t2", source="iban:DE02", target="bob", money=eur(40))
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


def test_money_from_another_bank_is_pulled_once_and_given_back_once(conn: Connection, outside: Outside) -> None:
    transfers.pull(FROM_BANK)
    transfers.pull(FROM_BANK)
    transfers.credit(conn, FROM_BANK)
    assert balances(conn)[1] == eur(40)

    transfers.undo_credit(conn, FROM_BANK)
    transfers.return_to_bank(FROM_BANK)
    assert balances(conn)[1] == eur(0)
    assert outside.records("debits") == {"t2": "undone"}


@pytest.mark.usefixtures("server")
def test_an_empty_account_at_another_bank_gives_nothing() -> None:
    with pytest.raises(Refused, match="no funds"):
        transfers.pull(FROM_BANK.model_copy(update={"source": "iban:XX00 1"}))


# Cards


@pytest.mark.usefixtures("server")
def test_a_card_is_charged_once_per_reference(outside: Outside) -> None:
    assert payments.charge(bill()) == payments.charge(bill()) == payments.find_charge(bill())
    assert outside.records("charges") == {"o1": "done"}


@pytest.mark.usefixtures("server")
def test_a_refunded_charge_is_not_found_and_not_made_again(outside: Outside) -> None:
    payments.charge(bill())
    payments.refund(bill())

    assert payments.find_charge(bill()) is None
    with pytest.raises(Refused):
        payments.charge(bill())
    assert outside.records("charges") == {"o1": "undone"}


@pytest.mark.usefixtures("server")
def test_one_reference_is_one_amount() -> None:
    payments.charge(bill(amount=25))

    with pytest.raises(Refused):
        payments.charge(bill(amount=26))


@pytest.mark.usefixtures("impatient")
def test_a_charge_without_an_answer_is_found(outside: Outside) -> None:
    outside.fault("lost", "charges")
    with pytest.raises(httpx.TimeoutException):
        payments.charge(bill())
    outside.recover()

    found = payments.find_charge(bill())
    assert found is not None
    assert found.money == eur(25)


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


def test_goods_are_picked_and_returned_once(outside: Outside) -> None:
    inventory.deduct(PICK)
    inventory.deduct(PICK)
    inventory.restock(PICK)
    inventory.restock(PICK)
    assert outside.records("picks") == {"o1": "undone"}


@pytest.mark.usefixtures("server")
def test_what_is_not_on_hand_is_not_picked() -> None:
    with pytest.raises(Refused, match="sold out"):
        inventory.deduct(Pick(reference="o1", sku=SOLD_OUT, quantity=1))


# Notifications


def test_a_mail_is_sent_once(outside: Outside) -> None:
    mail = Mail(reference="o1", recipient="ann@post.example", subject="Hello")
    notifications.send(mail)
    notifications.send(mail)
    assert outside.records("mails") == {"o1 ann@post.example": "done"}


@pytest.mark.usefixtures("server")
def test_a_mail_to_nobody_bounces() -> None:
    with pytest.raises(Refused, match="bounced"):
        notifications.send(Mail(reference="o1", recipient="ann@bounce.example", subject="Hello"))


# Customers


def test_a_profile_is_made_once_for_each_address(conn: Connection) -> None:
    customers.create_profile(conn, SIGNUP)
    with pytest.raises(EmailTaken):
        customers.create_profile(conn, SIGNUP.model_copy(update={"id": "s2"}))
    assert (customers.status_of(conn, "s1"), customers.status_of(conn, "s2")) == ("new", None)


def test_a_profile_and_its_accounts_are_removed_also_if_they_were_never_made(conn: Connection) -> None:
    for _ in range(2):
        customers.close_accounts(conn, SIGNUP)
        customers.remove_profile(conn, SIGNUP)
    customers.create_profile(conn, SIGNUP)
    assert customers.open_accounts(conn, SIGNUP) == ["customer:s1:EUR", "customer:s1:USD"]
    customers.close_accounts(conn, SIGNUP)
    customers.remove_profile(conn, SIGNUP)
    assert customers.status_of(conn, "s1") is None


@pytest.mark.usefixtures("server")
def test_the_identity_check_says_yes_or_no() -> None:
    assert customers.check_identity(SIGNUP).approved
    forged = SIGNUP.model_copy(update={"id": "s2", "document": FORGED})
    assert customers.check_identity(forged) == Decision(approved=False, reason="The document is forged.")


def test_a_link_to_a_bank_is_revoked(outside: Outside) -> None:
    assert customers.link_bank(SIGNUP) == "link-1"
    customers.revoke_link(SIGNUP)
    assert outside.records("links") == {"s1": "undone"}


# Banking


def test_a_page_is_fetched_looked_at_and_booked_once(engine: Engine) -> None:
    page = banking.fetch("checking-600", 0, 600)
    assert (page.count, page.total, page.next) == (600, 600, None)
    for _ in range(2):
        banking.fetch("checking-600", 0, 600)
        banking.enrich(page)
        banking.categorise(page, "categoriser")
        assert banking.detect_anomalies(page) == 1
    tables = (banking.transactions, banking.merchants, banking.categories, banking.anomalies)
    assert [banking.count(table, "checking-600") for table in tables] == [600, 600, 600, 1]

    with engine.begin() as conn:
        assert (banking.book(conn, page), banking.book(conn, page)) == (600, 0)
        entries = select(func.count(), func.sum(ledger.entries.c.amount))
        assert (
            conn.execute(entries.where(ledger.entries.c.account_id == banking.mirror("checking-600"))).one()[0] == 600
        )
        assert conn.scalar(select(func.sum(ledger.entries.c.amount))) == 0


@pytest.mark.usefixtures("engine")
def test_a_merchant_is_read_from_the_text() -> None:
    page = banking.fetch("checking-1", 0, 10)
    banking.enrich(page)
    with ledger_engine().connect() as conn:
        (text,), (merchant,) = (
            conn.scalars(select(column)).all() for column in (banking.transactions.c.text, banking.merchants.c.merchant)
        )
    assert merchant.upper() in text and len(merchant.split()) == len(text.split()) - 3


# Reconciliation

NIGHT = Night(id="n1", began_at=datetime(2026, 1, 2, tzinfo=UTC))


def plant_errors(engine: Engine) -> set[tuple[str, str]]:
    """Break the ledger in three ways that its tables let pass; return what must be found."""
    with engine.begin() as conn:
        ids = []
        for number, target in enumerate(("bob", "cy")):
            ledger.open_account(conn, target, "customer", "EUR")
            ids.append(ledger.post(conn, "gift", f"g{number}", "ann", target, eur(10)).id)
        gift, other = ids
        entries = ledger.entries.c
        conn.execute(update(ledger.accounts).values(balance=99).where(ledger.accounts.c.id == "ann"))
        conn.execute(update(ledger.entries).values(amount=7).where(entries.posting_id == gift, entries.amount > 0))
        conn.execute(update(ledger.accounts).values(balance=7).where(ledger.accounts.c.id == "bob"))
        wrong = update(ledger.entries).values(currency="USD")
        conn.execute(wrong.where(entries.posting_id == other, entries.account_id == "cy"))
    return {("ann", "balance"), (f"posting {gift}", "sum"), (f"posting {other}", "currency")}


def found(engine: Engine) -> set[tuple[str, str]]:
    """Return what reconciliation has found."""
    with engine.connect() as conn:
        rows = conn.execute(select(reconciliation.findings.c.subject, reconciliation.findings.c.what)).all()
    return {(subject, what) for subject, what in rows}


def check(engine: Engine, first: str, last: str) -> None:
    """Look at a batch, in a transaction as a worker does."""
    with engine.begin() as conn:
        reconciliation.check(conn, Batch(first=first, last=last))


def test_each_planted_error_is_found_once_though_two_batches_see_it(engine: Engine) -> None:
    planted = plant_errors(engine)
    for first, last in (("ann", "ann"), ("bob", "cy"), ("ann", "cy")):
        check(engine, first, last)
    assert found(engine) == planted


def test_a_ledger_in_order_has_no_findings(engine: Engine) -> None:
    (batch,), more = reconciliation.batches(None)
    assert (batch.first, batch.last, more) == ("ann", "bob", None)
    check(engine, "ann", "bob")
    assert found(engine) == set()


def test_batches_follow_one_another_over_the_active_accounts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciliation, "PAGE", 200)
    with engine.begin() as conn:
        rows = [{"id": f"c{n:03}", "kind": "customer", "currency": "EUR", "balance": 0} for n in range(250)]
        conn.execute(insert(ledger.accounts), rows)
        conn.execute(update(ledger.accounts).values(status="closed").where(ledger.accounts.c.id == "c001"))
    (first, second), more = reconciliation.batches(None)
    (third,), end = reconciliation.batches(more)
    assert (first.first, first.last, second.first, more, end) == ("ann", "c098", "c099", second.last, None)
    assert third.last == "c249"


def test_a_report_is_a_file_and_a_row_and_reaches_compliance_once(engine: Engine, outside: Outside) -> None:
    plant_errors(engine)
    check(engine, "ann", "cy")
    told = reconciliation.report(NIGHT, ["batch 7: gone"], True)
    assert reconciliation.report(NIGHT, ["batch 7: gone"], True) == told
    assert (told.accounts, told.findings, told.unchecked) == (3, 3, 1)
    assert Path(told.file).read_text().splitlines()[-1] == "not looked at,,batch 7: gone"
    assert reconciliation.send_to_compliance(told) == reconciliation.send_to_compliance(told) == told.sha256[:12]
    assert outside.records("reports") == {"n1": "done"}


def test_what_was_mended_is_not_in_the_next_report(engine: Engine) -> None:
    plant_errors(engine)
    check(engine, "ann", "cy")
    with engine.begin() as conn:
        tomorrow = conn.execute(select(func.now() + timedelta(days=1))).scalar_one()
    assert reconciliation.report(Night(id="n2", began_at=tomorrow), [], True).findings == 0
