"""Settings from the environment and by hand."""

from __future__ import annotations

import pickle
from datetime import timedelta

import pytest

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


@pytest.mark.parametrize(
    ("name", "value"), [("LEASE", "-1"), ("LEASE", "soon"), ("ACCEPT_MESSAGES", "none"), ("DRAIN_STEPS", "x")]
)
def test_a_wrong_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"ORCHESTRATOR_{name}"):
        Settings.from_environment({"ORCHESTRATOR_DATABASE_URL": URL, f"ORCHESTRATOR_{name}": value})


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="leese"):
        Settings.from_environment({}, database_url=URL, leese=3)
