"""Every way to start a run: from a backend, in its transaction, by message, from beat, from a step."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session

from orchestrator import (
    ConflictError,
    PayloadError,
    SagaFailed,
    SchemaError,
    UnknownRunError,
    UnknownSagaError,
    UsageError,
)
from tests.acceptance import sagas, steps
from tests.acceptance.app import app, orchestrator
from tests.acceptance.conftest import Site
from tests.acceptance.running import Worker, World, until
from tests.acceptance.sagas import Plan

pytestmark = pytest.mark.usefixtures("worker")
A = Plan(name="a")
BAD = ["NUL", "NaN", "Infinity", "lone surrogate", "huge integer", "depth", "size"]


def new_id() -> str:
    return f"run-{uuid.uuid4()}"


def runs(sql_of: psycopg.Connection[Any], prefix: str) -> list[str]:
    rows = sql_of.execute("SELECT id FROM orchestrator.runs WHERE starts_with(id, %s) ORDER BY id", [prefix])
    return [run_id for (run_id,) in rows]


# -- many at once ------------------------------------------------------------------------------------------------------
def test_many_runs_start_together_and_starting_them_again_starts_none(
    world: World, sql_of: psycopg.Connection[Any]
) -> None:
    prefix = new_id()
    calls, ids = [([A],)] * 3, [f"{prefix}-{number}" for number in range(3)]
    results = sagas.sequence.start_many(calls, task_ids=ids, priority=3)
    assert [result.id for result in results] == ids
    assert [result.get(timeout=60) for result in results] == [["a done"]] * 3
    more = sagas.sequence.start_many([*calls, ([A],)], task_ids=[*ids, f"{prefix}-3"])
    assert [result.get(timeout=60) for result in more] == [["a done"]] * 4
    assert [world.told(run_id) for run_id in runs(sql_of, prefix)] == [["do a"]] * 4
    assert len({result.id for result in sagas.sequence.start_many(calls)}) == 3, "without ids every one is a new run"
    assert sagas.sequence.start_many([]) == []


def test_bad_calls_among_many_are_refused(sql_of: psycopg.Connection[Any]) -> None:
    prefix = new_id()
    first = sagas.sequence.apply_async(([A],), task_id=f"{prefix}-0")
    with pytest.raises(ConflictError, match=first.id):
        sagas.sequence.start_many([([A, A],), ([A],)], task_ids=[first.id, f"{prefix}-1"])
    for ids in (["one"], ["same", "same"]):
        with pytest.raises(UsageError, match="task_ids"):
            sagas.sequence.start_many([([A],), ([A],)], task_ids=ids)
    with pytest.raises(PayloadError):
        sagas.sequence.start_many([([A],), ([Plan(name="a\0")],)], task_ids=[f"{prefix}-2", f"{prefix}-3"])
    with pytest.raises(UsageError, match="transaction"):
        sagas.sequence.start_many([([A],)], transaction=sql_of)
    assert runs(sql_of, prefix) == [f"{prefix}-0", f"{prefix}-1"], "bad input starts none"


# -- from a backend ----------------------------------------------------------------------------------------------------
def test_the_run_id_makes_a_start_idempotent(world: World, sql_of: psycopg.Connection[Any]) -> None:
    run_id = new_id()
    first = sagas.sequence.apply_async(([A],), task_id=run_id)
    assert first.get(timeout=60) == ["a done"]
    again = sagas.sequence.apply_async((), {"plans": [A]}, task_id=run_id)
    assert (again.id, again.get(timeout=60), world.told(run_id)) == (run_id, ["a done"], ["do a"])
    with pytest.raises(ConflictError, match=run_id):
        sagas.sequence.apply_async(([A, A],), task_id=run_id)
    with pytest.raises(ConflictError, match="sequence"):
        sagas.together.apply_async(([A],), task_id=run_id)
    assert runs(sql_of, run_id) == [run_id]
    assert sagas.sequence.AsyncResult(run_id).get(timeout=60) == ["a done"]


def test_countdown_and_eta_wait(world: World) -> None:
    later = sagas.sequence.apply_async(([A],), countdown=0.6)
    at = datetime.now(UTC) + timedelta(seconds=0.6)
    dated = sagas.sequence.apply_async(([A],), eta=at)
    assert sagas.sequence.delay([A]).get(timeout=60) == ["a done"]
    assert (later.status, dated.status) == ("pending", "pending")
    assert later.get(timeout=60) == dated.get(timeout=60) == ["a done"]
    assert datetime.now(UTC) >= at
    with pytest.raises(UsageError, match="aware"):
        sagas.sequence.apply_async(([A],), eta=datetime(2030, 1, 1))
    with pytest.raises(UsageError, match="thousand years"):
        sagas.sequence.apply_async(([A],), eta=datetime.max.replace(tzinfo=UTC), deadline=timedelta(days=1))


def test_a_run_that_waits_can_be_cancelled_before_it_starts(world: World) -> None:
    later = sagas.sequence.apply_async(([A],), countdown=3600)
    later.cancel(reason="changed my mind")
    with pytest.raises(SagaFailed) as caught:
        later.get(timeout=60)
    assert (caught.value.state, world.told(later)) == ("cancelled", [])


def test_higher_priority_goes_first(new_worker: Callable[..., Worker], world: World) -> None:
    waiting = new_worker("-c", "1")
    names = [f"{new_id()}-{priority}" for priority in (1, 9, 0, 5)]
    for name in names:
        plan = Plan(name=name, kind="look")
        sagas.sequence.apply_async(([plan],), task_id=name, queue=waiting.queue, priority=int(name[-1]))
    waiting.start()
    results = [sagas.sequence.AsyncResult(name) for name in names]
    assert [result.get(timeout=60) for result in results]
    order = [effect.name[-1] for effect in world.effects() if effect.run in names]
    assert order == ["9", "5", "1", "0"]


def test_unknown_options_canvas_and_values_are_refused(sql_of: psycopg.Connection[Any]) -> None:
    for options in ({"link": "x"}, {"retries_of_mine": 3}, {"priority": 11}, {"task_id": ""}, {"task_id": "a\nb"}):
        with pytest.raises(UsageError):
            sagas.sequence.apply_async(([A],), **options)
    with pytest.raises(TypeError):
        sagas.sequence.apply_async(([A], 2))
    with pytest.raises(PayloadError):
        sagas.sequence.delay([{"name": 5, "do": "x"}])
    with pytest.raises(UnknownRunError, match="never"):
        sagas.sequence.AsyncResult("never").status  # noqa: B018
    with pytest.raises(UnknownRunError):
        sagas.sequence.AsyncResult("never").get(timeout=5)


@pytest.mark.parametrize("which", BAD)
def test_a_value_that_cannot_be_stored_is_refused_at_the_start(which: str, sql_of: psycopg.Connection[Any]) -> None:
    run_id = new_id()
    with pytest.raises(PayloadError):
        sagas.bad_argument.apply_async((steps.bad_value(which),), task_id=run_id)
    assert runs(sql_of, run_id) == []


def test_async_twins(world: World) -> None:
    async def main() -> Any:
        result = await sagas.sequence.adelay([A])
        failing = await sagas.sequence.aapply_async(([Plan(name="x", do=["reject"])],), task_id=new_id())
        with pytest.raises(SagaFailed):
            await failing.aget(timeout=60)
        with pytest.raises(TimeoutError):
            await (await sagas.sleeper.adelay(3600)).aget(timeout=0.1)
        return await result.aget(timeout=60)

    assert asyncio.run(main()) == ["a done"]


def test_many_callers_share_one_poller() -> None:
    async def main() -> list[Any]:
        results = [await sagas.sequence.adelay([Plan(name=str(n), kind="look")]) for n in range(50)]
        return await asyncio.gather(*(result.aget(timeout=30) for result in results))

    assert asyncio.run(main()) == [[f"{n} done"] for n in range(50)]


# -- in the caller's transaction ---------------------------------------------------------------------------------------
@pytest.fixture
def engine(site: Site) -> Iterator[Engine]:
    engine = create_engine(site.database_url.replace("postgresql://", "postgresql+psycopg://"))
    yield engine
    engine.dispose()


def check_joined(start: Callable[[str, bool], None], sql_of: psycopg.Connection[Any], world: World) -> None:
    """A start in a transaction happens if and only if that commits; again in it with the same id is the same run."""
    rolled_back, committed = new_id(), new_id()
    start(rolled_back, False)
    start(committed, True)
    assert sagas.sequence.AsyncResult(committed).get(timeout=60) == ["a done"]
    assert runs(sql_of, rolled_back) == []
    assert sql_of.execute("SELECT run FROM notes WHERE run IN (%s, %s)", [rolled_back, committed]).fetchall() == [
        (committed,)
    ]
    with pytest.raises(ConflictError):
        sagas.sequence.apply_async(([],), task_id=committed)


NOTE = "INSERT INTO notes VALUES ('{}')"


def test_with_a_sqlalchemy_connection(engine: Engine, sql_of: psycopg.Connection[Any], world: World) -> None:
    def start(run_id: str, commit: bool) -> None:
        with engine.connect() as connection:
            connection.execute(text(NOTE.format(run_id)))
            sagas.sequence.apply_async(([A],), task_id=run_id, transaction=connection)
            sagas.sequence.apply_async(([A],), task_id=run_id, transaction=connection)
            with pytest.raises(ConflictError):
                sagas.sequence.apply_async(([],), task_id=run_id, transaction=connection)
            assert runs(sql_of, run_id) == []
            connection.commit() if commit else connection.rollback()

    check_joined(start, sql_of, world)


def test_with_a_session(engine: Engine, sql_of: psycopg.Connection[Any], world: World) -> None:
    def start(run_id: str, commit: bool) -> None:
        with Session(engine) as session:
            session.execute(text(NOTE.format(run_id)))
            sagas.sequence.apply_async(([A],), task_id=run_id, transaction=session)
            session.commit() if commit else session.rollback()

    check_joined(start, sql_of, world)


def test_with_a_psycopg_connection(site: Site, sql_of: psycopg.Connection[Any], world: World) -> None:
    def start(run_id: str, commit: bool) -> None:
        with psycopg.connect(site.database_url) as connection:
            connection.execute(NOTE.format(run_id))  # type: ignore[arg-type]
            sagas.sequence.apply_async(([A],), task_id=run_id, transaction=connection)
            connection.commit() if commit else connection.rollback()

    check_joined(start, sql_of, world)
    with pytest.raises(UsageError, match="autocommit"):
        sagas.sequence.apply_async(([A],), transaction=sql_of)


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("kind", ["connection", "session", "scoped session"])
def test_with_an_async_transaction(
    site: Site, sql_of: psycopg.Connection[Any], world: World, driver: str, kind: str
) -> None:
    async def start(run_id: str, commit: bool) -> None:
        engine = create_async_engine(site.database_url.replace("postgresql://", f"postgresql+{driver}://"))
        async with engine.connect() as connection:
            transaction: Any = connection if kind == "connection" else AsyncSession(connection)
            if kind == "scoped session":
                session = async_sessionmaker(connection)
                transaction = async_scoped_session(session, scopefunc=asyncio.current_task)
            await transaction.execute(text(NOTE.format(run_id)))
            await sagas.sequence.aapply_async(([A],), task_id=run_id, transaction=transaction)
            await sagas.sequence.aapply_async(([A],), task_id=run_id, transaction=transaction)
            if commit:
                await transaction.commit()
            await connection.commit() if commit else await connection.rollback()
            if kind != "connection":
                await transaction.close()
        await engine.dispose()

    check_joined(lambda run_id, commit: asyncio.run(start(run_id, commit)), sql_of, world)


def test_with_an_async_psycopg_connection(site: Site, sql_of: psycopg.Connection[Any], world: World) -> None:
    async def start(run_id: str, commit: bool) -> None:
        async with await psycopg.AsyncConnection.connect(site.database_url) as connection:
            await connection.execute(NOTE.format(run_id))  # type: ignore[arg-type]
            await sagas.sequence.aapply_async(([A],), task_id=run_id, transaction=connection)
            await connection.commit() if commit else await connection.rollback()

    check_joined(lambda run_id, commit: asyncio.run(start(run_id, commit)), sql_of, world)


def test_a_transaction_elsewhere_is_refused(empty_database_url: str) -> None:
    engine = create_engine(empty_database_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection, pytest.raises(SchemaError, match="transaction="):
        sagas.sequence.apply_async(([A],), transaction=connection)
    engine.dispose()
    with pytest.raises(UsageError, match="transaction= takes"):
        sagas.sequence.apply_async(([A],), transaction=object())
    scoped = async_scoped_session(async_sessionmaker(), scopefunc=asyncio.current_task)
    with pytest.raises(UsageError, match=r"await aapply_async\(...\) for an async one"):
        sagas.sequence.apply_async(([A],), transaction=scoped)


# -- by message --------------------------------------------------------------------------------------------------------
def test_a_message_sent_twice_starts_one_run(world: World, sql_of: psycopg.Connection[Any]) -> None:
    run_id = new_id()
    call = {"args": [[{"name": "a"}]], "task_id": run_id}
    for _ in range(2):
        app.send_task("tests.acceptance.sagas.sequence", **call)
    result = sagas.sequence.AsyncResult(run_id)
    until(lambda: runs(sql_of, run_id), "the message starts a run")
    assert result.get(timeout=60) == ["a done"]
    app.send_task("tests.acceptance.sagas.sequence", args=[[]], task_id=run_id)
    marker = new_id()
    app.send_task("tests.acceptance.sagas.sequence", kwargs={"plans": []}, task_id=marker)
    until(lambda: runs(sql_of, marker), "the message after it")
    assert sagas.sequence.AsyncResult(marker).get(timeout=60) == []
    assert (world.told(run_id), runs(sql_of, run_id)) == (["do a"], [run_id])


def test_messages_that_cannot_start_anything_do_no_harm(own_worker: Worker, sql_of: psycopg.Connection[Any]) -> None:
    bad, good = new_id(), new_id()
    send = partial(app.send_task, queue=own_worker.queue)
    send("tests.acceptance.sagas.sequence", args=["no plans"], task_id=bad)
    send("tests.acceptance.sagas.sequence", args=[1, 2, 3], task_id=f"{bad}-2")
    send("tests.acceptance.sagas.nobody", args=[[]], task_id=f"{bad}-3")
    send("tests.acceptance.sagas.sequence", args=[[]], task_id=good)
    until(lambda: runs(sql_of, good), "the good message")
    until(lambda: bad in own_worker.said and f"{bad}-2" in own_worker.said, "one line each")
    assert runs(sql_of, bad) == []
    assert "No task 'tests.acceptance.sagas.nobody' here" in until(
        lambda: "nobody" in own_worker.said and own_worker.said, "a warning"
    )


def test_a_beat_entry_starts_a_run(site: Site) -> None:
    """What beat does with an entry: the task of that name, `apply_async` with its producer and options."""
    task = app.tasks["tests.acceptance.sagas.sequence"]
    with app.amqp.producer_pool.acquire() as producer:
        result = task.apply_async([[A]], {}, producer=producer, priority=3, periodic_task_name="nightly")
    assert result.get(timeout=60) == ["a done"]
    assert task.delay([A]).get(timeout=60) == ["a done"]


def test_unknown_sagas_are_named() -> None:
    with pytest.raises(UnknownSagaError, match="nobody"):
        orchestrator.start_by_message("nobody", new_id(), [], {})


# -- from a step -------------------------------------------------------------------------------------------------------
def test_a_step_that_is_retried_starts_its_runs_once(world: World, sql_of: psycopg.Connection[Any]) -> None:
    result = sagas.starting.delay(Plan(name="s", do=["error", "late", "ok"]), "outside")
    ids = result.get(timeout=60)
    assert ids == [f"{result}:tests.acceptance.sagas.start_others#0:{n}" for n in range(2)]
    assert runs(sql_of, f"{result}:") == ids
    assert [sagas.sequence.AsyncResult(run_id).get(timeout=60) for run_id in ids] == [[], []]


@pytest.mark.parametrize("how", ["unnamed", "named", "many"])
@pytest.mark.parametrize("do", [["ok"], ["error", "ok"], ["reject"]])
def test_a_transactional_step_starts_a_run_only_if_it_commits(
    world: World, sql_of: psycopg.Connection[Any], do: list[str], how: str
) -> None:
    result = sagas.starting.delay(Plan(name="s", do=do), how)
    if do == ["reject"]:
        with pytest.raises(SagaFailed):
            result.get(timeout=60)
        assert runs(sql_of, f"{result}:") == []
    else:
        started = result.get(timeout=60)
        assert runs(sql_of, f"{result}:") == [started]
        assert sagas.sequence.AsyncResult(started).get(timeout=60) == []


def test_a_step_as_a_plain_celery_task_with_a_result_backend(world: World) -> None:
    name = new_id()
    sent = steps.look.delay(Plan(name=name))
    assert sent.get(timeout=60) == f"{name} done"
    (effect,) = [e for e in world.effects() if e.name == name]
    assert effect.run == "" and effect.key.startswith("direct:")
    assert app.send_task("tests.acceptance.steps.look", kwargs={"plan": {"name": name}}).get(timeout=60)


def test_starting_is_quick() -> None:
    """The median start commits in milliseconds, not in a pump's interval."""
    times = []
    for _ in itertools.repeat(None, 15):
        before = time.perf_counter()
        sagas.sequence.delay([])
        times.append(time.perf_counter() - before)
    assert sorted(times)[7] < 0.1


def test_a_task_gets_its_turn_at_the_only_child_while_sagas_keep_it_busy(new_worker: Callable[..., Worker]) -> None:
    """A drain goes on only as long as nobody else waits; this run could keep it going for most of a minute."""
    worker = new_worker("-c", "1").start()
    run = sagas.celery_tasks.apply_async(args=["pauses"], queue=worker.queue)
    until(lambda: run.status == "running", "the child is busy")
    for _ in range(3):
        assert steps.add.apply_async((1, 2), queue=worker.queue).get(timeout=60) == 3
        assert run.status == "running"
    run.terminate(reason="that is enough")
    until(lambda: run.status == "terminated", "the run has ended")
