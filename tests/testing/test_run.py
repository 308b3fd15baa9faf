"""`testing.run`: a saga in a unit test, with stubs and skipped time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from orchestrator import saga, testing
from orchestrator.errors import (
    DriftError,
    PayloadError,
    Rejected,
    SagaCancelled,
    SagaFailed,
    StepFailed,
    UsageError,
)
from orchestrator.machine.journal import Ended, Operated
from orchestrator.machine.policy import Effect, RetryPolicy
from orchestrator.step import step


class InsufficientFundsError(Exception):
    pass


@dataclass(frozen=True)
class Order:
    id: str
    total: Decimal


@dataclass(frozen=True)
class Charge:
    id: str
    taken: Decimal


@step
def refund(order: Order, result: Charge | None) -> None: ...


@step(compensate=refund, retry=RetryPolicy(non_retryable_error_types=(InsufficientFundsError,)))
def charge(order: Order) -> Charge:
    return Charge(step.current().idempotency_key, order.total)


@charge.probe
def find_charge(order: Order) -> Charge | None:
    return None


@step(effect=Effect.NONE)
async def look(n: int) -> int:
    await asyncio.sleep(0)
    return n


@step(heartbeat_timeout=timedelta(seconds=5), effect=Effect.NONE)
def train(epochs: int) -> int:
    resumed = step.current().heartbeat_details or 0
    for epoch in range(resumed, epochs):
        step.current().heartbeat(epoch + 1)
        if epoch == resumed + 1:
            raise ConnectionError("the worker was lost")
    return step.current().attempt


@step(transactional=True)
def unbook(connection: Any, n: int) -> None:
    connection.rows.append(-n)


@step(transactional=True, compensate=unbook, retry=RetryPolicy(maximum_attempts=2))
def book(connection: Any, n: int) -> int:
    connection.rows.append(n)
    if n < 0:
        raise ValueError("refused by the ledger")
    return n


@step(transactional=True, retry=RetryPolicy(maximum_attempts=1))
def scribble(connection: Any) -> str:
    connection.rows.append(1)
    return "a\0b"


class Base(DeclarativeBase): ...


class Written(Base):
    __tablename__ = "written"
    name: Mapped[str] = mapped_column(primary_key=True)


@step(transactional=True, retry=RetryPolicy(maximum_attempts=1))
def write(session: Session, name: str) -> None:
    for _ in range(2 if name == "twice" else 1):
        session.add(Written(name=name))
        with contextlib.suppress(IntegrityError):
            session.flush()
        session.expunge_all()
    if name == "taken back":
        session.get_nested_transaction().rollback()  # type: ignore[union-attr]


@saga.define
async def writing(name: str) -> None:
    await saga.step(write, name)


@saga.define
async def scribbling() -> str:
    return await saga.step(scribble)


@saga.define
async def checkout(order: Order) -> Charge:
    taken = await saga.step(charge, order)
    await saga.step(look, 1)
    return taken


@saga.define
async def booking(n: int) -> int:
    return await saga.step(book, n)


@saga.define(deadline=timedelta(days=2))
async def patient(n: int) -> str:
    await saga.step(charge, ORDER)
    await saga.sleep(timedelta(hours=24))
    return str(saga.now())


@saga.define
async def looking(n: int, *, times: int = 1) -> list[int]:
    return list(await asyncio.gather(*(saga.step(look, n) for _ in range(times))))


ORDER = Order("o-1", Decimal("9.90"))


def _names(run: testing.TestRun) -> list[tuple[str, str]]:
    return [(call.name.rsplit(".", 1)[-1], call.role) for call in run.calls]


def test_without_stubs_the_real_steps_run_and_values_arrive_as_their_types() -> None:
    run = testing.run(checkout, ORDER)
    assert (run.state, run.result().taken) == ("completed", Decimal("9.90"))


def test_a_steps_idempotency_key_is_its_run_and_its_key() -> None:
    run = testing.run(checkout, ORDER, task_id="order-1")
    assert run.output.id == f"order-1:{charge.name}#0"


def test_keyword_arguments_of_the_saga_are_passed_apart() -> None:
    assert testing.run(looking, 7, kwargs={"times": 3}).output == [7, 7, 7]


def test_a_stub_is_a_function_of_the_steps_parameters() -> None:
    run = testing.run(checkout, ORDER, stubs={charge: lambda order: Charge("c-1", order.total)})
    assert run.output == Charge("c-1", Decimal("9.90"))


def test_a_stub_may_be_the_result_itself_and_be_named_by_the_tasks_name() -> None:
    run = testing.run(checkout, ORDER, stubs={charge.name: Charge("c-2", Decimal(1))})
    assert run.output == Charge("c-2", Decimal(1))


def test_an_async_stub_is_awaited() -> None:
    async def taken(order: Order) -> Charge:
        return Charge("async", order.total)

    assert testing.run(checkout, ORDER, stubs={charge: taken}).output.id == "async"


def test_calls_tell_name_role_arguments_and_result_in_order() -> None:
    taken = Charge("c-1", Decimal(1))
    run = testing.run(checkout, ORDER, stubs={charge: taken, look: Rejected("no")})
    assert [call[:4] for call in run.calls] == [
        (charge.name, "do", (ORDER,), taken),
        (look.name, "do", (1,), None),
        (refund.name, "undo", (ORDER, taken), None),
    ]


def test_rejected_is_certain_so_that_nothing_is_undone() -> None:
    run = testing.run(checkout, ORDER, stubs={charge: Rejected("declined")})
    assert (run.state, _names(run)) == ("failed", [("charge", "do")])


def test_a_declared_non_retryable_error_is_certain_too() -> None:
    run = testing.run(checkout, ORDER, stubs={charge: InsufficientFundsError()})
    assert (run.state, _names(run)) == ("failed", [("charge", "do")])


def test_a_call_with_a_retry_policy_of_its_own_takes_nothing_back_of_what_is_declared_as_certain() -> None:
    @saga.define(name="patient checkout")
    async def patient(order: Order) -> None:
        await saga.step(charge.with_options(retry=RetryPolicy(maximum_attempts=7)), order)

    run = testing.run(patient, ORDER, stubs={charge: InsufficientFundsError()})
    assert (run.state, _names(run)) == ("failed", [("charge", "do")])


def test_an_ordinary_exception_is_in_doubt_and_tried_again_until_given_up() -> None:
    run = testing.run(checkout, ORDER, stubs={charge: TimeoutError("no answer")})
    assert _names(run) == [("charge", "do")] * 5 + [("find_charge", "probe")]
    assert run.duration == timedelta(seconds=1 + 2 + 4 + 8)


def test_a_probe_can_be_stubbed_to_find_the_effect() -> None:
    found = Charge("found", Decimal(1))
    run = testing.run(checkout, ORDER, stubs={charge: TimeoutError(), find_charge: found})
    assert (run.state, run.output) == ("completed", found)


def test_a_list_stubs_one_attempt_each_and_its_last_one_stays() -> None:
    outcomes = [TimeoutError("once"), Charge("second", Decimal(1))]
    run = testing.run(checkout, ORDER, stubs={charge: outcomes})
    assert (run.output.id, [call.attempt for call in run.calls]) == ("second", [1, 2, 1])
    assert testing.run(looking, 0, kwargs={"times": 3}, stubs={look: [1, 2]}).output == [1, 2, 2]


def test_an_empty_list_of_stubs_is_refused() -> None:
    with pytest.raises(UsageError, match="empty list"):
        testing.run(checkout, ORDER, stubs={charge: []})


def test_stubs_are_keyed_by_steps_only() -> None:
    with pytest.raises(UsageError, match="keyed by steps"):
        testing.run(checkout, ORDER, stubs={3: None})


@pytest.mark.parametrize("misspelt", [f"{find_charge.name}s", find_charge.name.replace("find_charge", "find_chrage")])
def test_a_stub_whose_name_is_misspelt_is_refused(misspelt: str) -> None:
    """The step itself would be called, and its provider."""
    with pytest.raises(UsageError, match=rf"named '{misspelt}' .*did you mean '{find_charge.name}'"):
        testing.run(checkout, ORDER, stubs={misspelt: None})


def test_a_stub_without_the_module_of_its_step_is_refused() -> None:
    with pytest.raises(UsageError, match=r"did you mean '.*find_charge'"):
        testing.run(checkout, ORDER, stubs={"find_charge": None})


def test_a_stub_may_look_at_the_running_step() -> None:
    seen: list[tuple[str, str]] = []

    def take(order: Order) -> Charge:
        seen.append((step.current().idempotency_key, step.current().undoes))
        return Charge("c-1", order.total)

    def undo(order: Order, result: Charge | None) -> None:
        seen.append((step.current().idempotency_key, step.current().undoes))

    testing.run(checkout, ORDER, stubs={charge: take, look: Rejected(), refund: undo}, task_id="r")
    key = f"r:{charge.name}#0"
    assert seen == [(key, ""), (f"{key}:undo", key)]


def test_a_thread_that_a_step_starts_has_the_key_of_that_step() -> None:
    def take(order: Order) -> Charge:
        with ThreadPoolExecutor(1) as threads:
            return Charge(threads.submit(lambda: step.current().idempotency_key).result(), order.total)

    run = testing.run(checkout, ORDER, stubs={charge: [ConnectionError("down"), take]}, task_id="r")
    assert run.output == Charge(f"r:{charge.name}#0", ORDER.total)
    assert step.current().idempotency_key.startswith("direct:")


def test_heartbeat_details_reach_the_next_attempt() -> None:
    @saga.define
    async def training(n: int) -> int:
        return await saga.step(train, n)

    assert testing.run(training, 5).output == 3


def test_a_heartbeat_without_details_leaves_those_before_it() -> None:
    seen: list[Any] = []

    def beat(epochs: int) -> int:
        seen.append(step.current().heartbeat_details)
        step.current().heartbeat(7)
        step.current().heartbeat()
        raise ConnectionError("the worker was lost")

    @saga.define
    async def training(n: int) -> int:
        return await saga.step(train, n)

    testing.run(training, 5, stubs={train: [beat, 3]})
    testing.run(training, 5, stubs={train: [beat, beat, 3]})
    assert seen == [None, None, 7]


def test_what_a_step_declares_as_certainly_without_effect_is_that_in_a_call_with_another_policy_too() -> None:
    @saga.define
    async def impatient(order: Order) -> Charge:
        return await saga.step(charge.with_options(retry=RetryPolicy(maximum_attempts=2)), order)

    run = testing.run(impatient, ORDER, stubs={charge: InsufficientFundsError("too little")})
    assert (run.state, _names(run)) == ("failed", [("charge", "do")])


def test_time_is_skipped_and_counted() -> None:
    run = testing.run(patient, 1, started=datetime(2026, 5, 1, tzinfo=UTC))
    assert (run.output, run.duration) == ("2026-05-02 00:00:00+00:00", timedelta(hours=24))


def test_a_cancel_arrives_at_its_virtual_time() -> None:
    run = testing.run(patient, 1, cancel_at=timedelta(hours=3))
    assert (run.state, run.duration) == ("cancelled", timedelta(hours=3))
    assert _names(run) == [("charge", "do"), ("refund", "undo")]
    with pytest.raises(SagaCancelled):
        run.result()


def test_the_deadline_compensates_at_its_virtual_time() -> None:
    run = testing.run(patient, 1, deadline=timedelta(hours=1))
    assert (run.state, run.duration) == ("compensated", timedelta(hours=1))
    assert run.error and run.error["type"] == "DeadlineExceeded"


def test_an_attempt_can_take_time_and_a_cancel_waits_for_it() -> None:
    slow = testing.After(timedelta(minutes=2), Charge("slow", Decimal(1)))
    run = testing.run(checkout, ORDER, stubs={charge: slow}, cancel_at=timedelta(minutes=1))
    assert (run.state, run.duration) == ("cancelled", timedelta(minutes=2))
    assert _names(run) == [("charge", "do"), ("refund", "undo")]


def test_an_attempt_beyond_its_timeout_ends_there_in_doubt_after_its_effect() -> None:
    effects: list[str] = []

    def slow(n: int) -> int:
        effects.append("happened")
        return n

    run = testing.run(looking, 1, stubs={look: testing.After(timedelta(hours=1), slow)})
    assert (run.state, len(effects)) == ("failed", 5)
    assert run.error and "5 attempt(s): StepTimeout" in run.error["message"]


def test_nothing_is_raised_until_the_result_is_asked_for() -> None:
    run = testing.run(checkout, ORDER, stubs={look: Rejected("out of paper")})
    with pytest.raises(SagaFailed, match="out of paper") as caught:
        run.result()
    assert (caught.value.state, caught.value.run_id) == ("compensated", "test-run")


def test_input_that_cannot_be_stored_is_refused_at_the_start() -> None:
    with pytest.raises(PayloadError):
        testing.run(looking, float("nan"))


def test_a_result_that_cannot_be_stored_is_a_failed_step() -> None:
    run = testing.run(looking, 1, stubs={look: lambda n: (i for i in range(n))})
    assert run.state == "failed"
    assert run.error and "PayloadError" in run.error["message"]


# -- transactional steps ---------------------------------------------------------------------------------------------
class Ledger:
    """Stands in for a connection: rows, and savepoints that take them back."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    @contextmanager
    def begin_nested(self) -> Iterator[None]:
        before = list(self.rows)
        try:
            yield
        except BaseException:
            self.rows = before
            raise


