"""The checks of the reference application: none is broken by its sagas, and each planted error is found once."""

from __future__ import annotations

import csv
import importlib
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine, make_url

from orchestrator import reconcile
from orchestrator.engine.reconcile import reconcile as run
from orchestrator.reconcile import Check
from orchestrator.store.connection import Connection, open_connection
from sagas.onboarding import onboarding
from sagas.order import Order, order
from sagas.payment import payment
from sagas.reconciliation import reconciliation
from sagas.sync import SyncRequest, sync
from sagas.training import training
from sagas.transfer import transfer
from tasks import checks, ledger
from tasks.customers import Signup
from tasks.database import create_tables
from tasks.ledger import House
from tasks.models import TrainingJob
from tasks.money import eur
from tasks.outside import client
from tasks.outside.rules import SOLD_OUT
from tasks.payments import Payment
from tasks.transfers import Transfer
from tests.engine.stage import Child, start
from tests.reference.conftest import Outside


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with open_connection(database_url, name="test") as connection:
        yield connection


@pytest.fixture(autouse=True)
def statement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of the card provider; the checks are registered anew, with it."""
    monkeypatch.setenv("CARD_STATEMENT", str(tmp_path / "statement.csv"))
    monkeypatch.setattr(reconcile, "checks", {})
    monkeypatch.setattr("orchestrator.engine.reconcile.checks", reconcile.checks)
    importlib.reload(checks)
    return tmp_path / "statement.csv"


@pytest.fixture(autouse=True)
def town(
    connection: Connection,
    database_url: str,
    outside: Outside,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    statement: Path,
) -> None:
    """Runs of all sagas, that end well and that do not, with what they leave behind."""
    monkeypatch.setenv("LEDGER_DATABASE_URL", database_url)
    monkeypatch.setenv("MODELS_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("REPORTS_DIR", str(tmp_path / "reports"))
    engine = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"))
    create_tables(engine)
    with engine.begin() as conn:
        for house in House:
            ledger.open_account(conn, house.account("EUR"), "house", "EUR")
        for customer, kind in (("ann", "customer"), ("bob", "customer"), ("bakery", "merchant")):
            ledger.open_account(conn, customer, kind, "EUR")
        ledger.post(conn, "opening", "ann", House.EQUITY.account("EUR"), "ann", eur(100))
    engine.dispose()
    child = Child(database_url)
    person = {"document": "passport", "follow_up_after": 0}
    for name, target, amount in (("good", "bob", 40), ("nobody", "carl", 10), ("too much", "bob", 900)):
        start(connection, transfer, Transfer(id=name, source="ann", target=target, money=eur(amount)), run_id=name)
    for name, card in (("paid", "tok_visa"), ("declined", "tok_declined")):
        mails = {"customer_email": "ann@post.example", "merchant_email": "bakery@post.example"}
        paid = Payment(id=name, customer="ann", merchant="bakery", card=card, money=eur(7), **mails)
        start(connection, payment, paid, run_id=name)
    start(connection, onboarding, Signup(id="eve", name="Eve", email="eve@post.example", **person), run_id="eve")
    goods = {"quantity": 1, "total": eur(20), "card": "tok_visa", "email": "ann@post.example"}
    for name, sku in (("sent", "lamp"), ("sold out", SOLD_OUT)):
        start(connection, order, Order(id=name, sku=sku, **goods), run_id=name)
    for name, gate in (("taught", 0.5), ("stupid", 1.1)):
        start(connection, training, TrainingJob(id=name, account="checking-500", epochs=3, gate=gate), run_id=name)
    start(connection, sync, SyncRequest(account="checking-50"), run_id="synced")
    start(connection, reconciliation, run_id="looked")
    deadline = time.monotonic() + 120
    while connection.execute("SELECT id FROM orchestrator.runs WHERE finished_at IS NULL").fetchone():
        assert time.monotonic() < deadline, connection.execute("SELECT id, state FROM orchestrator.runs").fetchall()
        if not child.drain():
            time.sleep(0.02)
    child.close()
    with statement.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(("Date", "Reference", "Amount", "Currency"))
        charged = [each for each in outside.back_office("charges") if each["key"] in ("paid", "declined")]
        lines.writerows(
            ("2026-01-01", each["key"], each["body"]["money"]["amount"], each["body"]["money"]["currency"])
            for each in charged if each["state"] == "done"
        )  # fmt: skip


def breaks(connection: Connection) -> list[tuple[str, str]]:
    report = run(connection)
    assert [each.error for each in report.checks if each.error] == []
    return [(example["key"], example["problem"]) for each in report.checks for example in each.examples]


def state(connection: Connection, run_id: str) -> str:
    row = connection.execute("SELECT state FROM orchestrator.runs WHERE id = %s", [run_id]).fetchone()
    return str(row and row[0])


def test_what_the_sagas_leave_behind_breaks_nothing(connection: Connection) -> None:
    wanted = {
        "good": "completed", "nobody": "compensated", "too much": "failed", "paid": "completed",
        "declined": "compensated", "eve": "completed", "sent": "completed", "sold out": "compensated",
        "taught": "completed", "stupid": "compensated", "synced": "completed", "looked": "completed",
    }  # fmt: skip
    assert {name: state(connection, name) for name in wanted} == wanted
    assert breaks(connection) == []
    report = run(connection)
    sums = {each.name: each.sums for each in report.checks if each.sums}
    assert sums["a customer's account carries what its entries say"] == {"EUR": "93.0000"}


def _posted(kind: str, reference: str) -> str:
    """A posting that is whole in itself, between houses, which carry no balance."""
    return (
        f"WITH p AS (INSERT INTO ledger.postings (kind, reference) VALUES ('{kind}', '{reference}') RETURNING id) "
        "INSERT INTO ledger.entries SELECT id, account, 'EUR', amount FROM p, "
        "(VALUES ('house:transit:EUR', -1), ('house:nostro:EUR', 1)) AS e (account, amount)"
    )


_OF = "(SELECT id FROM ledger.postings WHERE kind = '{}' AND reference = '{}')"
PLANTED = {
    "credited twice": (_posted("credit", "good"), "good", "credited 2 times"),
    "debited twice": (_posted("debit", "good"), "good", "debited 2 times"),
    "a debit that stands": (_posted("debit", "nobody"), "nobody", "1 debits"),
    "credited after all": (_posted("credit", "too much"), "too much", "1 credits"),
    "settled twice": (_posted("settle", "paid"), "paid", "settled 2 times"),
    "compensated and settled": (_posted("settle", "declined"), "declined", "compensated, and settled"),
    "still held": (_posted("hold", "declined"), "declined", "still held"),
    "a customer is gone": ("UPDATE customers.profiles SET status = 'new'", "eve", "no active customer"),
    "an account is gone": ("DELETE FROM ledger.accounts WHERE id = 'customer:eve:EUR'", "eve", "has 0 accounts"),
    "half a posting": (
        f"DELETE FROM ledger.entries WHERE amount > 0 AND posting_id = {_OF.format('settle', 'paid')}",
        None, "has 1 entries",
    ),
    "a sum": (
        f"UPDATE ledger.entries SET amount = 8 WHERE amount > 0 AND posting_id = {_OF.format('settle', 'paid')}",
        None, "sum to 1.0000",
    ),
    "another currency": (
        "UPDATE ledger.entries SET currency = 'USD' WHERE amount > 0 AND posting_id = "
        + _OF.format("settle", "paid"), None, "2 currencies",
    ),
    "another model": ("UPDATE models.deployments SET model = 'x' WHERE job = 'taught'", "taught", "deployed x"),
    "a model after all": ("INSERT INTO models.deployments VALUES ('stupid', 'a', 'm')", "stupid", "deployed m"),
    "posted twice": (
        "WITH p AS (INSERT INTO ledger.postings (kind, reference) SELECT kind, reference FROM ledger.postings "
        "WHERE kind = 'spent' ORDER BY reference LIMIT 1 RETURNING id) INSERT INTO ledger.entries "
        "SELECT id, account, 'EUR', amount FROM p, "
        "(VALUES ('house:transit:EUR', -1), ('house:nostro:EUR', 1)) AS e (account, amount)",
        None, "booked, and posted 2 times",
    ),
    "not booked": (
        "UPDATE bank.transactions SET booked = false WHERE id = (SELECT min(id) FROM bank.transactions)",
        None, "not booked, and posted 1 times",
    ),
    "no report": ("DELETE FROM reconciliation.reports", "looked", "no report"),
    "a balance": ("UPDATE ledger.accounts SET balance = 1 WHERE id = 'bob'", "bob", "carries 1.0000"),
}  # fmt: skip


def test_each_planted_error_is_found_once(connection: Connection) -> None:
    wrong = {}
    for name, (sql, key, words) in PLANTED.items():
        with connection.transaction() as transaction:
            connection.execute(sql)  # type: ignore[call-overload]
            found = _breaks_inside(connection)
            if len(found) != 1 or words not in found[0][1] or key not in (None, found[0][0]):
                wrong[name] = found
            raise psycopg.Rollback(transaction)
    assert wrong == {}


def _breaks_inside(connection: Connection) -> list[tuple[str, str]]:
    """Run the SQL of the checks in the transaction that planted the error."""
    found = []
    for check in reconcile.checks.values():
        if isinstance(check, Check) and check.sql:
            for row in connection.execute(check.sql, {"after": "", "limit": 100}).fetchall():  # type: ignore[call-overload]
                key, problem = row[0], row[-1]
                found += [(key, problem)] if problem else []
    return found


def test_an_order_whose_charge_or_goods_are_gone_is_found_outside(connection: Connection) -> None:
    client.undo("charges", "sent")
    assert breaks(connection) == [("sent", "completed, and has picks")]
    client.undo("picks", "sent")
    assert breaks(connection) == [("sent", "completed, and has nothing")]


def test_what_the_providers_statement_says_otherwise_is_found(connection: Connection, statement: Path) -> None:
    true = statement.read_text()
    for false, found in {
        true.replace("7", "8"): ("paid", "the file says 8.00, we say 7.0000"),
        true.replace("EUR", "USD"): ("paid", "the file says USD, we say EUR"),
        true.splitlines()[0] + "\n": ("paid", "the file does not have it"),
        true + "2026-01-01,stranger,1.00,EUR\n": ("stranger", "line 3 of the file has it, and we do not"),
        true + "2026-01-01,paid,7.00,EUR\n": ("paid", "line 3 of the file has it a second time"),
    }.items():
        statement.write_text(false)
        assert breaks(connection) == [found]


def test_a_statement_that_is_not_there_and_a_provider_that_is_away_are_errors_of_their_checks(
    connection: Connection, statement: Path, outside: Outside
) -> None:
    statement.unlink()
    outside.fault("error")
    report = run(connection)
    errors = [(each.name[:11], each.error) for each in report.checks if each.error]
    assert [name for name, _ in errors] == ["an order th", "every card "] and report.exit_code == 2
    assert "500" in str(errors[0][1]) and "FileNotFoundError" in str(errors[1][1])


def test_several_planted_errors_are_all_found(connection: Connection) -> None:
    names = ("credited twice", "still held", "another model", "an account is gone", "a balance")
    chosen = [PLANTED[name] for name in names]
    for sql, _, _ in chosen:
        connection.execute(sql)  # type: ignore[call-overload]
    assert sorted(key for key, _ in breaks(connection)) == sorted(str(key) for _, key, _ in chosen)
