"""What a step may return and raise, and what it may be: nothing of it stops a worker or leaves a run stuck."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from orchestrator import SagaFailed, SchemaError
from orchestrator.client import Client
from orchestrator.settings import Settings
from tests.acceptance import sagas, steps
from tests.acceptance.conftest import Site
from tests.acceptance.running import Worker, World, until

BAD = ["NUL", "NaN", "Infinity", "lone surrogate", "huge integer", "depth", "size", "generator"]


def failure_of(result: Any) -> SagaFailed:
    with pytest.raises(SagaFailed) as caught:
        result.get(timeout=60)
    return caught.value


@pytest.mark.parametrize("which", BAD)
def test_a_result_that_cannot_be_stored_is_a_failed_step(worker: Worker, world: World, which: str) -> None:
    result = sagas.one_step.delay("return_bad", which)
    failure = failure_of(result)
    assert failure.state == "compensated"
    assert re.search("PayloadError|Exceeds the limit", failure.error["message"])
    assert [word for word in world.told(result) if word[:4] != "told"] == ["do before", "undo before"]


@pytest.mark.parametrize("which", BAD)
def test_an_argument_or_an_output_that_cannot_be_stored_fails_the_run(worker: Worker, world: World, which: str) -> None:
    for result in (sagas.bad_argument_within.delay(which), sagas.bad_result.delay(which)):
        failure = failure_of(result)
        assert (failure.state, failure.error_type) == ("compensated", "PayloadError")
        assert "undo before" in world.told(result)


@pytest.mark.parametrize(
    "which",
    ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "__str__ raises", "NUL in the message", "two megabytes"],
)
def test_an_exception_of_any_kind_is_a_failed_attempt(worker: Worker, world: World, which: str) -> None:
    result = sagas.one_step.delay("raise_bad", which)
    failure = failure_of(result)
    assert failure.state == "compensated"
    assert len(failure.error["message"]) < 10_000
    assert "WorkerLost" not in failure.error["message"]


@pytest.mark.parametrize(
    ("which", "gives"),
    [
        ("signature", 3),
        ("task", 3),
        ("retry", 3),
        ("retry at", 2),
        ("autoretry", 3),
        ("ignore", None),
        ("reject", "rejected"),
    ],
)
def test_plain_celery_tasks_are_steps_as_they_are(worker: Worker, world: World, which: str, gives: Any) -> None:
    result = sagas.celery_tasks.delay(which)
    assert result.get(timeout=60) == gives
    if which in ("retry", "autoretry"):
        assert [e.attempt for e in world.effects(result)] == [1, 2, 3]


def test_a_task_that_retries_too_often_fails_with_its_own_error(worker: Worker, world: World) -> None:
    result = sagas.celery_tasks.delay("too often")
    until(lambda: len(world.effects(result)) >= 4, "as many attempts as the task allows")
    result.cancel()
    with pytest.raises(SagaFailed):
        result.get(timeout=60)
    assert [e.attempt for e in world.effects(result)][:4] == [1, 2, 3, 4]


def test_a_task_that_retries_beyond_all_dates_waits_and_can_be_cancelled(
    worker: Worker, sql_of: psycopg.Connection[Any]
) -> None:
    result = sagas.celery_tasks.delay("retry some day")
    due = "SELECT attempt FROM orchestrator.work WHERE run_id = %s AND due_at > now() + interval '1 year'"
    assert until(lambda: sql_of.execute(due, [result.id]).fetchone(), "the second attempt is planned") == (1,)
    result.cancel()
    with pytest.raises(SagaFailed):
        result.get(timeout=60)


# -- environment -------------------------------------------------------------------------------------------------------
def told_at_start(worker: Worker) -> str:
    worker.launch()
    assert worker.process is not None
    try:
        code = worker.process.wait(30)
    except subprocess.TimeoutExpired:
        raise AssertionError(worker.said) from None
    assert code != 0
    assert "Traceback" not in worker.said
    (line,) = re.findall(r"^.*orchestrator: .*$", worker.said, re.M)
    return str(line)


def test_a_worker_without_a_schema_says_how_to_make_it(
    new_worker: Callable[..., Worker], empty_database_url: str
) -> None:
    assert "saga migrate" in told_at_start(new_worker(ORCHESTRATOR_DATABASE_URL=empty_database_url))


def test_a_worker_on_a_newer_schema_says_so(new_worker: Callable[..., Worker], database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE orchestrator.alembic_version SET version_num = '9999'")
    assert "newer" in told_at_start(new_worker(ORCHESTRATOR_DATABASE_URL=database_url))


def test_a_worker_without_a_database_says_so(new_worker: Callable[..., Worker]) -> None:
    nowhere = "postgresql://me:s3cret@127.0.0.1:1/nothing"
    line = told_at_start(new_worker(ORCHESTRATOR_DATABASE_URL=nowhere))
    assert "Postgres cannot be reached" in line and "s3cret" not in line


def test_a_start_without_a_schema_says_how_to_make_it(site: Site, empty_database_url: str) -> None:
    client = Client(Settings.from_environment({}, database_url=empty_database_url), lambda *_: None, lambda: "celery")
    with pytest.raises(SchemaError, match="saga migrate"):
        client.start(sagas.sequence, ([],), {}, {})
    with pytest.raises(SchemaError, match="saga migrate"):
        client.outcome("x")
    client.pool.close()


def test_a_worker_without_a_broker_waits_for_it(site: Site, new_worker: Callable[..., Worker], world: World) -> None:
    waiting = new_worker(proxied=True)
    site.broker.cut()
    waiting.launch()
    until(lambda: "Cannot connect" in waiting.said, "it says that the broker is away", 30.0)
    result = sagas.sequence.apply_async(([steps.Plan(name="a")],), queue=waiting.queue)
    site.broker.restore()
    assert result.get(timeout=40) == ["a done"]
