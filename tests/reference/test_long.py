"""Sync and reconciliation: many pages and many batches, on the real engine and a real Postgres, with time skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, func, insert, select, text, update

from orchestrator.testing import Environment
from sagas import sync as sync_module
from sagas.reconciliation import Reconciled, reconciliation
from sagas.sync import Synced, SyncRequest, sync
from tasks import banking, ledger
from tasks import reconciliation as steps
from tasks.database import create_tables, ledger_engine, metadata
from tasks.ledger import House
from tasks.money import eur
from tests.reference.conftest import Outside

pytestmark = pytest.mark.timeout(300)

ACCOUNT = "checking-700"
SYNC = SyncRequest(account=ACCOUNT, page_size=100)
ALL = Synced(account=ACCOUNT, transactions=700, odd=1)


@pytest.fixture
def env(
    saga_environment: Environment, outside: Outside, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Environment]:
    """An environment with an empty ledger, and a sync whose links are two pages long."""
    monkeypatch.setenv("LEDGER_DATABASE_URL", saga_environment.database_url)
    monkeypatch.setenv("REPORTS_DIR", str(tmp_path / "reports"))
    monkeypatch.setattr(sync_module, "PAGES_PER_LINK", 2)
    create_tables(ledger_engine())
    with ledger_engine().begin() as conn:
        conn.execute(text(f"TRUNCATE {', '.join(table.fullname for table in metadata.sorted_tables)}"))
        for house in House:
            ledger.open_account(conn, house.account("EUR"), "house", "EUR")
    yield saga_environment
    ledger_engine().dispose()


@pytest.fixture
def books(env: Environment) -> Engine:
    return ledger_engine()


def postings(books: Engine) -> int:
    """Return how many transactions were booked, and make sure that each was booked once."""
    with books.connect() as conn:
        references = conn.scalars(select(ledger.postings.c.reference)).all()
    assert len(references) == len(set(references))
    return len(references)


# Sync


def test_a_sync_goes_through_all_pages_and_books_each_transaction_once(env: Environment, books: Engine) -> None:
    run = env.run(sync, SYNC)

    assert run.output == ALL
    assert postings(books) == 700
    tables = (banking.transactions, banking.merchants, banking.categories, banking.anomalies)
    assert [banking.count(table, ACCOUNT) for table in tables] == [700, 700, 700, 1]


def test_an_account_without_transactions_is_synced_as_well(env: Environment, books: Engine) -> None:
    run = env.run(sync, SyncRequest(account="checking-0"))

    assert run.get() == Synced(account="checking-0", transactions=0, odd=0)
    assert postings(books) == 0


def test_the_history_of_a_sync_does_not_grow(env: Environment, books: Engine) -> None:
    run = env.run(sync, SYNC, task_id="long")

    assert run.state == "completed"
    with books.connect() as conn:
        links = conn.execute(text("SELECT run_id, count(*) AS n FROM orchestrator.history GROUP BY 1")).all()
    assert len(links) == 4, "seven pages, two a link"
    assert max(link.n for link in links) <= 2 * 5 * 4, "steps of a link, with a few entries each"


def test_a_hundred_thousand_transactions_make_no_longer_history_than_a_few(
    env: Environment, books: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync_module, "PAGES_PER_LINK", 10)
    run = env.run(sync, SyncRequest(account="checking-100000", page_size=2000), task_id="huge")

    assert run.output == Synced(account="checking-100000", transactions=100_000, odd=200)
    assert postings(books) == 100_000
    with books.connect() as conn:
        size = text("SELECT run_id, sum(pg_column_size(entries)) AS bytes FROM orchestrator.journal GROUP BY 1")
        links = conn.execute(size).all()
    assert len(links) == 5
    assert max(link.bytes for link in links) < 200_000


def test_a_sync_shows_how_far_it_is(env: Environment) -> None:
    run = env.run(sync, SYNC)

    shown = run.result.published["progress"]
    assert (shown["done"], shown["total"]) == (700, 700)


def test_a_bank_that_stumbles_is_asked_again(env: Environment, outside: Outside) -> None:
    outside.fault("error", "feeds", times=3)
    assert env.run(sync, SYNC).output == ALL


def test_a_sync_that_ends_early_leaves_the_rest_to_the_next(env: Environment, outside: Outside, books: Engine) -> None:
    env.fail(banking.book, "rejected", key="tasks.banking.book#1")
    assert env.run(sync, SYNC).state == "failed"
    assert postings(books) == 100, "what the bank has booked has happened"

    env.heal()
    assert env.run(sync, SYNC, task_id="next").output == ALL
    assert postings(books) == 700


OF_A_SYNC = [banking.fetch, banking.enrich, banking.categorise, banking.detect_anomalies, banking.book]


@pytest.mark.parametrize("step", OF_A_SYNC, ids=str)
def test_a_crash_at_a_step_of_a_sync_changes_nothing(env: Environment, books: Engine, step: Any) -> None:
    env.fail(step, "crash", at="after")
    assert env.run(sync, SYNC).output == ALL
    assert postings(books) == 700
    assert banking.count(banking.anomalies, ACCOUNT) == 1


# Reconciliation


def open_many(conn: Connection, number: int) -> None:
    """Open ten times so many customer accounts, and close all but one in ten."""
    rows = [
        {
            "id": f"c{n:05}",
            "kind": "customer",
            "currency": "EUR",
            "balance": 0,
            "status": "closed" if n % 10 else "open",
        }
        for n in range(number * 10)
    ]
    conn.execute(insert(ledger.accounts), rows)


@pytest.fixture
def planted(books: Engine, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A thousand active accounts in ten batches on four pages, with three errors; returns what must be found."""
    monkeypatch.setattr(steps, "PAGE", 3 * steps.BATCH)
    with books.begin() as conn:
        open_many(conn, 1000)
        gift = ledger.post(conn, "opening", "gift", House.EQUITY.account("EUR"), "c00070", eur(5)).id
        amount = update(ledger.entries).values(amount=4).where(ledger.entries.c.amount == 5)
        conn.execute(amount)
        accounts = ledger.accounts
        conn.execute(update(accounts).values(balance=4).where(accounts.c.id == "c00070"))
        for wrong in ("c00050", "c09990"):
            conn.execute(update(accounts).values(balance=1).where(accounts.c.id == wrong))
    return {"c00050", "c09990", f"posting {gift}"}


