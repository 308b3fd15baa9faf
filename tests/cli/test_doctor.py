"""doctor: what it finds on real servers, what it repairs, and how it ends."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import redis
from kombu import Connection as BrokerConnection
from kombu import Queue

from orchestrator.celery.doctor import broker as ask_broker
from tests.cli.conftest import Terminal, eventually
from tests.faults.rabbitmq import RabbitMQ

ORDER = '[{"id": "1"}]'
_OLD = "UPDATE orchestrator.work SET due_at = due_at - interval '1 hour', reserved_at = NULL"
_WORKER = """
INSERT INTO orchestrator.incarnations (node, host, pid, queues, targets, slots)
VALUES ('w@here', 'here', 1, '{celery}', %s, 1)
"""


@pytest.fixture
def sql(terminal: Terminal) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(terminal.database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    broker = RabbitMQ(tmp_path_factory.mktemp("rabbitmq"))
    yield broker
    broker.stop()


def examine(terminal: Terminal, *options: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return exit code, what it told, and the levels by code."""
    result = terminal.run("doctor", "--json", *options)
    told = json.loads(result.stdout)
    return result.exit_code, told, {each["code"]: each["level"] for each in told["findings"]}


def test_a_healthy_stack_ends_with_0(terminal: Terminal, sql: psycopg.Connection[Any]) -> None:
    sql.execute(_WORKER, [["tests.cli.shop.checkout@1"]])
    code, told, _ = examine(terminal)
    assert (code, told["status"], told["rung"]) == (0, "healthy", [])
    assert {"celery", "postgres", "python"} <= told["versions"].keys()
    assert "Nothing is wrong." in terminal.ok("doctor")


def test_a_worker_that_runs_is_not_broken(worked: Terminal) -> None:
    assert eventually(lambda: "broken" not in examine(worked)[2].values())


def test_work_without_a_worker_is_broken(terminal: Terminal) -> None:
    terminal.ok("start", "checkout", ORDER)
    code, told, found = examine(terminal)
    assert (code, told["status"], told["rung"]) == (2, "broken", [])
    assert (found["no-worker"], found["unserved-queue"]) == ("broken", "warning")
    said = terminal.run("doctor", columns=200).stdout
    assert "no worker serves that queue" in said and "-> start a worker with -Q celery" in said


def test_a_task_that_no_worker_has_is_named(terminal: Terminal, sql: psycopg.Connection[Any]) -> None:
    terminal.ok("start", "checkout", ORDER)
    sql.execute(_WORKER, [["something.else"]])
    code, told, found = examine(terminal)
    assert code == 1 and found["unknown-target"] == "warning"
    assert any("tests.cli.shop.checkout@1" in each["what"] for each in told["findings"])


def test_after_the_broker_lost_its_messages_the_doctor_rings_for_what_is_due(
    terminal: Terminal, sql: psycopg.Connection[Any]
) -> None:
    terminal.ok("start", "checkout", ORDER)
    sql.execute(_WORKER, [["tests.cli.shop.checkout@1"]])
    sql.execute(_OLD)
    with redis.Redis.from_url(terminal.broker_url) as client:
        client.flushdb()
        code, told, found = examine(terminal, "--no-ring")
        assert (code, told["rung"], client.llen("celery")) == (1, [], 0)
        assert found["unclaimed"] == "warning"
        assert examine(terminal)[1]["rung"] == ["celery"]
        assert client.llen("celery") == 1
        assert any("holds 1 message for" in each["means"] for each in examine(terminal, "--no-ring")[1]["findings"])


