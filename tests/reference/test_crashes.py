"""A pool child is killed at each step and each undo of every saga, its effect done and its outcome not committed.

All runs are started at once, on a real worker, a real database and an outside world in a process of its own; each test
looks at one of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text

from orchestrator.saga import registry as saga_registry
from orchestrator.step import registry as step_registry
from sagas.onboarding import onboarding
from sagas.order import Order, order
from sagas.payment import payment
from sagas.training import training
from sagas.transfer import transfer
from tasks import ledger
from tasks.customers import Signup
from tasks.database import create_tables, ledger_engine
from tasks.ledger import House
from tasks.models import TrainingJob
from tasks.money import eur
from tasks.outside.process import Process
from tasks.outside.rules import FORGED, SOLD_OUT
from tasks.payments import Payment
from tasks.transfers import Transfer
from tests.acceptance.running import ROOT, Worker, until
from tests.reference.regretted import regretted
from tests.reference.test_long import OF_A_NIGHT, OF_A_SYNC

pytestmark = [pytest.mark.own_process, pytest.mark.timeout(300)]

BARRED = "Nobody"  # the database refuses to make a customer of that name
LOST_CARD, LOST_SKU, LOST_IBAN = "tok_lost", "SKU-LOST", "LOST"
STEPS_IN = [
    f"tasks.{module}" for module in ("banking", "customers", "inventory", "models", "notifications", "payments",
                                     "reconciliation", "transfers")
]  # fmt: skip
FAULTS: dict[str, dict[str, Any]] = {
    f"lost {kind}": {"what": "lost", "kind": kind, "verb": "do", "holding": holding, "seconds": 0}
    for kind, holding in (("charges", LOST_CARD), ("picks", LOST_SKU), ("links", LOST_IBAN))
}


@dataclass(frozen=True)
class Site:
    """Where the runs live."""

    database_url: str
    folder: Path
    worker: Worker

    def outside(self, run: str) -> dict[str, str]:
        """Return what became of the run's keys outside, by kind and key, from the log of what happened."""
        found = {}
        for line in self._log():
            if line["key"].split(" ")[0].split("/")[0] == run:
                found[f"{line['kind']} {line['key']}".replace(run, "*")] = line["event"]
        return found

    def happened_twice(self) -> list[str]:
        """Return what was done or undone outside more than once."""
        counted = Counter(f"{line['event']} {line['kind']} {line['key']}" for line in self._log())
        return [effect for effect, times in counted.items() if times > 1]

    def reported(self) -> list[str]:
        """Return the nights of which compliance has heard."""
        return [line["key"] for line in self._log() if line["kind"] == "reports"]

    def _log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "outside.jsonl").read_text().splitlines()]

    def moved(self, run: str) -> dict[str, Decimal]:
        """Return the net movement of the run on each account that it moved."""
        query = """SELECT e.account_id, sum(e.amount) FROM ledger.postings p
                   JOIN ledger.entries e ON e.posting_id = p.id WHERE p.reference = %s
                   GROUP BY 1 HAVING sum(e.amount) <> 0"""
        return dict(self._rows(query, run))

    def customer(self, run: str) -> tuple[int, int]:
        """Return the number of active profiles and of accounts of the run."""
        query = """SELECT (SELECT count(*) FROM customers.profiles WHERE id = %s AND status = 'active'),
                          (SELECT count(*) FROM ledger.accounts WHERE id LIKE 'customer:' || %s || ':%%')"""
        return self._rows(query, run, run)[0]

    def serving(self, alias: str) -> str | None:
        """Return the file that serves under an alias."""
        rows = self._rows("SELECT model FROM models.aliases WHERE name = %s", alias)
        return rows[0][0] if rows else None

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with psycopg.connect(self.database_url) as connection:
            return connection.execute(query, values).fetchall()


@dataclass(frozen=True)
class Case:
    """A saga whose pool child is killed at one of its tasks, and what is true in the end."""

    id: str
    saga: Any
    request: Any
    dies_at: str
    state: str
    holds: Callable[[Site, str], bool]


