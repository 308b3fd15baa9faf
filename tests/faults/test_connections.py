"""Few connections, borrowed connections, and connections that were made for another process."""

from __future__ import annotations

import os
import signal
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.client import Client
from orchestrator.settings import Settings
from tests.faults import sagas
from tests.faults.load import QUEUE
from tests.faults.pgbouncer import PgBouncer
from tests.faults.scene import LOADED, Scene
from tests.faults.steps import Stop


@pytest.mark.debian
def test_a_pooler_that_lends_connections_by_transaction_is_no_matter(scene: Scene, tmp_path: Path) -> None:
    """PgBouncer in transaction mode with three connections for two workers, their companions, and a client."""
    pooler = PgBouncer(scene.database_url, tmp_path / "pgbouncer", size=3)
    try:
        off = {"ORCHESTRATOR_DATABASE_URL": pooler.url, "ORCHESTRATOR_PREPARED_STATEMENTS": "false"}
        first, _ = scene.start_workers(2, **off)
        settings = Settings.from_environment({}, database_url=pooler.url, prepared_statements=False)
        scene.office.client = Client(settings, lambda queue, times: None, lambda: QUEUE)
        load = scene.load(runs=44)
        load.until_ended(11)
        first.kill()
        scene.fault("SIGKILL")
        first.start()
        scene.judge(LOADED, load)
        scene.office.client.pool.close()
        assert "prepared statement" not in "".join(scene.logs())
    finally:
        pooler.stop()


def _client(scene: Scene, most: int) -> Client:
    settings = Settings.from_environment({}, database_url=scene.database_url, max_connections=most)
    return Client(settings, lambda queue, times: None, lambda: QUEUE)


def test_two_connections_serve_twenty_threads(scene: Scene) -> None:
    client = _client(scene, 2)
    stops = [Stop(name="a", kind="look")]

    def start(number: int) -> str:
        return client.start(sagas.trip, (stops,), {}, {"task_id": f"thread-{number}", "queue": QUEUE}).status

    with ThreadPoolExecutor(20) as threads:
        states = list(threads.map(start, range(200)))
    assert states == ["pending"] * 200
    used = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'orchestrator client'"
    assert int(scene.sql(f"{used} AND datname = current_database()")[0][0]) <= 2
    client.pool.close()


def test_a_connection_of_a_parent_is_not_used_by_its_child(scene: Scene, tmp_path: Path) -> None:
    """A client that was used before a fork opens a connection of its own; the parent's goes on working."""
    client = _client(scene, 1)
    start = lambda name: client.start(sagas.trip, ([],), {}, {"task_id": name, "queue": QUEUE}).status  # noqa: E731
    assert start("before") == "pending"
    with client._poller._book.lock:  # as if another thread of the parent were just using it
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # hanging for ever would be one way to fail
            said = "pending"
            try:
                said = start("within")
            except BaseException:
                said = traceback.format_exc()
            finally:
                (tmp_path / "said").write_text(said)
                os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "said").read_text() == "pending"
    assert start("after") == "pending"
    backends = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'orchestrator client'"
    assert int(scene.sql(f"{backends} AND datname = current_database()")[0][0]) == 1
    client.pool.close()