def test_a_queue_that_the_routes_of_the_app_name_and_no_worker_serves_is_found(
    terminal: Terminal, sql: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those were looked at that a declaration names."""
    routes = importlib.import_module("orchestrator.step")._routes
    monkeypatch.setitem(routes, "tests.cli.shop.ship", "parcels")
    monkeypatch.setitem(routes, "tests.cli.shop.checkout", "orders")
    sql.execute(_WORKER, [["tests.cli.shop.checkout@1"]])
    told = [each["what"] for each in examine(terminal)[1]["findings"] if each["code"] == "idle-queue"]
    assert any("no worker serves queue parcels" in what for what in told)
    assert any("no worker serves queue orders" in what for what in told)


def test_schedules_without_a_beat_and_messages_that_wait_are_found(
    terminal: Terminal, sql: psycopg.Connection[Any]
) -> None:
    sql.execute(
        "INSERT INTO orchestrator.schedules (app, name, task, reads, problem, settled_until) "
        "VALUES ('shop', 'nightly', 't', 'every 1 s', 'there is no time zone', now())"
    )
    sql.execute(
        "INSERT INTO orchestrator.slots (app, schedule, slot, origin, state, run_id, at) "
        "VALUES ('shop', 'nightly', now(), 'schedule', 'sending', 'id', now() - interval '1 hour')"
    )
    assert {"no-beat", "schedule", "unsent"} <= examine(terminal)[2].keys()


def test_schedules_of_the_code_for_which_no_beat_was_ever_started_are_found(terminal: Terminal) -> None:
    terminal.shop.app.conf.beat_schedule = {"nightly": {"task": "tests.cli.shop.checkout", "schedule": 60}}
    try:
        _, told, found = examine(terminal)
    finally:
        terminal.shop.app.conf.beat_schedule = {}
    assert found["no-beat"] == "warning"
    assert any("there is 1 schedule and no beat" in each["what"] for each in told["findings"])


def test_unsafe_settings_are_found(terminal: Terminal, sql: psycopg.Connection[Any]) -> None:
    name = sql.info.dbname
    sql.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off')  # type: ignore[arg-type]
    code, _, found = examine(terminal)
    assert code == 2 and found["synchronous-commit"] == "broken"


@pytest.mark.parametrize("which", ["database", "schema", "broker"])
def test_what_is_not_there_is_said_and_the_exit_code_is_2(
    terminal: Terminal, on: Callable[[str, str], Terminal], empty_database_url: str, which: str
) -> None:
    database = {"database": "postgresql://me@127.0.0.1:1/nothing", "schema": empty_database_url}
    broker = "redis://127.0.0.1:1/0" if which == "broker" else terminal.broker_url
    code, told, found = examine(on(database.get(which, terminal.database_url), broker))
    assert (code, found.get("broker" if which == "broker" else "database")) == (2, "broken")
    assert any("saga migrate" in each["what"] for each in told["findings"]) == (which == "schema")


@pytest.mark.debian
def test_after_rabbitmq_lost_its_messages_the_doctor_rings_for_what_is_due(
    terminal: Terminal, on: Callable[[str, str], Terminal], sql: psycopg.Connection[Any], rabbitmq: RabbitMQ
) -> None:
    terminal = on(terminal.database_url, rabbitmq.new_url())
    with BrokerConnection(terminal.broker_url) as connection:
        queue = Queue("celery", routing_key="celery", channel=connection.default_channel)
        queue.declare()
        terminal.ok("start", "checkout", ORDER)
        sql.execute(_WORKER, [["tests.cli.shop.checkout@1"]])
        sql.execute(_OLD)
        queue.purge()
        code, told, found = examine(terminal, "--no-ring")
        assert (code, told["rung"], found["unclaimed"]) == (1, [], "warning")
        assert any("holds 0 messages" in each["means"] for each in told["findings"])
        assert examine(terminal)[1]["rung"] == ["celery"]
        assert eventually(lambda: queue.queue_declare(passive=True).message_count == 1)
        terminal.shop.orchestrator.bell.close()


@pytest.mark.debian
def test_rabbitmq_says_what_its_queues_hold(terminal: Terminal, rabbitmq: RabbitMQ) -> None:
    app = terminal.shop.app
    app.conf.broker_url = url = rabbitmq.new_url()
    with app.connection_for_write() as connection:
        queue = connection.SimpleQueue("held")
        queue.put({"a": "message"})
        found = eventually(lambda: (asked := ask_broker(app, ["held", "missing"])).queues["held"].messages and asked)
        queue.close()
    assert (found.error, found.visibility_timeout_s, found.evicts) == ("", None, "")
    assert (found.queues["held"].messages, found.queues["missing"].messages) == (1, 0)
    assert ":**@" in found.url and url.rpartition("@")[2] in found.url


# -- after a restore ---------------------------------------------------------------------------------------------------
_SET_BACK = "UPDATE orchestrator.lineage SET timeline = '00000000'"  # as the data remembers it, an earlier timeline


def test_a_restore_is_noticed_until_somebody_looks_after_it(terminal: Terminal, sql: psycopg.Connection[Any]) -> None:
    terminal.ok("start", "checkout", ORDER)
    assert "restored" not in examine(terminal)[2]
    sql.execute(_SET_BACK)
    code, told, found = examine(terminal)
    assert (code, found["restored"]) == (2, "broken")
    assert any("timeline 0 -> 1" in each["what"] for each in told["findings"])
    assert "1 run had not ended at that moment; each would be told" in terminal.ok(
        "doctor", "--after-restore", "--dry-run"
    )
    assert "restored" in examine(terminal)[2], "a dry run changes nothing"
    assert "saga list --state parked" in terminal.ok("doctor", "--after-restore", "--by", "ann")
    assert "restored" not in examine(terminal)[2]
    assert terminal.json("doctor", "--after-restore")["needed"] is False
    arrivals = sql.execute("SELECT arrival FROM orchestrator.arrivals").fetchall()
    assert arrivals == [({"e": "restore", "by": "ann"},)]


def test_a_restore_can_be_looked_after_over_one_connection(
    terminal: Terminal, sql: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(terminal.shop.orchestrator._overrides, "max_connections", 1)
    sql.execute(_SET_BACK)
    terminal.ok("doctor", "--after-restore", "--by", "ann")
    assert "restored" not in examine(terminal)[2]


_PUT_BACK = """
ALTER TABLE orchestrator.lineage RENAME TO dumped;
CREATE TABLE orchestrator.lineage (LIKE orchestrator.dumped INCLUDING ALL);
INSERT INTO orchestrator.lineage SELECT * FROM orchestrator.dumped;
DROP TABLE orchestrator.dumped;
"""  # as pg_restore does


def test_a_dump_that_is_put_back_on_the_same_server_is_noticed(
    terminal: Terminal, sql: psycopg.Connection[Any]
) -> None:
    terminal.ok("start", "checkout", ORDER)
    sql.execute(_PUT_BACK)
    code, told, found = examine(terminal)
    assert (code, found["restored"]) == (2, "broken")
    assert any("this database was put back from a dump, and nobody" in each["what"] for each in told["findings"])
    assert terminal.json("doctor", "--after-restore")["needed"] is True
    assert "restored" not in examine(terminal)[2]
    assert sql.execute("SELECT count(*) FROM orchestrator.arrivals").fetchone() == (1,)


def test_what_rewrites_tables_is_no_restore(terminal: Terminal, sql: psycopg.Connection[Any]) -> None:
    sql.execute("VACUUM FULL orchestrator.lineage")
    sql.execute("ALTER TABLE orchestrator.lineage ALTER COLUMN timeline TYPE varchar(8)")
    assert "restored" not in examine(terminal)[2]


def test_a_failover_that_lost_nothing_is_noted(terminal: Terminal, sql: psycopg.Connection[Any]) -> None:
    terminal.ok("start", "checkout", ORDER)
    sql.execute(_SET_BACK)
    terminal.ok("doctor", "--nothing-lost")
    assert "restored" not in examine(terminal)[2]
    assert sql.execute("SELECT count(*) FROM orchestrator.arrivals").fetchone() == (0,)


def test_one_that_was_cut_short_is_noticed(terminal: Terminal, sql: psycopg.Connection[Any]) -> None:
    sql.execute("INSERT INTO orchestrator.restores (by, began_at) VALUES ('ann', now())")
    assert examine(terminal)[2]["restore-unfinished"] == "broken"
    terminal.ok("doctor", "--after-restore")
    assert "restore-unfinished" not in examine(terminal)[2]


def test_who_put_back_a_copy_on_the_same_server_hears_what_to_say(
    terminal: Terminal, sql: psycopg.Connection[Any]
) -> None:
    terminal.ok("start", "checkout", ORDER)
    said = " ".join(terminal.ok("doctor", "--after-restore").split())
    assert "or it was made anew from an older copy on the same server (a template), say --snapshot too." in said
    assert "1 run had not ended at that moment;" in terminal.ok("doctor", "--after-restore", "--snapshot")
    assert sql.execute("SELECT count(*) FROM orchestrator.arrivals").fetchone() == (1,)


@pytest.mark.parametrize(
    "options", [["--dry-run"], ["--snapshot"], ["--after-restore", "--nothing-lost"], ["--nothing-lost", "--dry-run"]]
)
def test_options_that_say_nothing_together_are_refused(terminal: Terminal, options: list[str]) -> None:
    result = terminal.run("doctor", *options)
    assert (result.exit_code, "say --after-restore" in result.output) == (2, True)