def test_a_transactional_step_runs_on_the_given_connection() -> None:
    ledger = Ledger()
    assert testing.run(booking, 3, connection=ledger).output == 3
    assert ledger.rows == [3]


def test_a_transactional_step_that_raises_is_taken_back_and_leaves_no_doubt() -> None:
    ledger = Ledger()
    run = testing.run(booking, -3, connection=ledger)
    assert (run.state, ledger.rows) == ("failed", [])
    assert _names(run) == [("book", "do")] * 2


def test_a_transactional_step_whose_result_cannot_be_stored_is_taken_back() -> None:
    ledger = Ledger()
    run = testing.run(scribbling, connection=ledger)
    assert (run.state, ledger.rows) == ("failed", [])
    assert "PayloadError" in run.error["message"]


@pytest.mark.filterwarnings("ignore:New instance:sqlalchemy.exc.SAWarning")
@pytest.mark.parametrize(
    ("name", "ended", "rows", "why"),
    [
        ("once", "completed", 1, ""),
        ("twice", "failed", 0, "UsageError: what its Session had written was rolled back"),
        ("taken back", "failed", 0, "UsageError: the step has ended, by get_transaction()"),
    ],
)
def test_a_step_that_loses_the_rows_of_its_session_does_not_succeed(name: str, ended: str, rows: int, why: str) -> None:
    engine = create_engine("sqlite://")
    with Session(engine) as session:
        Base.metadata.create_all(session.connection())
        run = testing.run(writing, name, connection=session)
        assert (run.state, session.query(Written).count()) == (ended, rows)
    engine.dispose()
    assert why in str(run.error)


