"""Few connections, borrowed connections, those that were made for another process, and those that lead nowhere."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, text

from orchestrator.client import Client
from orchestrator.settings import Settings
from orchestrator.store.connection import UNAVAILABLE, CommitUnknown, Connection, open_connection
from orchestrator.store.transaction import Transactions
from tests.acceptance.running import until
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


@pytest.mark.debian
def test_a_commit_that_is_lost_behind_a_pooler_is_a_lost_connection(database_url: str, tmp_path: Path) -> None:
    """Two say so, the server and PgBouncer, which is an internal error to the driver."""
    pooler = PgBouncer(database_url, tmp_path / "pgbouncer", size=3)
    transactions = Transactions(pooler.url.replace("postgresql:", "postgresql+psycopg:"), prepare=False)
    itself = "SELECT pg_backend_pid()"

    def end(connection: Connection, backend: Any) -> bool:
        with open_connection(database_url, name="test") as other:
            other.execute("SELECT pg_terminate_backend(%s, 5000)", backend)
        return True

    try:
        connection = open_connection(pooler.url, name="test", prepare=False)
        with contextlib.closing(connection), pytest.raises(UNAVAILABLE), connection.transaction():
            end(connection, connection.execute(itself).fetchone())
        with pytest.raises(CommitUnknown):
            transactions.run(False, timedelta(minutes=1), lambda step: [*step.execute(text(itself)).one()], end)
    finally:
        transactions.dispose()
        pooler.stop()


def _client(scene: Scene, most: int) -> Client:
    settings = Settings.from_environment({}, database_url=scene.database_url, max_connections=most)
    return Client(settings, lambda queue, times: None, lambda: QUEUE)


def test_two_connections_serve_twenty_threads(scene: Scene) -> None:
    client = _client(scene, 2)
    stops = [Stop(name="a", kind="look")]
    over, open_at_once = threading.Event(), set[int]()

    def start(number: int) -> str:
        return client.start(sagas.trip, (stops,), {}, {"task_id": f"thread-{number}", "queue": QUEUE}).status

    def count() -> None:
        used = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'orchestrator client' "
        with psycopg.connect(scene.database_url, autocommit=True) as connection:
            while not over.is_set():
                row = connection.execute(used + "AND datname = current_database()").fetchone()
                open_at_once.add(row[0] if row else 0)

    with ThreadPoolExecutor(21) as threads:
        counted = threads.submit(count)
        states = [each.result() for each in [threads.submit(start, number) for number in range(200)]]
        over.set()
        counted.result()
    assert states == ["pending"] * 200
    assert max(open_at_once) == 2
    client.pool.close()


def test_a_worker_with_two_connections_for_twenty_threads_does_all_its_work(scene: Scene) -> None:
    """Its threads take turns, while they run steps that hold none, and transactional ones that do."""
    (worker,) = scene.start_workers(1, "-P", "threads", "--concurrency", "20", ORCHESTRATOR_MAX_CONNECTIONS="2")
    load = scene.load(runs=33)
    load.until_ended(8)
    scene.signal(worker, signal.SIGKILL)
    worker.launch()
    scene.judge(LOADED, load)
    assert worker.is_alive


def _in_a_child(said: Path, ask: Callable[[], object]) -> str:
    """Return what a forked process has to say."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # hanging for ever would be one way to fail
        try:
            said.write_text(str(ask()))
        except BaseException as error:
            said.write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    return said.read_text()


def test_a_connection_of_a_parent_is_not_used_by_its_child(scene: Scene, tmp_path: Path) -> None:
    """A client that was used before a fork opens a connection of its own; the parent's goes on as if nothing were."""
    client = _client(scene, 1)
    start = lambda name: client.start(sagas.trip, ([],), {}, {"task_id": name, "queue": QUEUE}).status  # noqa: E731
    assert [start(f"before-{number}") for number in range(3)] == ["pending"] * 3  # its statements are prepared
    mine = "SELECT pid, backend_start FROM pg_stat_activity WHERE application_name = 'orchestrator client' "
    mine += "AND datname = current_database()"
    (before,) = scene.sql(mine)
    with client._poller._book.lock:  # as if another thread of the parent were just using it
        assert _in_a_child(tmp_path / "said", lambda: start("within")) == "pending"
    assert start("after") == "pending"
    assert until(lambda: len(found := scene.sql(mine)) == 1 and found, "the child's is gone") == [before]
    client.pool.close()


