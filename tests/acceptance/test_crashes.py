"""Whatever is killed or taken away: every run ends right, and nothing is done twice that was done."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any

import psutil
import psycopg
import pytest
import redis
from celery.exceptions import SoftTimeLimitExceeded

from orchestrator import PayloadError, SagaFailed, StoreUnavailableError
from tests.acceptance import sagas, steps
from tests.acceptance.app import app
from tests.acceptance.conftest import Site
from tests.acceptance.running import Worker, World, until
from tests.acceptance.sagas import Plan, Transfer

A, C = Plan(name="a"), Plan(name="c")
GATE = Plan(name="b", do=["gate"])


def account(sql_of: psycopg.Connection[Any], name: str, balance: int) -> str:
    sql_of.execute("INSERT INTO accounts VALUES (%s, %s)", [name, balance])
    return name


def balances(sql_of: psycopg.Connection[Any], *names: str) -> list[Decimal]:
    rows = dict(sql_of.execute("SELECT id, balance FROM accounts WHERE id = ANY(%s)", [list(names)]).fetchall())
    return [rows[name] for name in names]


# -- processes that die ------------------------------------------------------------------------------------------------
def test_a_killed_worker_goes_on_at_once_where_it_was(new_worker: Callable[..., Worker], world: World) -> None:
    """The new one knows that the old one is gone; it does not wait for the end of its lease."""
    killed = new_worker(ORCHESTRATOR_LEASE="3600").start()
    result = sagas.sequence.apply_async(([A, GATE, C],), queue=killed.queue)
    first = world.until_at(result, "at b")
    killed.kill()
    killed.start()
    second = world.until_at(result, "at b", attempt=2)
    world.open(f"{result} b")
    assert result.get(timeout=60) == ["a done", "b done", "c done"]
    assert world.told(result) == ["do a", "at b", "at b", "do b", "do c"]
    assert first.key == second.key and first.pid != second.pid


def test_another_worker_takes_over_from_one_that_was_killed(new_worker: Callable[..., Worker], world: World) -> None:
    doomed = new_worker().start()
    heir = new_worker(queue=doomed.queue)
    result = sagas.sequence.apply_async(([A, GATE],), queue=doomed.queue)
    world.until_at(result, "at b")
    heir.start()
    doomed.kill()
    world.until_at(result, "at b", attempt=2)
    world.open(f"{result} b")
    assert result.get(timeout=60) == ["a done", "b done"]


@pytest.mark.own_process
def test_a_pool_child_that_is_told_to_end_in_saga_code_does_not_end_the_run(own_worker: Worker, world: World) -> None:
    """Celery raises SystemExit wherever a child is; the saga has not raised it, and is not undone for it."""
    result = sagas.ends_its_process.apply_async(("told",), queue=own_worker.queue)
    assert result.get(timeout=60) == "done"
    told = int((world.folder / "told told").read_text())
    until(lambda: not psutil.pid_exists(told), "the child has ended")
    assert world.told(result) == ["do told"]
    again = sagas.sequence.apply_async(([A],), queue=own_worker.queue)
    assert again.get(timeout=60) == ["a done"] and own_worker.is_alive


@pytest.mark.own_process
def test_time_limits_of_celery_hold_for_its_messages_and_for_no_saga(
    new_worker: Callable[..., Worker], world: World
) -> None:
    """They would strike anywhere in a drain, in saga code too; steps have timeouts of their own."""
    limited = new_worker("--soft-time-limit", "1", "--time-limit", "2").start()
    result = sagas.sequence.apply_async(([A, GATE],), queue=limited.queue)
    at = world.until_at(result, "at b")
    time.sleep(3.0)  # longer than either
    world.open(f"{result} b")
    assert result.get(timeout=60) == ["a done", "b done"]
    assert world.told(result) == ["do a", "at b", "do b"] and psutil.pid_exists(at.pid)
    message = steps.pause.apply_async((60.0,), queue=limited.queue)
    with pytest.raises(SoftTimeLimitExceeded):
        message.get(timeout=30)


@pytest.mark.own_process
def test_a_killed_pool_child_burns_one_attempt_of_one_step(own_worker: Worker, world: World) -> None:
    result = sagas.sequence.apply_async(([A, GATE, C],), queue=own_worker.queue)
    first = world.until_at(result, "at b")
    os.kill(first.pid, signal.SIGKILL)
    second = world.until_at(result, "at b", attempt=2)
    world.open(f"{result} b")
    assert result.get(timeout=60) == ["a done", "b done", "c done"]
    assert world.told(result) == ["do a", "at b", "at b", "do b", "do c"]
    assert first.key == second.key and own_worker.is_alive


@pytest.mark.own_process
def test_a_step_that_always_kills_its_child_ends_and_is_undone(own_worker: Worker, world: World) -> None:
    result = sagas.sequence.apply_async(([A, Plan(name="x", do=["die"])],), queue=own_worker.queue)
    with pytest.raises(SagaFailed) as caught:
        result.get(timeout=30)
    assert caught.value.state == "compensated"
    assert [w for w in world.told(result) if w[:4] != "told"] == ["do a", "do x", "do x", "do x", "undo x", "undo a"]
    assert own_worker.is_alive


@pytest.mark.own_process
def test_a_child_that_dies_in_an_undo_undoes_again_with_the_same_key(own_worker: Worker, world: World) -> None:
    plans = [Plan(name="a", undo=["die", "ok"]), Plan(name="x", do=["reject"])]
    result = sagas.sequence.apply_async((plans,), queue=own_worker.queue)
    with pytest.raises(SagaFailed):
        result.get(timeout=30)
    undone = [e for e in world.effects(result) if e.what == "undo"]
    assert [e.attempt for e in undone] == [1, 2] and len({e.key for e in undone}) == 1
    assert result.status == "compensated"


def test_the_companion_is_started_again(own_worker: Worker, world: World) -> None:
    result = sagas.sequence.apply_async(([A, GATE, C],), queue=own_worker.queue)
    world.until_at(result, "at b")
    companion = _children(own_worker, "orchestrator.celery.companion")
    os.kill(companion[0], signal.SIGKILL)
    until(lambda: _children(own_worker, "orchestrator.celery.companion") not in ([], companion), "a new companion")
    world.open(f"{result} b")
    assert result.get(timeout=60) == ["a done", "b done", "c done"]
    assert world.told(result) == ["do a", "at b", "do b", "do c"]


def _children(worker: Worker, module: str) -> list[int]:
    import psutil

    assert worker.process is not None
    found = []
    for child in psutil.Process(worker.process.pid).children():
        try:
            if module in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_warm_shutdown_finishes_what_is_begun_and_burns_no_attempt(own_worker: Worker, world: World) -> None:
    result = sagas.sequence.apply_async(([A, GATE, C],), queue=own_worker.queue)
    world.until_at(result, "at b")
    assert own_worker.process is not None
    own_worker.process.send_signal(signal.SIGTERM)
    until(lambda: "Warm shutdown" in own_worker.said, "the shutdown begins")
    world.open(f"{result} b")
    assert own_worker.process.wait(20) == 0
    assert world.told(result) == ["do a", "at b", "do b"]
    own_worker.start()
    assert result.get(timeout=60) == ["a done", "b done", "c done"]
    assert world.told(result) == ["do a", "at b", "do b", "do c"]


def test_transfers_conserve_money_through_a_killed_worker(
    own_worker: Worker, sql_of: psycopg.Connection[Any], world: World
) -> None:
    rich, poor = account(sql_of, "rich", 25), account(sql_of, "poor", 0)
    orders = [Transfer(source=rich, target=poor, amount=Decimal(1)) for _ in range(40)]
    orders += [Transfer(source=rich, target="nowhere", amount=Decimal(1)) for _ in range(10)]
    runs = [sagas.transfer.apply_async((order,), queue=own_worker.queue) for order in orders]
    until(lambda: balances(sql_of, poor)[0] > 3, "some are done")
    own_worker.kill()
    own_worker.start()
    states = [run.get(timeout=60, propagate=False) and run.status for run in runs]
    assert sum(balances(sql_of, rich, poor)) == 25
    assert states.count("completed") == balances(sql_of, poor)[0] <= 25
    assert set(states) <= {"completed", "compensated", "failed"}
    net = sql_of.execute(
        "SELECT m.run FROM movements m JOIN orchestrator.runs r ON r.id = m.run WHERE r.state <> 'completed' "
        "GROUP BY m.run HAVING sum(amount) <> 0"
    ).fetchall()
    assert net == []


# -- transactional steps -----------------------------------------------------------------------------------------------
@pytest.mark.own_process
@pytest.mark.parametrize("where", ["debit", "credit"])
def test_a_transactional_step_killed_before_its_commit_takes_effect_once(
    own_worker: Worker, world: World, sql_of: psycopg.Connection[Any], where: str
) -> None:
    source, target = account(sql_of, f"s {where}", 10), account(sql_of, f"t {where}", 0)
    order = Transfer(source=source, target=target, amount=Decimal(4), pause=where)
    result = sagas.transfer.apply_async((order,), queue=own_worker.queue)
    os.kill(world.until_at(result, f"at {where}").pid, signal.SIGKILL)
    assert len(result.get(timeout=60)) == 2
    assert balances(sql_of, source, target) == [6, 4]
    assert sql_of.execute("SELECT count(*) FROM movements WHERE run = %s", [result.id]).fetchone() == (2,)


def test_a_transfer_whose_credit_is_impossible_is_reversed(worker: Worker, sql_of: psycopg.Connection[Any]) -> None:
    source = account(sql_of, "source", 10)
    result = sagas.transfer.delay(Transfer(source=source, target="nobody", amount=Decimal(4)))
    with pytest.raises(SagaFailed):
        result.get(timeout=60)
    assert (result.status, result.left, balances(sql_of, source)) == ("compensated", [], [10])
    too_much = sagas.transfer.delay(Transfer(source=source, target="nobody", amount=Decimal(11)))
    with pytest.raises(SagaFailed):
        too_much.get(timeout=60)
    assert (too_much.status, balances(sql_of, source)) == ("failed", [10])


@pytest.mark.parametrize(
    ("how", "ends"),
    [
        ("fine", "done"),
        ("commit", "rejected UsageError"),
        ("rollback", "rejected UsageError"),
        ("close", "rejected UsageError"),
        ("error", "rejected RuntimeError"),
        ("duplicate", "rejected IntegrityError"),
        ("duplicate, rejected", "rejected Rejected"),
    ],
)
def test_a_transactional_step_leaves_a_row_only_if_it_succeeds(
    worker: Worker, sql_of: psycopg.Connection[Any], how: str, ends: str
) -> None:
    result = sagas.misbehaving.delay(how)
    assert result.get(timeout=60) == ends
    rows = sql_of.execute("SELECT count(*) FROM notes WHERE run = %s", [result.id]).fetchone()
    assert rows == (1 if ends == "done" else 0,)


# -- heartbeats and timeouts -------------------------------------------------------------------------------------------
@pytest.mark.own_process
def test_heartbeat_details_reach_the_attempt_after_a_killed_one(own_worker: Worker, world: World) -> None:
    plans = [Plan(name="t", kind="train", do=["gate", "ok"])]
    result = sagas.sequence.apply_async((plans,), queue=own_worker.queue)
    os.kill(world.until_at(result, "at t").pid, signal.SIGKILL)
    assert result.get(timeout=60) == ["t done"]
    assert [e.told for e in world.effects(result) if e.what == "from"] == [None, {"epoch": 1}]


@pytest.mark.own_process
def test_a_missed_heartbeat_gives_the_attempt_back_and_replaces_the_child_that_hangs(
    own_worker: Worker, world: World, sql_of: psycopg.Connection[Any]
) -> None:
    plans = [Plan(name="t", kind="train", do=["hang", "ok"])]
    result = sagas.sequence.apply_async((plans,), queue=own_worker.queue)
    hangs = world.until_at(result, "at t").pid
    assert result.get(timeout=60) == ["t done"]
    assert [(e.attempt, e.told) for e in world.effects(result) if e.what == "from"] == [(1, None), (2, {"epoch": 1})]
    until(lambda: f"pool child {hangs}" in own_worker.said, "the child is replaced")
    query = "SELECT entry -> 'error' ->> 'message' FROM orchestrator.history WHERE run_id = %s AND kind = 'attempted'"
    [(told,)] = sql_of.execute(query, [result.id]).fetchall()
    assert told.startswith("the attempt missed its heartbeat")


# -- broker and database that go away ----------------------------------------------------------------------------------
def test_losing_every_broker_message_costs_seconds(site: Site, own_worker: Worker, world: World) -> None:
    asleep = sagas.sleeper.apply_async((0.7,), queue=own_worker.queue)
    runs = [sagas.sequence.apply_async(([A, C],), queue=own_worker.queue) for _ in range(20)]
    retried = sagas.sequence.apply_async(([Plan(name="r", do=["error", "ok"])],), queue=own_worker.queue)
    with redis.Redis.from_url(site.broker_url) as broker:
        broker.flushall()
    emptied = time.monotonic()
    assert [run.get(timeout=60) for run in runs] == [["a done", "c done"]] * 20
    assert retried.get(timeout=60) == ["r done"] and asleep.get(timeout=60) > 0.7
    assert time.monotonic() - emptied < 15


def test_a_start_succeeds_without_a_broker_and_runs_when_it_is_back(
    site: Site, new_worker: Callable[..., Worker], world: World
) -> None:
    running = new_worker(proxied=True).start()
    site.broker.cut()
    before = time.monotonic()
    results = [sagas.sequence.apply_async(([A],), queue=running.queue) for _ in range(3)]
    assert time.monotonic() - before < 12
    assert results[0].status == "pending"
    site.broker.restore()
    assert [result.get(timeout=40) for result in results] == [["a done"]] * 3
    assert running.is_alive


def test_without_a_database_a_start_fails_quickly_and_says_what_to_do(site: Site) -> None:
    site.database.cut()
    before = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="ORCHESTRATOR_DATABASE_URL"):
        sagas.sequence.delay([A])
    with pytest.raises(StoreUnavailableError):
        sagas.sequence.AsyncResult("x").status  # noqa: B018
    assert time.monotonic() - before < 6
    site.database.restore()
    with pytest.raises(PayloadError):
        sagas.sequence.delay([Plan(name="\0")])
    assert sagas.sequence.delay([A]).status in ("pending", "running", "completed")


def test_a_worker_outlives_its_database(site: Site, new_worker: Callable[..., Worker], world: World) -> None:
    running = new_worker(proxied=True).start()
    result = sagas.sequence.apply_async(([A, GATE, C],), queue=running.queue)
    world.until_at(result, "at b")
    site.database.cut()
    world.open(f"{result} b")
    until(lambda: "do b" in world.told(result), "the step ends while the database is away")
    site.database.restore()
    assert result.get(timeout=30) == ["a done", "b done", "c done"]
    assert world.told(result) == ["do a", "at b", "do b", "do c"]


def test_a_worker_that_answers_no_doorbell_any_more_ends_for_its_supervisor(
    new_worker: Callable[..., Worker], world: World
) -> None:
    healthy, deaf = (new_worker().start(ORCHESTRATOR_WATCHDOG="1") for _ in range(2))
    cancel = partial(app.control.cancel_consumer, deaf.queue, reply=True)
    until(lambda: any("no longer consuming" in str(answer) for answer in cancel()), "it listens no more")
    results: list[Any] = []

    def ends() -> bool:
        if not results or results[-1].ready():  # the first doorbell may still be taken: Redis was asked for it before
            results.append(sagas.sequence.apply_async(([A, C],), queue=deaf.queue))
        return not deaf.is_alive

    until(ends, "the worker that lets work lie ends", 60.0)
    assert deaf.process is not None and deaf.process.returncode == 75
    assert "let work lie" in deaf.said
    assert healthy.is_alive, "a worker without work is not stuck"
    deaf.start()
    assert results[-1].get(timeout=60) is not None


def test_a_caller_that_waits_outlives_the_database(site: Site, worker: Worker, world: World) -> None:
    result = sagas.sequence.delay([GATE])
    world.until_at(result, "at b")
    site.database.cut()
    with pytest.raises(TimeoutError):
        result.get(timeout=0.3)
    site.database.restore()
    world.open(f"{result} b")
    assert result.get(timeout=60) == ["b done"]