def test_a_transactional_step_needs_a_stub_or_a_connection() -> None:
    with pytest.raises(UsageError, match="stub it, or pass connection="):
        testing.run(booking, 3)


def test_the_stub_of_a_transactional_step_takes_no_connection() -> None:
    assert testing.run(booking, 3, stubs={book: lambda n: n + 1}).output == 4


def test_a_task_that_nobody_registered_has_to_be_stubbed() -> None:
    @saga.define
    async def legacy() -> Any:
        return await saga.step({"task": "legacy.task", "args": (1,), "kwargs": {"b": 2}})

    with pytest.raises(UsageError, match=r"legacy\.task"):
        testing.run(legacy)
    run = testing.run(legacy, stubs={"legacy.task": lambda a, b: [a, b]})
    assert run.output == [1, 2]


# -- parked runs -----------------------------------------------------------------------------------------------------
def _parked() -> testing.TestRun:
    stubs = {look: Rejected("no"), refund: [Rejected("account closed"), None]}
    return testing.run(checkout, ORDER, stubs=stubs)


def test_a_parked_run_says_where_and_why() -> None:
    run = _parked()
    assert run.state == "parked"
    assert run.error and run.error["message"] == f"{charge.name}#0: its undo was rejected (account closed)"
    with pytest.raises(SagaFailed, match="is parked"):
        run.result()


