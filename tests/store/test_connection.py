"""Connections as they are opened: what the URL asks of a session holds beside what we ask of it."""

from __future__ import annotations

import pytest

from orchestrator import ConfigurationError
from orchestrator.store.connection import open_connection


def test_what_the_url_asks_of_the_session_is_not_forgotten(database_url: str) -> None:
    url = f"{database_url}?options=-c%20statement_timeout%3D12345%20-c%20search_path%3Dshop"
    with open_connection(url, name="test") as connection:
        shown = [
            connection.execute(f"SHOW {name}").fetchone()  # type: ignore[arg-type]
            for name in ("statement_timeout", "search_path", "enable_seqscan", "timezone")
        ]
    assert shown == [("12345ms",), ("shop",), ("off",), ("UTC",)]


def test_a_url_that_the_driver_cannot_read_is_wrong_configuration_and_not_shown() -> None:
    with pytest.raises(ConfigurationError, match="ORCHESTRATOR_DATABASE_URL") as refused:
        open_connection("postgresql://ann:secret@db/shop?no_such_parameter=1", name="test")
    assert "secret" not in str(refused.value) and refused.value.__cause__ is None
