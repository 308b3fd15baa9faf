"""Connections as they are opened: what the URL asks of a session holds beside what we ask of it."""

from __future__ import annotations

import contextlib
import select

import pytest

from orchestrator import ConfigurationError
from orchestrator.store.connection import Connection, open_connection
from orchestrator.store.pool import ClientPool
from tests.acceptance.running import until


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


@pytest.mark.parametrize("size", [1, 2])
def test_a_pool_lends_no_connection_that_the_server_has_ended(
    database_url: str, connection: Connection, size: int
) -> None:
    """It may have lain there since the night before, and the server have been started again meanwhile."""
    pool = ClientPool(database_url, size)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(pool.connection()) for _ in range(size)]
        pids = [each.info.backend_pid for each in idle]
    for each in idle:
        connection.execute("SELECT pg_terminate_backend(%s)", [each.info.backend_pid])
        until(lambda each=each: select.select([each.fileno()], [], [], 0)[0], "the end of a connection")
    with pool.connection() as lent:
        assert lent.info.backend_pid not in pids
        assert lent.execute("SELECT 1").fetchone() == (1,)
    pool.close()
