"""Settings from the environment and by hand."""

from __future__ import annotations

import pickle
from datetime import timedelta

import psycopg
import pytest
from sqlalchemy import make_url
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg as psycopg_dialect

from orchestrator.errors import ConfigurationError
from orchestrator.settings import Settings

URL = "postgresql://ann:secret@db:5432/shop"


def test_defaults() -> None:
    settings = Settings.from_environment({}, database_url=URL)
    assert settings.lease == timedelta(seconds=2)
    assert settings.reservation == timedelta(milliseconds=100)
    assert settings.payload_limit == 262_144
    assert settings.accept_messages == "all"


def test_the_environment_is_read_and_arguments_win() -> None:
    environment = {
        "ORCHESTRATOR_DATABASE_URL": URL,
        "ORCHESTRATOR_LEASE": "5",
        "ORCHESTRATOR_PUMP_INTERVAL": "PT0.5S",
        "ORCHESTRATOR_SHOW_PAYLOADS": "true",
        "ORCHESTRATOR_DRAIN_STEPS": "7",
        "ORCHESTRATOR_CACHE_RUNS": "",
    }
    settings = Settings.from_environment(environment, drain_steps=9, show_payloads=None)
    assert settings.lease == timedelta(seconds=5)
    assert settings.pump_interval == timedelta(milliseconds=500)
    assert settings.show_payloads is True
    assert settings.drain_steps == 9
    assert settings.cache_runs == 1000


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_three_forms_of_the_url_are_taken(scheme: str) -> None:
    settings = Settings.from_environment({}, database_url=f"{scheme}://ann:secret@db/shop")
    assert settings.dsn == "postgresql://ann:secret@db/shop"
    assert settings.sqlalchemy_url == "postgresql+psycopg://ann:secret@db/shop"


def test_the_url_is_a_secret() -> None:
    settings = Settings.from_environment({}, database_url=URL)
    assert "secret" not in repr(settings) + str(settings) + settings.model_dump_json()
    assert pickle.loads(pickle.dumps(settings)).dsn == URL


def test_a_missing_url_says_what_to_set() -> None:
    with pytest.raises(ConfigurationError, match=r"set ORCHESTRATOR_DATABASE_URL .* or pass database_url="):
        Settings.from_environment({})


@pytest.mark.parametrize(
    "url", ["mysql://ann:secret@db/shop", "host=db password=secret", "postgresql+asyncpg://secret@db"]
)
def test_another_database_is_refused_without_showing_the_url(url: str) -> None:
    with pytest.raises(ConfigurationError, match="must begin with postgresql://") as caught:
        Settings.from_environment({}, database_url=url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("password", ["sec@ret", "sec/ret", "sec%ret", "sec%00ret"])
def test_a_password_that_is_not_quoted_is_refused_without_showing_it(password: str) -> None:
    """The driver takes a part of it for a host or a port, and says which."""
    with pytest.raises(ConfigurationError, match="write %40 for @") as caught:
        Settings.from_environment({}, database_url=f"postgresql://ann:{password}@db:5432/shop")
    assert "sec" not in str(caught.value) and "ret" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "", "/shop", "db", "ann@db/shop", "ann:s:e?c#ret@db/shop", "ann:secret@db:5432/a:b#c",
        "ann:s%40cret@db:5432/shop?sslmode=require&application_name=a@b",
        "[::1]:5432/shop", "ann:s,cret@%2Fvar%2Frun/shop", "/shop?host=/var/run", "ann:secret@/shop?host=/var/run",
    ],
)  # fmt: skip
def test_what_the_driver_takes_is_taken(address: str) -> None:
    settings = Settings.from_environment({}, database_url=f"postgresql://{address}")
    assert settings.dsn == f"postgresql://{address}"
    assert psycopg.conninfo.conninfo_to_dict(settings.dsn) is not None


def test_several_hosts_are_named_to_sqlalchemy_in_its_own_way() -> None:
    url = "postgresql://ann:s%40cret@one:5432,two:5433/shop?target_session_attrs=read-write"
    settings = Settings.from_environment({}, database_url=url)
    assert settings.dsn == url
    _, options = psycopg_dialect().create_connect_args(make_url(settings.sqlalchemy_url))
    assert options == {
        "host": "one,two", "port": "5432,5433", "dbname": "shop", "user": "ann", "password": "s@cret",
        "target_session_attrs": "read-write",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEASE", "-1"), ("LEASE", "soon"), ("ACCEPT_MESSAGES", "none"), ("DRAIN_STEPS", "x"), ("RETENTION", "90"),
        ("RETENTION", "999999999w"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"ORCHESTRATOR_{name}"):
        Settings.from_environment({"ORCHESTRATOR_DATABASE_URL": URL, f"ORCHESTRATOR_{name}": value})


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="leese"):
        Settings.from_environment({}, database_url=URL, leese=3)