def cases() -> Iterator[Case]:
    """Tell every case; a scenario is played once for each task at which the child is to die."""
    for name, (saga, make, state, holds, tasks) in SCENARIOS.items():
        for task in tasks:
            run = f"{name}-{task.rpartition('.')[2]}"
            yield Case(run, saga, make(run), f"tasks.{task}", state, holds)


def a_transfer(run: str, source: str = "rich", target: str = "poor") -> Transfer:
    return Transfer(id=run, source=source, target=target, money=eur(5))


def an_order(run: str, **other: str) -> Order:
    fields = {"sku": "lamp", "card": "tok_visa", **other}
    return Order(id=run, quantity=1, total=eur(5), email="ann@post.example", **fields)


def a_payment(run: str, card: str = "tok_visa", merchant: str = "bakery") -> Payment:
    emails = {"customer_email": "ann@post.example", "merchant_email": "bakery@post.example"}
    return Payment(id=run, customer="rich", merchant=merchant, card=card, money=eur(5), **emails)


def a_signup(run: str, document: str = "passport", iban: str = "DE02", name: str = "Sue") -> Signup:
    day = timedelta(seconds=1)
    return Signup(id=run, name=name, email=f"{run}@post.example", document=document, iban=iban, follow_up_after=day)


def a_job(run: str, account: str = "labelled-600", gate: float = 0.9) -> TrainingJob:
    return TrainingJob(id=run, alias=run, account=account, epochs=6, gate=gate)


def is_gone(site: Site, run: str) -> bool:
    return site.serving(run) is None and not (site.folder / "models" / run).exists()


CHARGED, REFUNDED = {"charges *": "did"}, {"charges *": "undid"}
MAILS = {"mails *": "did"}
SETTLED = {"rich": Decimal(-5), "bakery": Decimal(5)}
MOVED = {"rich": Decimal(-5), "poor": Decimal(5)}
SCENARIOS: dict[str, tuple[Any, Any, str, Any, list[str]]] = {
    "transfer": (
        transfer, a_transfer, "completed", lambda site, run: site.moved(run) == MOVED,
        ["transfers.debit", "transfers.credit"],
    ),
    "transfer-closed": (
        transfer, lambda run: a_transfer(run, target="closed"), "compensated", lambda site, run: site.moved(run) == {},
        ["transfers.debit", "transfers.undo_debit"],
    ),
    "transfer-bank": (
        transfer, lambda run: a_transfer(run, source="iban:DE02"), "completed",
        lambda site, run: site.outside(run) == {"debits *": "did"} and site.moved(run)["poor"] == 5,
        ["transfers.pull", "transfers.credit"],
    ),
    "transfer-bank-closed": (
        transfer, lambda run: a_transfer(run, "iban:DE02", "closed"), "compensated",
        lambda site, run: site.outside(run) == {"debits *": "undid"} and site.moved(run) == {},
        ["transfers.return_to_bank"],
    ),
    "transfer-regretted": (
        regretted, a_transfer, "compensated", lambda site, run: site.moved(run) == {}, ["transfers.undo_credit"],
    ),
    "order": (
        order, an_order, "completed",
        lambda site, run: site.outside(run) == CHARGED | {"picks *": "did", "mails * ann@post.example": "did"},
        ["payments.charge", "inventory.deduct", "notifications.send"],
    ),
    "order-sold-out": (
        order, lambda run: an_order(run, sku=SOLD_OUT), "compensated", lambda site, run: site.outside(run) == REFUNDED,
        ["payments.refund"],
    ),
    "order-lost-goods": (
        order, lambda run: an_order(run, sku=LOST_SKU), "compensated",
        lambda site, run: site.outside(run) == REFUNDED | {"picks *": "undid"},
        ["inventory.restock"],
    ),
    "payment": (
        payment, a_payment, "completed",
        lambda site, run: site.moved(run) == SETTLED and site.outside(run).items() >= CHARGED.items(),
        ["payments.validate", "payments.check_balance", "payments.hold", "payments.charge", "payments.finalise",
         "notifications.send"],
    ),
    "payment-lost": (
        payment, lambda run: a_payment(run, card=LOST_CARD), "completed",
        lambda site, run: site.moved(run) == SETTLED and site.outside(run).items() >= CHARGED.items(),
        ["payments.find_charge"],
    ),
    "payment-closed": (
        payment, lambda run: a_payment(run, merchant="closed"), "compensated",
        lambda site, run: site.moved(run) == {} and site.outside(run) == REFUNDED,
        ["payments.refund", "payments.release"],
    ),
    "onboarding": (
        onboarding, a_signup, "completed",
        lambda site, run: site.customer(run) == (1, 1) and site.outside(run)["links *"] == "did",
        ["customers.create_profile", "customers.check_identity", "customers.open_accounts", "customers.link_bank",
         "customers.activate", "notifications.send"],
    ),
    "onboarding-forged": (
        onboarding, lambda run: a_signup(run, document=FORGED), "compensated",
        lambda site, run: site.customer(run) == (0, 0) and "links *" not in site.outside(run),
        ["customers.remove_profile", "notifications.send"],
    ),
    "onboarding-lost": (
        onboarding, lambda run: a_signup(run, iban=LOST_IBAN), "completed",
        lambda site, run: site.customer(run) == (1, 1) and site.outside(run)["links *"] == "undid",
        ["customers.revoke_link"],
    ),
    "onboarding-barred": (
        onboarding, lambda run: a_signup(run, name=BARRED), "compensated",
        lambda site, run: site.customer(run) == (0, 0) and site.outside(run)["links *"] == "undid",
        ["customers.close_accounts"],
    ),
    "training": (
        training, a_job, "completed",
        lambda site, run: (site.serving(run) or "").endswith(f"{run}/model.npz"),
        ["models.preprocess", "models.train", "models.evaluate", "models.deploy", "models.verify"],
    ),
    "training-noisy": (
        training, lambda run: a_job(run, account="noisy-300"), "compensated", is_gone, ["models.discard"],
    ),
    "training-useless": (  # passes a gate that is none, and fails where it serves
        training, lambda run: a_job(run, account="noisy-300", gate=0.0), "compensated", is_gone, ["models.withdraw"],
    ),
}  # fmt: skip
CASES = {case.id: case for case in cases()}