def test_a_callers_connection_from_before_a_fork_is_refused(scene: Scene, tmp_path: Path) -> None:
    """In the child, with a message; the parent's transaction goes on, and what was started in it is started."""
    client = _client(scene, 1)
    engine = create_engine(scene.database_url.replace("postgresql:", "postgresql+psycopg:"))

    def start(name: str, transaction: object) -> str:
        options = {"task_id": name, "queue": QUEUE, "transaction": transaction}
        return client.start(sagas.trip, ([],), {}, options).id

    with psycopg.connect(scene.database_url) as plain, engine.connect() as pooled:
        for number, transaction in enumerate((plain, pooled)):
            start(f"before-{number}", transaction)
            said = _in_a_child(tmp_path / "said", lambda transaction=transaction: start("within", transaction))  # type: ignore[misc]
            assert said.startswith("UsageError: transaction= got a connection that was opened before"), said
            start(f"after-{number}", transaction)
            transaction.commit()

    def with_a_new_one() -> str:
        engine.dispose(close=False)
        with engine.begin() as transaction:
            return start("within", transaction)

    assert _in_a_child(tmp_path / "said", with_a_new_one) == "within"
    found = [row[0] for row in scene.sql("SELECT id FROM orchestrator.runs ORDER BY id")]
    assert found == ["after-0", "after-1", "before-0", "before-1", "within"]
    engine.dispose()
    client.pool.close()


# -- a way that is dark: no packet arrives, and nobody says so ---------------------------------------------------------
BOUND_S = 25.0


def _asks(connection: Connection, query: str) -> float:
    """Ask something that will have no answer; returns after how many seconds the connection ended."""
    began = time.monotonic()
    with pytest.raises(psycopg.OperationalError):
        connection.execute(query)
    return time.monotonic() - began


def test_a_connection_has_a_bound_for_what_nobody_takes(scene: Scene) -> None:
    with open_connection(scene.database_url, name="test") as connection:
        end = socket.socket(fileno=os.dup(connection.fileno()))
        with end:
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == BOUND_S * 1000
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


@pytest.mark.long
def test_a_connection_into_the_dark_ends_within_its_bound(scene: Scene) -> None:
    """Whether it waits for an answer that is long in coming, or has just asked."""
    waiting, asking = (open_connection(scene.database.url, name="test") for _ in range(2))
    with ThreadPoolExecutor(2) as threads:
        waits = threads.submit(_asks, waiting, "SELECT pg_sleep(300)")
        asleep = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%%' AND state = 'active'"
        until(lambda: scene.sql(asleep)[0][0], "the question has arrived")
        scene.database.lose(1.0)
        asks = threads.submit(_asks, asking, "SELECT 1")
        took = [waits.result(120.0), asks.result(120.0)]
    assert all(seconds < BOUND_S + 20.0 for seconds in took), took
    scene.database.restore()


def test_an_answer_that_never_comes_is_not_waited_for_for_ever(scene: Scene) -> None:
    """The peer acknowledges all that it is sent, so that TCP is content, and says nothing."""
    with open_connection(scene.database.url, name="test", patience_s=1.0) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
        scene.database.mute()
        assert _asks(connection, "SELECT 2") < 30.0
        assert connection.closed


@pytest.mark.long
def test_a_worker_whose_connections_are_never_answered_again_opens_others(scene: Scene) -> None:
    """Its companion's and its children's: nobody else is there to do the work."""
    (lonely,) = scene.start_workers(1, proxied=True)
    load = scene.load(runs=44, ms=30)
    load.until_ended(10)
    assert scene.database.mute() > 1
    scene.fault("connections mute")
    scene.judge(LOADED, load, within_s=180.0)
    assert lonely.is_alive and "no answer within" in lonely.said


@pytest.mark.long
def test_a_worker_in_the_dark_is_replaced_and_comes_back(scene: Scene) -> None:
    """Its way to Postgres is dark for longer than it takes a connection to end; another one does the work meanwhile."""
    (lonely,) = scene.start_workers(1, proxied=True)
    scene.start_workers(1)
    load = scene.load(runs=66, ms=30)
    load.until_ended(15)
    scene.database.lose(1.0)
    scene.fault("way to Postgres dark")
    dark_until = time.monotonic() + BOUND_S + 10.0
    load.until_ended(60, within_s=120.0)
    until(lambda: time.monotonic() > dark_until, "it was dark for long enough", 60.0)
    scene.database.restore()
    scene.signal(scene.workers[1], signal.SIGKILL, whole=True)
    again = scene.load(runs=22, seed=2)
    scene.judge(LOADED, load, again, within_s=120.0)
    assert lonely.is_alive


@pytest.mark.long
def test_packets_that_are_lost_cost_time(scene: Scene) -> None:
    """One in ten, on the way to Postgres and to the broker."""
    scene.start_workers(2, proxied=True)
    for way in (scene.database, scene.broker):
        way.lose(0.1)
    scene.fault("one packet in ten is lost")
    load = scene.load(runs=44, office=scene.proxied_office())
    load.until_ended(40, within_s=300.0)
    for way in (scene.database, scene.broker):
        way.restore()
    scene.judge(LOADED, load)
