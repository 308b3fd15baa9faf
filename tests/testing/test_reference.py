"""The reference sagas, on their own ledger and an outside world of their own, keep their promises whatever fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from orchestrator import testing
from orchestrator.testing import Environment, EnvironmentRun, Exploration
from sagas.onboarding import onboarding
from sagas.order import Order, order
from sagas.payment import Payment, payment
from sagas.reconciliation import reconciliation
from sagas.sync import SyncRequest, sync
from sagas.training import training
from sagas.transfer import Transfer, transfer
from tasks import banking, customers, ledger, models
from tasks.customers import Signup
from tasks.database import create_tables, ledger_engine, metadata
from tasks.ledger import House
from tasks.models import TrainingJob
from tasks.money import eur
from tasks.outside import client
from tasks.outside.book import Book
from tasks.outside.server import Server

pytestmark = pytest.mark.timeout(600)  # many schedules, on a machine that may be busy
TRANSFER = Transfer(id="t1", source="ann", target="bob", money=eur(40))
ORDER = Order(id="o1", sku="lamp", quantity=3, total=eur(25), card="tok_visa", email="ann@post.example")
PAYMENT = Payment(
    id="p1", customer="ann", merchant="bakery", card="tok_visa", money=eur(30),
    customer_email="ann@post.example", merchant_email="bakery@post.example",
)  # fmt: skip
SIGNUP = Signup(id="c1", name="Cleo", email="cleo@post.example", document="doc_1", iban="DE01")

Explore = Callable[..., Exploration]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The outside world, in threads of this process."""
    with Server(tmp_path / "outside.jsonl") as running:
        monkeypatch.setenv("OUTSIDE_URL", running.url)
        yield running
        client.close()


@pytest.fixture
def explore(
    saga_environment: Environment, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Explore]:
    """Explore a saga in a world that is made anew each time: ann has 100 EUR, and nothing has happened outside."""
    monkeypatch.setenv("LEDGER_DATABASE_URL", saga_environment.database_url)
    engine = ledger_engine()
    create_tables(engine)

    def fresh() -> None:
        server.book.close()
        (tmp_path / "outside.jsonl").unlink()
        server.book = Book(tmp_path / "outside.jsonl")
        with engine.begin() as conn:
            tables = reversed(metadata.sorted_tables)
            conn.execute(text("; ".join(f"DELETE FROM {table.fullname}" for table in tables)))
            for house in House:
                ledger.open_account(conn, house.account("EUR"), "house", "EUR")
            for customer in ("ann", "bob"):
                ledger.open_account(conn, customer, "customer", "EUR")
            ledger.open_account(conn, "bakery", "merchant", "EUR")
            ledger.post(conn, "opening", "ann", House.EQUITY.account("EUR"), "ann", eur(100))

    def explore(
        saga: Any, argument: Any, invariant: Callable[..., None], also: Callable[[], None] = lambda: None
    ) -> Exploration:
        def setup() -> None:
            fresh()
            also()

        found = testing.explore(
            saga, argument, invariant=invariant, setup=setup, pairs=0, late=True, environment=saga_environment
        )
        assert {"completed", "failed", "cancelled"} <= found.ends.keys() and not found.exhausted
        return found

    yield explore
    engine.dispose()


def held(account: str) -> Decimal:
    with ledger_engine().connect() as conn:
        return ledger.available(conn, account).amount


def happened(server: Server, kind: str) -> bool:
    """Tell whether something of this kind was done outside, and is not undone."""
    return any(record.state == "done" for record in server.book.of(kind))


def test_a_transfer_is_made_whole_or_not_at_all(explore: Explore) -> None:
    def conserved(run: EnvironmentRun) -> None:
        assert (held("ann"), held("bob")) == ((60, 40) if run.state == "completed" else (100, 0))

    explore(transfer, TRANSFER, conserved)


def test_an_order_is_paid_and_picked_or_neither(explore: Explore, server: Server) -> None:
    def fair(run: EnvironmentRun) -> None:
        done = run.state == "completed"
        assert (happened(server, "charges"), happened(server, "picks")) == (done, done)

    explore(order, ORDER, fair)


def test_a_payment_is_settled_for_good_or_released(explore: Explore, server: Server) -> None:
    def settled(run: EnvironmentRun) -> None:
        done = run.state == "completed"
        assert (held("ann"), happened(server, "charges")) == ((70, True) if done else (100, False))

    explore(payment, PAYMENT, settled)


def test_an_onboarding_makes_a_customer_or_leaves_no_trace(explore: Explore, server: Server) -> None:
    def whole(run: EnvironmentRun) -> None:
        with ledger_engine().connect() as conn:
            status = customers.status_of(conn, "c1")
            opened = conn.scalar(text("SELECT count(*) FROM ledger.accounts WHERE id LIKE 'customer:c1:%'"))
        done = run.state == "completed"
        assert (status, opened) == (("active", 1) if done else (None, 0))
        assert happened(server, "links") == (done and run.output.bank_token is not None)

    explore(onboarding, SIGNUP, whole)


def test_a_sync_books_each_transaction_once(explore: Explore) -> None:
    def once(run: EnvironmentRun) -> None:
        with ledger_engine().connect() as conn:
            booked = conn.scalars(text("SELECT reference FROM ledger.postings WHERE kind = 'spent'")).all()
        assert len(booked) == len(set(booked)) <= 4
        assert run.state != "completed" or len(booked) == banking.count(banking.merchants, "few-4") == 4

    explore(sync, SyncRequest(account="few-4", page_size=4), once)


def test_a_night_is_reported_once(
    explore: Explore, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def reported(run: EnvironmentRun) -> None:
        sent = list(server.book.of("reports"))
        assert len(sent) <= 1
        assert run.state != "completed" or (run.output.accounts, len(sent)) == (2, 1)

    monkeypatch.setenv("REPORTS_DIR", str(tmp_path / "reports"))
    explore(reconciliation, (), reported)


def test_a_training_serves_its_model_or_leaves_no_file(
    explore: Explore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    numbers = count()
    job = TrainingJob(id="j1", account="labelled-200", epochs=2, gate=0.0)
    monkeypatch.setattr(models, "CERTAIN", {})  # so little training teaches little

    def anew() -> None:
        monkeypatch.setenv("MODELS_DIR", str(tmp_path / f"models-{next(numbers)}"))

    def serves(run: EnvironmentRun) -> None:
        with ledger_engine().connect() as conn:
            serving = models.serving(conn, job.alias)
        assert (serving is not None) == (run.state == "completed")
        assert serving is None or serving.epoch == job.epochs, "trained to the end, wherever it was interrupted"
        assert any(Path(os.environ["MODELS_DIR"]).glob("j1/*")) == (run.state == "completed")

    explore(training, job, serves, anew)
