"""The environment: the real engine on a real Postgres, in the test's own process, its time skipped."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from orchestrator import DriftError, Effect, Rejected, SagaFailed, UsageError, saga, step, testing
from orchestrator.machine.journal import Attempted, Operated
from orchestrator.store import testbed
from orchestrator.testing import Environment
from tests.testing.shop import (
    approval,
    book,
    booking,
    charge,
    checkout,
    family,
    fickle,
    limited,
    linked,
    mail,
    names,
    parcel,
    parent,
    refund,
    world,
)


@pytest.fixture
def env(saga_environment: Environment) -> Environment:
    world.reset()
    return saga_environment


@pytest.fixture
def bookings(env: Environment) -> Iterator[list[int]]:
    """What is booked, as a list that is read anew each time."""
    engine = create_engine(env.settings.sqlalchemy_url)

    class Bookings(list[int]):
        def __eq__(self, other: object) -> bool:
            with engine.connect() as connection:
                return connection.execute(text("SELECT n FROM bookings")).scalars().all() == other

        __hash__ = None  # type: ignore[assignment]

    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE bookings (n integer)"))
    yield Bookings()
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE bookings"))
    engine.dispose()


# -- time --------------------------------------------------------------------------------------------------------------
def test_a_day_passes_at_once(env: Environment) -> None:
    began = monotonic()
    run = env.run(checkout, "o1")
    assert (run.state, run.get()) == ("completed", "charge of o1")
    assert timedelta(days=1) <= run.duration < timedelta(days=1, minutes=5)
    assert monotonic() - began < 60


def test_time_stands_still_until_the_test_lets_it_pass(env: Environment) -> None:
    run = env.start(checkout, "o1")
    assert (run.state, world.mails) == ("running", [])
    env.advance(timedelta(hours=23))
    assert (run.state, world.mails) == ("running", [])
    env.advance(timedelta(hours=2))
    assert (run.state, world.mails) == ("completed", ["o1"])


def test_advancing_takes_as_long_as_it_says(env: Environment) -> None:
    before = env.now
    env.start(checkout, "o1")
    env.advance(timedelta(days=2))
    assert timedelta(days=2) <= env.now - before < timedelta(days=2, minutes=5)


def test_what_steps_take_is_part_of_the_time_that_passes(env: Environment) -> None:
    @step(name="advance.slow", effect=Effect.NONE)
    def slow() -> None: ...

    @saga.define(name="advance.sleepy")
    async def sleepy() -> None:
        await saga.sleep(timedelta(minutes=10))
        await saga.step(slow)
        await saga.sleep(timedelta(minutes=30))

    env.stub({slow: testing.After(timedelta(minutes=4))})
    run = env.start(sleepy)
    env.advance(timedelta(minutes=42))
    assert run.state == "running"
    env.advance(timedelta(minutes=3))
    assert run.state == "completed"


@pytest.mark.parametrize("said", [{"value": "charge of o1"}, {"no_effect": True}], ids=["a result", "no effect"])
def test_what_is_said_of_a_step_is_not_taken_for_its_undo(env: Environment, said: dict[str, Any]) -> None:
    """Else a person who knows that the charge happened would have it on record that it was refunded."""
    env.fail(mail, "rejected")
    env.fail(refund, "rejected")
    run = env.run(checkout, "o1")
    [parked] = run.parked
    with pytest.raises(UsageError, match=r"the undo of .*charge#0 is parked, not the step"):
        run.resolve(parked["key"], **said)
    assert run.state == "parked"
    run.resolve(parked["key"], by="ann", reason="refunded at the counter")
    assert run.state == "compensated"


def test_an_undo_is_tried_for_a_day_and_then_waits_for_a_person(env: Environment) -> None:
    env.fail(mail, "rejected")
    env.fail(refund, "unknown", effect=False)
    run = env.run(checkout, "o1")
    assert (run.state, world.charges) == ("parked", {"o1": "charged"})
    assert run.duration > timedelta(days=1)
    [parked] = run.parked
    assert "undo failed" in parked["why"]
    with pytest.raises(SagaFailed, match="its undo failed"):
        run.get()
    env.heal()
    run.retry(parked["key"], by="ann", reason="the provider is back")
    assert (run.state, world.charges) == ("compensated", {"o1": "refunded"})
    assert [e.by for e in run.entries if isinstance(e, Operated)] == ["ann"]


def test_a_parked_run_can_be_skipped_and_resolved(env: Environment) -> None:
    env.fail(mail, "rejected")
    env.fail(refund, "rejected")
    run = env.run(checkout, "o1")
    run.skip(run.parked[0]["key"])
    assert (run.state, [item["key"] for item in run.left]) == ("failed", ["tests.testing.shop.charge#0"])
    other = env.run(checkout, "o2")
    other.resolve(other.parked[0]["key"])
    assert (other.state, other.left) == ("compensated", [])


def test_a_stub_that_takes_longer_than_its_timeout_is_in_doubt_after_its_effect(env: Environment) -> None:
    env.stub({charge: testing.After(timedelta(minutes=1), charge.function)})
    run = env.run(checkout, "o1")
    assert (run.state, world.money["ann"]) == ("compensated", 100)
    assert names(run.calls)[-1] == ("refund", "undo")
    assert run.duration > timedelta(minutes=2)


# -- failures ----------------------------------------------------------------------------------------------------------
def test_a_rejected_step_is_not_undone(env: Environment) -> None:
    env.fail(charge, "rejected")
    run = env.run(checkout, "o1")
    assert (run.state, run.calls, run.left) == ("failed", [], [])


def test_a_step_whose_answer_is_lost_is_undone_without_its_result(env: Environment) -> None:
    env.fail(charge, "unknown")
    run = env.run(checkout, "o1")
    assert run.state == "compensated"
    assert run.calls[-1].args == ("o1", None)
    assert world.money["ann"] == 100


def test_an_answer_lost_once_is_tried_again(env: Environment) -> None:
    env.fail(charge, "unknown", attempt=1)
    assert env.run(checkout, "o1").state == "completed"
    assert names(env.runs[0].calls) == [("charge", "do"), ("charge", "do"), ("mail", "do")]


@pytest.mark.parametrize(("at", "times"), [("before", 1), ("after", 2), ("committed", 1)])
def test_a_worker_that_dies_is_followed_by_another_one(
    env: Environment, at: testing.environment.At, times: int
) -> None:
    env.fail(charge, "crash", at=at)
    run = env.run(checkout, "o1")
    assert (run.state, world.money["ann"]) == ("completed", 90)
    assert names(run.calls) == [("charge", "do")] * times + [("mail", "do")]
    lost = [entry.error["type"] for entry in run.entries if isinstance(entry, Attempted)]
    assert lost == ([] if at == "committed" else ["WorkerLost"])


def test_an_undo_survives_a_crash_after_its_effect(env: Environment) -> None:
    env.fail(mail, "rejected")
    env.fail(refund, "crash", at="after")
    run = env.run(checkout, "o1")
    assert (run.state, world.money["ann"]) == ("compensated", 100)
    assert names(run.calls)[-2:] == [("refund", "undo")] * 2


def test_a_step_that_kills_its_worker_each_time_comes_to_an_end(env: Environment) -> None:
    env.fail(charge, "crash", at="after", attempt=testing.faults.EVERY)
    run = env.run(checkout, "o1")
    assert (run.state, world.money["ann"]) == ("compensated", 100)


def test_what_a_transactional_step_writes_goes_with_its_worker(env: Environment, bookings: list[int]) -> None:
    env.fail(book, "crash", at="after")
    run = env.run(booking, 7)
    assert run.state == "completed"
    assert names(run.calls) == [("book", "do"), ("book", "do"), ("mail", "do")]
    assert bookings == [7]


@pytest.mark.parametrize("effect", [True, False])
def test_a_commit_without_an_answer_is_looked_up(env: Environment, bookings: list[int], effect: bool) -> None:
    env.fail(book, "unknown", effect=effect, attempt=1)
    run = env.run(booking, 7)
    assert run.state == "completed"
    assert names(run.calls).count(("book", "do")) == (1 if effect else 2)
    assert bookings == [7]


def test_a_transactional_step_that_is_rejected_writes_nothing(env: Environment, bookings: list[int]) -> None:
    env.fail(book, "rejected")
    assert env.run(booking, 7).state == "failed"
    assert bookings == []


def test_a_transactional_step_is_undone(env: Environment, bookings: list[int]) -> None:
    env.fail(mail, "rejected")
    assert env.run(booking, 7).state == "compensated"
    assert bookings == []


def test_a_failure_that_there_is_not_is_refused(env: Environment) -> None:
    with pytest.raises(UsageError, match="rejected, unknown, and crash"):
        env.fail(charge, "explode")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="keyed by steps"):
        env.fail(3, "rejected")
    with pytest.raises(UsageError, match=rf"did you mean '{charge.name}'"):
        env.fail(f"{charge.name}d", "rejected")


# -- runs --------------------------------------------------------------------------------------------------------------
def test_stubs_play_steps(env: Environment) -> None:
    env.stub({charge: "c1", mail: [ConnectionError("down"), None]})
    run = env.run(checkout, "o1")
    assert (run.output, world.charges) == ("c1", {})
    env.stub({charge: Rejected("no")})
    assert env.run(checkout, "o2").state == "failed"


def test_a_signal_is_waited_for(env: Environment) -> None:
    run = env.start(approval, "o1")
    assert run.state == "running"
    run.signal("approved", "ann")
    assert (run.state, run.output) == ("completed", "ann")


def test_a_signal_that_does_not_come_in_time_is_a_timeout(env: Environment) -> None:
    run = env.run(approval, "o1")
    assert run.state == "compensated"
    assert run.error is not None and run.error["type"] == "TimeoutError"
    assert run.duration >= timedelta(days=1)


def test_a_cancelled_run_is_undone(env: Environment) -> None:
    run = env.start(checkout, "o1")
    run.cancel("the customer called")
    assert (run.state, world.money["ann"]) == ("cancelled", 100)


def test_a_terminated_run_says_what_is_left(env: Environment) -> None:
    run = env.start(checkout, "o1").terminate()
    assert (run.state, [item["key"] for item in run.left]) == ("terminated", ["tests.testing.shop.charge#0"])


def test_a_saga_started_by_a_step_runs_here_as_well(env: Environment) -> None:
    run = env.run(parent, "o1")
    started = env.handle(run.get())
    assert (started.saga, started.state) == (checkout, "completed")
    assert [each.id for each in env.runs] == [run.id, started.id]


def test_a_paused_run_waits_until_it_is_resumed(env: Environment) -> None:
    run = env.start(checkout, "o1").pause()
    env.advance(timedelta(days=1, hours=1))
    assert (run.state, world.mails) == ("paused", [])
    assert run.resume().state == "completed"


def test_an_async_test_may_use_it(env: Environment) -> None:
    async def use() -> str:
        return env.run(checkout, "o1").state

    assert asyncio.run(use()) == "completed"


def test_runs_wait_side_by_side(env: Environment) -> None:
    runs = [env.start(checkout, f"o{n}", task_id=f"order-{n}") for n in range(10)]
    assert {run.state for run in runs} == {"running"}
    env.finish()
    assert {run.state for run in runs} == {"completed"}
    assert len({run.duration.days for run in runs}) == 1


def test_a_rate_limit_is_waited_for(env: Environment) -> None:
    runs = [env.start(limited, f"o{n}") for n in range(4)]
    assert [run.state for run in runs].count("completed") == 1
    env.finish()
    assert {run.state for run in runs} == {"completed"}
    assert timedelta(minutes=2.9) < max(run.duration for run in runs) < timedelta(minutes=4)


def test_a_lock_is_waited_for(env: Environment) -> None:
    runs = [env.start(parcel, f"o{n}") for n in range(3)]
    assert len(world.charges) == 1
    env.finish()
    assert {run.state for run in runs} == {"completed"}
    longest = max(run.duration for run in runs)  # that of the last one, which started a little after the first
    assert timedelta(hours=2, minutes=59) < longest < timedelta(hours=3, minutes=5)


def test_children_are_runs_of_the_environment_and_undone_with_their_parent(env: Environment) -> None:
    run = env.start(family, "o1")
    env.advance(timedelta(hours=1.5))
    run.cancel()
    env.finish()
    assert [each.state for each in env.runs] == ["cancelled", "compensated", "compensated"]
    assert world.money["ann"] == 100


def test_a_run_whose_child_is_parked_says_which_and_why(env: Environment) -> None:
    @saga.define(name="kit.mistaken")
    async def mistaken() -> None:
        raise KeyError("typo")

    @saga.define(name="kit.parent of a mistake")
    async def parent_of_a_mistake() -> None:
        await saga.child(mistaken)

    run = env.run(parent_of_a_mistake, task_id="p")
    assert run.state == "running"
    with pytest.raises(SagaFailed, match=r"is running: p/kit\.mistaken#0 is parked: .*typo"):
        run.get()


def test_code_that_breaks_the_one_rule_is_parked_as_drift(env: Environment) -> None:
    run = env.run(fickle, "o1")
    assert run.state == "parked"
    assert "drifted" in run.parked[0]["why"]


def test_a_history_can_be_kept_and_replayed(env: Environment) -> None:
    history = env.run(checkout, "o1").history
    testing.replay(history)
    testing.replay(history, checkout)


def test_the_history_of_a_later_link_can_be_replayed(env: Environment) -> None:
    run = env.run(linked, 2)
    assert run.output == 0
    assert run.history["link"] == 2
    testing.replay(run.history)
    with pytest.raises(DriftError, match="other arguments"):
        testing.replay({**run.history, "link": 1})  # its ids are derived from the link


def test_a_reset_forgets_runs_stubs_and_faults(env: Environment) -> None:
    env.fail(charge, "rejected")
    env.stub({mail: Rejected("no")})
    env.run(checkout, "o1", task_id="order-1")
    before = env.now
    env.reset()
    assert env.runs == []
    assert env.run(checkout, "o1", task_id="order-1").state == "completed"
    assert env.now >= before


def test_sagas_are_given_back_to_their_app(env: Environment) -> None:
    env.start(checkout, "o1")
    assert checkout.starter is env.client
    env.release()
    assert checkout.starter is not env.client


# -- databases ---------------------------------------------------------------------------------------------------------
def test_a_database_with_runs_of_others_is_refused(env: Environment, database_url: str) -> None:
    with testbed.open_connection(database_url, name="test") as connection:
        connection.execute(
            "INSERT INTO orchestrator.runs (id, saga, version, state, input, root_id, queue, started_at) "
            "VALUES ('r', 's', 1, 'running', '{}', 'r', 'q', now())"
        )
    with pytest.raises(UsageError, match="a database of its own"):
        Environment(database_url)
