"""What a run is started with, before anything is asked of the database."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import math
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, cast

import psycopg
import pytest
from pydantic import BaseModel

from orchestrator import ConflictError, StoreUnavailableError, UnknownRunError, UsageError, poller, saga, starting
from orchestrator.client import Client
from orchestrator.settings import Settings
from orchestrator.step import StepContext, current_step
from orchestrator.store import runs


@saga.define
async def begun(amount: int) -> int:
    return amount


@saga.define
async def both(tens: Any, ones: Any = None) -> None: ...


@pytest.fixture
def inside() -> Iterator[StepContext]:
    """A step that runs, of a run with an id as long as one may be."""
    context = StepContext("r" * 500, "shop.charge#0", 1, f"{'r' * 500}:shop.charge#0", datetime.now(UTC))
    token = current_step.set(context)
    yield context
    current_step.reset(token)


def _start(**options: object) -> str:
    return starting.prepare(begun, {"amount": 1}, options, lambda: "celery")[0].id


def test_what_a_step_with_a_long_key_starts_has_an_id_that_is_the_same_at_each_attempt(inside: StepContext) -> None:
    first = [_start() for _ in range(2)]
    inside.starts, inside.attempt = 0, 2
    assert [_start() for _ in range(2)] == first
    assert len({*first}) == 2 and all(len(run_id) <= 500 for run_id in first)
    inside.starts, inside.idempotency_key = 0, f"{'r' * 500}:shop.charge#1"
    assert _start() not in first, "another step of the run starts others"


def test_what_a_thread_of_a_step_starts_has_an_id_of_the_step_where_its_context_was_handed_on(
    inside: StepContext,
) -> None:
    with ThreadPoolExecutor(1) as threads:
        handed_on = threads.submit(contextvars.copy_context().run, _start).result()
    assert inside.starts == 1
    inside.starts = 0
    assert asyncio.run(asyncio.to_thread(_start)) == handed_on


def test_an_id_of_the_callers_own_is_as_long_as_it_may_be(inside: StepContext) -> None:
    assert _start(task_id="a" * 500) == "a" * 500
    with pytest.raises(UsageError, match="500"):
        _start(task_id="a" * 501)


@pytest.mark.parametrize("deadline", [0, -1.5, timedelta(0), timedelta(days=-1)])
def test_a_deadline_that_has_passed_before_the_start_is_refused(deadline: Any) -> None:
    with pytest.raises(UsageError, match="deadline must be positive"):
        _start(deadline=deadline)


@pytest.mark.parametrize(
    "option",
    [
        "expires", "headers", "serializer", "compression", "retry", "retry_policy", "exchange", "routing_key", "shadow",
        "producer", "publisher", "connection", "ignore_result", "add_to_parent", "time_limit", "soft_time_limit",
        "argsrepr", "kwargsrepr", "delivery_mode", "expiration", "mandatory",
    ],
)  # fmt: skip
def test_what_celery_takes_for_its_messages_is_passed_over(option: str) -> None:
    _start(**{option: {"max_retries": 3}})
    with pytest.raises(UsageError, match="no start option"):
        _start(**{f"{option}s_": 1})


@pytest.fixture
def client(database_url: str) -> Iterator[Client]:
    made = Client(Settings.from_environment({}, database_url=database_url), lambda *_: None, lambda: "celery")
    yield made
    made.pool.close()


class Amount(BaseModel):
    cents: int


@pytest.mark.parametrize("args", ["42", b"42", {"amount": 42}, Amount(cents=42)], ids=lambda args: type(args).__name__)
def test_a_lone_argument_in_the_place_of_all_is_not_taken_apart(client: Client, args: Any) -> None:
    """It is what ``("42")`` is: a text has letters, a model has fields, and neither is a list of arguments."""
    mine = copy.copy(both)
    mine.starter = cast(Any, client)
    with pytest.raises(UsageError, match="a list or tuple of arguments"):
        mine.apply_async(args)
    with pytest.raises(UsageError, match="a list or tuple of arguments"):
        asyncio.run(mine.aapply_async(args))
    with pytest.raises(UsageError, match="a list or tuple of arguments"):
        mine.start_many([args])


@pytest.mark.parametrize("name", ["s", "si", "signature", "subtask"])
def test_a_saga_is_no_link_of_a_canvas_and_says_what_to_call_instead(name: str) -> None:
    with pytest.raises(UsageError, match=r"has no signature.*start it with both\.delay"):
        getattr(both, name)(42)


@saga.define
async def ordered(amount: Decimal, at: datetime, note: Any = None) -> None: ...


def test_the_same_amount_and_the_same_instant_are_the_same_input_however_they_are_written(client: Client) -> None:
    """As they come from a form at first, and from the database when the start is tried again."""
    noon = datetime(2026, 7, 1, 12, tzinfo=UTC)
    first = client.start(ordered, (Decimal("10.5"), noon), {}, {"task_id": "one"})
    again = (Decimal("10.50"), noon.astimezone(timezone(timedelta(hours=2))))
    assert client.start(ordered, again, {}, {"task_id": "one"}).id == first.id
    for other in ((Decimal("10.51"), noon), (Decimal("10.5"), noon + timedelta(microseconds=1))):
        with pytest.raises(ConflictError):
            client.start(ordered, other, {}, {"task_id": "one"})
    client.start(ordered, (Decimal(1), noon, 1), {}, {"task_id": "two"})
    with pytest.raises(ConflictError):
        client.start(ordered, (Decimal(1), noon, True), {}, {"task_id": "two"})


def test_one_id_for_many_runs_is_refused_and_not_passed_over(client: Client) -> None:
    with pytest.raises(UsageError, match="task_ids="):
        client.start_many(begun, [(1,)], {"task_id": "one"})


def test_a_handle_is_pickled_by_its_id_and_bound_to_the_app_of_who_unpickles_it(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = client.start(begun, (1,), {}, {"task_id": "one"})
    sent = pickle.dumps([result])
    other = Client(client.settings, lambda *_: None, lambda: "celery")
    monkeypatch.setattr(begun, "starter", other)
    (found,) = pickle.loads(sent)
    assert (found.id, found.status, found._client, found._saga) == ("one", "pending", other, begun)
    monkeypatch.setattr(begun, "starter", None)
    with pytest.raises(UsageError, match=r"import the module that makes `Orchestrator\(app\)` first"):
        pickle.loads(sent)
    other.pool.close()


def test_a_handle_that_knows_no_saga_says_what_to_send_instead(client: Client) -> None:
    with pytest.raises(UsageError, match=r"pass the run id on, and take `saga\.AsyncResult"):
        pickle.dumps(client.handle(None, "one"))


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_a_handle_is_copied_with_what_it_knows(client: Client, make: Callable[[Any], Any]) -> None:
    result = client.start(begun, (1,), {}, {"task_id": "one"})
    client.terminate("one")
    result.ended = client.outcome("one")
    copied = make({"result": result})["result"] if make is copy.deepcopy else make(result)
    assert copied is not result
    assert (copied.id, copied.ended, copied._client) == ("one", result.ended, client)


def test_a_caller_may_wait_for_as_long_as_there_are_numbers(client: Client) -> None:
    result = client.start(begun, (1,), {}, {"task_id": "one"})
    with psycopg.connect(client.settings.dsn) as connection:
        connection.execute(
            "UPDATE orchestrator.runs SET state = 'completed', output = '7', finished_at = now() WHERE id = 'one'"
        )
    for timeout in (math.inf, 1e300):
        result.ended = None
        assert result.get(timeout=timeout) == 7
        result.ended = None
        assert asyncio.run(result.aget(timeout=timeout)) == 7


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_a_caller_who_does_not_wait_gets_what_has_ended(client: Client, timeout: float) -> None:
    result = client.start(begun, (1,), {}, {"task_id": "one"})
    with pytest.raises(TimeoutError, match="was not finished"):
        result.get(timeout=timeout)
    with pytest.raises(TimeoutError, match="was not finished"):
        asyncio.run(result.aget(timeout=timeout))
    with psycopg.connect(client.settings.dsn) as connection:
        connection.execute(
            "UPDATE orchestrator.runs SET state = 'completed', output = '7', finished_at = now() WHERE id = 'one'"
        )
    assert client.handle(begun, "one").get(timeout=timeout) == 7
    assert asyncio.run(client.handle(begun, "one").aget(timeout=timeout)) == 7


def test_who_has_started_a_run_does_not_hear_that_it_is_unknown_because_others_asked_before(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started, and waited for, while the answer is on its way to them."""
    really, mine = poller.unknown_run, list[Future[runs.Outcome]]()

    def unknown(run_id: str, *args: Any) -> UnknownRunError:
        client.start(begun, (1,), {}, {"task_id": run_id})
        mine.append(client.wait(run_id))
        return really(run_id, *args)

    monkeypatch.setattr(poller, "unknown_run", unknown)
    with pytest.raises(UnknownRunError):
        client.handle(begun, "late").get(timeout=30)
    assert not mine[0].done()
    client.forget("late", mine[0])


def test_a_start_whose_connection_is_lost_under_way_is_not_said_to_be_undone(
    client: Client, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = runs.start_and_look

    def lost(connection: Any, *args: Any) -> Any:
        really(connection, *args)
        client.pool._dsn = "postgresql://nobody@127.0.0.1:1/nothing"
        connection.close()
        raise psycopg.OperationalError("the connection is lost")

    monkeypatch.setattr(runs, "start_and_look", lost)
    with pytest.raises(StoreUnavailableError, match="may have been recorded all the same") as raised:
        client.start(begun, (1,), {}, {})
    assert raised.value.in_doubt and "Nothing was recorded" not in str(raised.value)
    with psycopg.connect(database_url) as connection:
        [(run_id,)] = connection.execute("SELECT id FROM orchestrator.runs").fetchall()
    assert f"run {run_id}:" in str(raised.value)
    with pytest.raises(StoreUnavailableError, match="Nothing was recorded") as raised:
        client.start(begun, (1,), {}, {})
    assert not raised.value.in_doubt