def found(books: Engine) -> set[str]:
    with books.connect() as conn:
        subjects = conn.scalars(select(steps.findings.c.subject)).all()
    assert len(subjects) == len(set(subjects))
    return set(subjects)


def report(books: Engine) -> Any:
    with books.connect() as conn:
        return conn.execute(select(steps.reports)).one()


def test_each_planted_error_is_found_once_and_reported(
    env: Environment, books: Engine, planted: set[str], outside: Outside
) -> None:
    run = env.run(reconciliation, task_id="night")

    told = report(books)
    receipt = outside.back_office("reports")[0]["answer"]["receipt"]
    assert run.output == Reconciled(accounts=1000, findings=3, unchecked=0, complete=True, receipt=receipt)
    assert found(books) == planted
    assert (told.night, told.accounts, told.findings) == ("night", 1000, 3)
    assert {line.split(",")[0] for line in Path(told.file).read_text().splitlines()[1:]} == planted
    assert outside.records("reports") == {"night": "done"}


def test_the_history_has_a_line_for_each_page_and_none_for_a_batch(
    env: Environment, books: Engine, planted: set[str]
) -> None:
    env.run(reconciliation, task_id="night")
    with books.connect() as conn:
        asked = text("SELECT count(*) FROM orchestrator.history WHERE run_id = 'night' AND kind = 'asked'")
        assert conn.scalar(asked) == 1 + 4 + 2, "the begin, four pages, the report, compliance"


def test_a_batch_that_cannot_be_looked_at_is_in_the_report(
    env: Environment, books: Engine, planted: set[str], outside: Outside
) -> None:
    env.stub({steps.check: fails_on({"c00000"})})
    run = env.run(reconciliation)

    assert (run.output.unchecked, run.output.complete) == (1, True)
    assert (report(books).unchecked, report(books).complete) == (1, True)
    assert "not looked at,,batch 0: no answer" in Path(report(books).file).read_text()
    assert set(outside.records("reports").values()) == {"done"}


def test_a_night_on_which_much_failed_says_so(env: Environment, books: Engine, planted: set[str]) -> None:
    env.stub({steps.check: fails_on({"c00000", "c01000"})})
    run = env.run(reconciliation)

    assert (run.state, run.output.complete, report(books).complete) == ("completed", False, False)


def fails_on(firsts: set[str]) -> Any:
    """Return a stand-in for `check` that fails for batches that begin so."""

    def check(batch: steps.Batch) -> None:
        if batch.first in firsts:
            raise ConnectionError("no answer")

    return check


def test_compliance_that_does_not_answer_at_first_is_told_once(
    env: Environment, planted: set[str], outside: Outside
) -> None:
    outside.fault("lost", "reports", verb="do", seconds=0, times=2)
    assert env.run(reconciliation).state == "completed"
    assert set(outside.records("reports").values()) == {"done"}


OF_A_NIGHT = [steps.begin, steps.batches, steps.check, steps.report, steps.send_to_compliance]


@pytest.mark.parametrize("step", OF_A_NIGHT, ids=str)
def test_a_crash_at_a_step_of_a_reconciliation_changes_nothing(
    env: Environment, books: Engine, planted: set[str], outside: Outside, step: Any
) -> None:
    env.fail(step, "crash", at="after")
    assert env.run(reconciliation, task_id="night").output.findings == 3
    assert found(books) == planted
    assert outside.records("reports") == {"night": "done"}


def test_no_account_is_an_empty_report(env: Environment, books: Engine) -> None:
    assert env.run(reconciliation).output.accounts == 0
    with books.connect() as conn:
        assert conn.scalar(select(func.count()).select_from(steps.reports)) == 1
