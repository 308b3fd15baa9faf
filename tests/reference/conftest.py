"""A ledger with a few accounts in a database of the test's own, and an outside world of its own on a real port."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Connection, Engine, create_engine, make_url, text

from orchestrator.store import testbed
from tasks import banking, customers, inventory, ledger, models, notifications, payments, transfers
from tasks.database import create_tables, ledger_engine, metadata
from tasks.ledger import House
from tasks.money import eur
from tasks.outside import client
from tasks.outside.server import Server

__all__ = [
    "banking",
    "customers",
    "inventory",
    "models",
    "notifications",
    "payments",
    "transfers",
]  # they declare tables


@dataclass(frozen=True)
class Outside:
    """What a test does to the outside world, and sees of it, over HTTP."""

    url: str

    def fault(self, what: str, kind: str = "", **more: Any) -> None:
        """Switch a fault on."""
        put = client.http().put(f"/faults/{what} {kind} {more}", json={"what": what, "kind": kind, **more})
        put.raise_for_status()

    def recover(self) -> None:
        """Switch all faults off."""
        client.http().delete("/faults").raise_for_status()

    def records(self, kind: str) -> dict[str, str]:
        """Return what became of every key of a kind."""
        return {each["key"]: each["state"] for each in self.back_office(kind)}

    def back_office(self, kind: str) -> list[dict[str, Any]]:
        """Return everything that happened of a kind."""
        return list(client.http().get(f"/{kind}").raise_for_status().json()["records"])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The outside world, in threads of this process."""
    with Server(tmp_path / "outside.jsonl") as running:
        monkeypatch.setenv("OUTSIDE_URL", running.url)
        yield running
        client.close()


@pytest.fixture
def outside(server: Server) -> Outside:
    return Outside(server.url)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps wait a third of a second for an answer, and no longer."""
    monkeypatch.setenv("OUTSIDE_TIMEOUT_SECONDS", "0.3")


@pytest.fixture(scope="session")
def saga_database(_postgres_url: str) -> Iterator[str]:
    """A database next to those of the other tests, in the place of the plugin's."""
    url = testbed.create(_postgres_url)
    yield url
    testbed.drop(url, _postgres_url)


@pytest.fixture(scope="session")
def _ledger(_postgres_url: str) -> Iterator[str]:
    """URL of a database with the application's tables, which each test empties."""
    name = f"reference_{uuid.uuid4().hex}"
    with psycopg.connect(_postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    url = urlsplit(_postgres_url)._replace(path=f"/{name}").geturl()
    made = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    create_tables(made)
    made.dispose()
    yield url
    with psycopg.connect(_postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def engine(_ledger: str, outside: Outside, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Engine]:
    """Database in which ann has 100 EUR, bob and the bakery nothing."""
    monkeypatch.setenv("LEDGER_DATABASE_URL", _ledger)
    monkeypatch.setenv("MODELS_DIR", str(tmp_path / "models"))
    monkeypatch.setenv("REPORTS_DIR", str(tmp_path / "reports"))
    engine = ledger_engine()
    with engine.begin() as conn:
        conn.execute(text(f"TRUNCATE {', '.join(table.fullname for table in metadata.sorted_tables)}"))
        for house in House:
            ledger.open_account(conn, house.account("EUR"), "house", "EUR")
        for customer in ("ann", "bob"):
            ledger.open_account(conn, customer, "customer", "EUR")
        ledger.open_account(conn, "bakery", "merchant", "EUR")
        ledger.post(conn, "opening", "ann", House.EQUITY.account("EUR"), "ann", eur(100))
    yield engine
    engine.dispose()


@pytest.fixture
def conn(engine: Engine) -> Iterator[Connection]:
    """Connection as a transactional step gets it: in a transaction that is not the step's to end."""
    with engine.begin() as connection:
        yield connection