def test_a_parked_run_goes_on_when_it_is_retried() -> None:
    assert _parked().retry(f"{charge.name}#0").state == "compensated"


def test_a_skipped_undo_is_left_and_on_record() -> None:
    run = _parked().skip(f"{charge.name}#0", by="ann", reason="written off")
    assert (run.state, [item["key"] for item in run.left]) == ("failed", [f"{charge.name}#0"])  # type: ignore[index, call-overload]
    assert Operated("skip", f"{charge.name}#0", "ann", "written off") in run.entries


def test_a_resolved_undo_counts_as_undone() -> None:
    run = _parked().resolve(f"{charge.name}#0", reason="by hand")
    assert (run.state, run.left) == ("compensated", [])


def test_an_operator_is_told_what_is_parked() -> None:
    with pytest.raises(UsageError, match=rf"parked here: {charge.name}#0"):
        _parked().skip("nonsense#0")


def test_a_parked_run_can_be_terminated_and_cancelled() -> None:
    assert _parked().terminate("enough").state == "terminated"
    broken = testing.run(_breaks(), 1)
    assert (broken.state, broken.cancel("give up").state) == ("parked", "cancelled")


def _breaks() -> saga.Saga[Any, Any]:
    @saga.define(name="breaks")
    async def breaks(n: int) -> None:
        await saga.step(charge, ORDER)
        raise KeyError("typo")

    return breaks