@pytest.fixture(scope="module")
def site(
    request: pytest.FixtureRequest, _postgres_url: str, _template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A database, an outside world with its faults, and a worker, for all cases."""
    name, folder = f"reference_{os.getpid()}", tmp_path_factory.mktemp("reference")
    (folder / "orders").mkdir()
    with psycopg.connect(_postgres_url, autocommit=True) as connection:
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        connection.execute(create.format(sql.Identifier(name), sql.Identifier(_template)))
    database_url = urlsplit(_postgres_url)._replace(path=f"/{name}").geturl()
    with Process(folder / "outside.jsonl") as outside, pytest.MonkeyPatch.context() as patch:
        environment = {
            "ORCHESTRATOR_DATABASE_URL": database_url,
            "LEDGER_DATABASE_URL": database_url,
            "CELERY_BROKER_URL": _broker_url(request),
            "ORCHESTRATOR_PUMP_INTERVAL": "0.1",
            "OUTSIDE_URL": outside.url,
            "MODELS_DIR": str(folder / "models"),
            "REPORTS_DIR": str(folder / "reports"),
            "REFERENCE_ORDERS": str(folder / "orders"),
        }
        for variable, value in environment.items():
            patch.setenv(variable, value)
        _prepare(outside.url)
        worker = Worker("celery", folder / "worker.log", environment, app="tests.reference.app").start()
        yield Site(database_url, folder, worker)
        assert worker.is_alive, worker.said
        worker.stop()
        ledger_engine().dispose()
    with psycopg.connect(_postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _broker_url(request: pytest.FixtureRequest) -> str:
    given = os.environ.get("ORCHESTRATOR_TEST_BROKER_URL")
    return given or urlsplit(request.getfixturevalue("servers").broker_url)._replace(path="/251").geturl()


def _prepare(outside_url: str) -> None:
    """Bind the sagas to the worker's app, whatever other apps other tests have made; open the books."""
    from tests.reference.app import app, orchestrator

    app.conf.broker_url = os.environ["CELERY_BROKER_URL"]
    app.set_default()
    assert orchestrator.settings and orchestrator.bell and orchestrator.client
    for saga in saga_registry.sagas.values():
        if saga.__module__.startswith(("sagas.", "tests.reference.")):
            saga.starter = orchestrator
    for step in step_registry.steps.values():
        if step.__module__.startswith("tasks."):
            step.bound = app.tasks[step.name]
    engine = ledger_engine()
    create_tables(engine)
    with engine.begin() as conn:
        for house in House:
            ledger.open_account(conn, house.account("EUR"), "house", "EUR")
        for account in ("rich", "poor", "closed"):
            ledger.open_account(conn, account, "customer", "EUR")
        ledger.open_account(conn, "bakery", "merchant", "EUR")
        ledger.post(conn, "opening", "rich", House.EQUITY.account("EUR"), "rich", eur(1000))
        conn.execute(ledger.accounts.update().values(status="closed").where(ledger.accounts.c.id == "closed"))
        conn.execute(text(f"ALTER TABLE customers.profiles ADD CHECK (status <> 'active' OR name <> '{BARRED}')"))
    with httpx.Client(base_url=outside_url, trust_env=False) as http:
        for name, fault in FAULTS.items():
            http.put(f"/faults/{name}", json=fault).raise_for_status()


@pytest.fixture(scope="module")
def runs(site: Site) -> dict[str, Any]:
    """All runs, started; each has its order to die."""
    for case in CASES.values():
        (site.folder / "orders" / f"{case.id} {case.dies_at}").touch()
    return {case.id: case.saga.apply_async((case.request,), task_id=case.id) for case in CASES.values()}


def test_no_step_and_no_undo_is_left_out() -> None:
    """Those of a sync and of a nightly look crash in test_long."""
    there_are = {name for name, step in step_registry.steps.items() if step.__module__ in STEPS_IN}
    assert there_are - {step.name for step in OF_A_SYNC + OF_A_NIGHT} == {case.dies_at for case in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_a_child_that_is_killed_changes_nothing(site: Site, runs: dict[str, Any], name: str) -> None:
    case, result = CASES[name], runs[name]
    result.get(timeout=200, propagate=False)
    assert not (site.folder / "orders" / f"{name} {case.dies_at}").exists(), "nobody died"
    assert result.status == case.state
    assert case.holds(site, name), (site.outside(name), site.moved(name))
    assert site.happened_twice() == []


def test_beat_has_every_night_reconciled_and_compliance_told(site: Site) -> None:
    command = [sys.executable, "-m", "celery", "-A", "tests.reference.app", "beat", "--pidfile", ""]
    with (site.folder / "beat.log").open("wb") as log:
        beat = subprocess.Popen([*command, "-l", "INFO"], stdout=log, stderr=log, cwd=ROOT)
    try:
        until(lambda: len(site.reported()) >= 2, "two nights are reported", 120)
    finally:
        beat.terminate()
        beat.wait(30)
    assert site.happened_twice() == []


def test_a_training_that_is_killed_in_the_middle_goes_on_at_its_checkpoint(site: Site) -> None:
    job = TrainingJob(id="killed", alias="killed", account="labelled-300", epochs=12, rest=timedelta(seconds=0.2))
    result = training.apply_async((job,), task_id="killed")
    log = site.folder / "models" / "killed" / "training.log"

    def epochs() -> list[dict[str, Any]]:
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    until(lambda: len(epochs()) >= 3, "some epochs are trained", 60)
    os.kill(epochs()[-1]["pid"], signal.SIGKILL)

    assert result.get(timeout=60).accuracy >= job.gate
    trained = epochs()
    assert [each["epoch"] for each in trained] == sorted({each["epoch"] for each in trained}), "none was trained twice"
    assert {each["attempt"] for each in trained} == {1, 2} and len({each["pid"] for each in trained}) == 2