def test_a_mistake_in_saga_code_parks_the_run_as_in_production() -> None:
    run = testing.run(_breaks(), 1)
    assert (run.state, _names(run)) == ("parked", [("charge", "do")])
    assert run.error and "typo" in run.error["message"]


@saga.define(name="parent of a mistake")
async def parent_of_a_mistake(n: int) -> None:
    await saga.child(_breaks(), n)


@saga.define(name="parent that goes back")
async def parent_that_goes_back(n: int) -> None:
    await saga.child(checkout, ORDER)
    await saga.step(look, n)


def test_a_mistake_inside_of_a_task_group_is_told() -> None:
    @saga.define
    async def side_by_side(n: int) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(_mistaken(n))

    run = testing.run(side_by_side, 1)
    assert run.state == "parked"
    assert run.error is not None
    assert "(1 sub-exception): AttributeError: 'int' object" in run.error["message"]
    assert run.error["message"].count("sub-exception") == 1


async def _mistaken(n: int) -> None:
    n.cents  # type: ignore[attr-defined]  # noqa: B018


def test_a_run_whose_child_is_parked_says_which_and_why() -> None:
    run = testing.run(parent_of_a_mistake, 1)
    assert run.state == "running"
    assert run.error and run.error["type"] == "KeyError"
    assert "child test-run/breaks#0 is parked" in run.error["message"] and "typo" in run.error["message"]
    with pytest.raises(SagaFailed, match=r"is running: .*child test-run/breaks#0 is parked"):
        run.result()


def test_a_run_whose_childs_undo_is_parked_says_so_besides_its_own_error() -> None:
    stubs = {look: [1, Rejected("no")], refund: Rejected("account closed")}
    run = testing.run(parent_that_goes_back, 1, stubs=stubs)
    assert run.state == "compensating"
    assert run.error and run.error["type"] == "StepFailed"
    with pytest.raises(SagaFailed, match=r"StepFailed: .*; child .* is parked: .*its undo was rejected"):
        run.result()


# -- determinism -----------------------------------------------------------------------------------------------------
def test_saga_code_that_is_not_deterministic_parks_as_drift() -> None:
    counter = iter(range(100))

    @saga.define(name="restless")
    async def restless(n: int) -> None:
        await saga.step(look, next(counter))
        await saga.step(look, n)

    run = testing.run(restless, 1)
    assert run.state == "parked"
    assert run.error and "with other arguments than recorded" in run.error["message"]


def test_without_replay_the_live_coroutine_is_kept() -> None:
    starts: list[int] = []

    @saga.define(name="started")
    async def started(n: int) -> None:
        starts.append(n)
        await saga.step(look, n)

    testing.run(started, 1, replay=False)
    assert starts == [1]


def test_once_runs_its_function_one_time() -> None:
    calls: list[int] = []

    @saga.define(name="once only")
    async def once_only(n: int) -> Any:
        rate = await saga.once("fx-rate", lambda: calls.append(1) or 1.5)
        await saga.step(look, n)
        return rate

    run = testing.run(once_only, 1)
    assert (run.output, calls, _names(run)) == (1.5, [1], [("fx-rate", "once"), ("look", "do")])


def test_a_run_that_waits_for_something_nobody_sends_is_still_running() -> None:
    @saga.define(name="waits for ever")
    async def waits_for_ever(n: int) -> None:
        await asyncio.Event().wait()

    run = testing.run(waits_for_ever, 1)
    assert run.state == "running"
    with pytest.raises(SagaFailed, match="is running"):
        run.result()


def test_the_journal_is_there_to_be_looked_at() -> None:
    run = testing.run(checkout, ORDER)
    assert [entry.tag for entry in run.entries] == ["asked", "settled", "asked", "settled", "returned", "ended"]
    assert isinstance(run.entries[-1], Ended)


def test_a_kept_history_proves_later_code() -> None:
    history = testing.run(checkout, ORDER).history
    testing.replay(checkout, history)


def test_a_kept_history_finds_drift() -> None:
    @saga.define(name="evolving")
    async def before(n: int) -> None:
        await saga.step(look, n)
        await saga.step(look, n + 1)

    history = testing.run(before, 1).history

    @saga.define(name="evolving")
    async def after(n: int) -> None:
        await saga.step(look, n)
        await saga.step(look, n + 2)

    with pytest.raises(DriftError, match="other arguments"):
        testing.replay(after, history)


def test_a_kept_history_finds_what_would_be_asked_too_early() -> None:
    @saga.define(name="hasty")
    async def before(n: int) -> None:
        await saga.step(look, n)
        await saga.step(look, n + 1)

    history = testing.run(before, 1).history

    @saga.define(name="hasty")
    async def after(n: int) -> None:
        await asyncio.gather(saga.step(look, n), saga.step(look, n + 1))

    with pytest.raises(DriftError):
        testing.replay(after, history)


def test_it_works_inside_an_async_test_too() -> None:
    async def test() -> testing.TestRun:
        return testing.run(looking, 1)

    assert asyncio.run(test()).output == [1]


def test_step_failures_can_be_caught_by_the_saga() -> None:
    @saga.define(name="forgiving checkout")
    async def forgiving(order: Order) -> str:
        try:
            await saga.step(charge, order)
        except StepFailed as error:
            return f"{error.outcome} {error.error_type}"
        return "charged"

    assert testing.run(forgiving, ORDER, stubs={charge: Rejected("no")}).output == "rejected Rejected"


def test_a_lock_is_free_where_there_is_no_other_run() -> None:
    @saga.define(name="locking")
    async def locking(n: int) -> int:
        async with saga.lock("account", n):
            await saga.step(look, n)
        async with saga.lock("account", n):
            return await saga.step(look, n + 1)

    assert testing.run(locking, 1).state == "completed"


def test_a_child_is_played_with_its_parent() -> None:
    @saga.define(name="parent of a look")
    async def parent() -> list[int]:
        return await saga.child(looking, 1)

    run = testing.run(parent)
    assert (run.state, run.output) == ("completed", [1])


async def _no_saga(n: int) -> int:
    return n


@pytest.mark.parametrize(
    ("played", "said"),
    [
        (charge, r"^a saga is wanted here, and tests\.testing\.test_run\.charge is a step, which a test just calls$"),
        (_no_saga, r"^a saga is wanted here, not the function _no_saga; declare it with @saga\.define$"),
        (3, r"^a saga is wanted here, not int$"),
    ],
    ids=["step", "function", "number"],
)
def test_what_is_no_saga_is_refused(played: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        testing.run(played, 1)


@saga.define(name="run.approval", signals={"approved": int})
async def approval() -> int:
    return await saga.wait_signal("approved", int, timeout=timedelta(days=1))


def test_a_signal_that_the_saga_does_not_have_is_refused_as_in_production() -> None:
    """A name that is misspelt in a test went unheard, and the test saw a timeout go by."""
    assert testing.run(approval, signals=[("approved", 7)]).output == 7
    with pytest.raises(UsageError, match="its saga has no signal 'aproved'; it has approved"):
        testing.run(approval, signals=[("aproved", 7)])
    with pytest.raises(PayloadError, match="signal 'approved' is to carry int"):
        testing.run(approval, signals=[("approved", "seven")])
