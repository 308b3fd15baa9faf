"""Observers hear of what was committed, in the order of the journal."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator import Effect, Rejected, RetryPolicy, saga, step, telemetry
from orchestrator.store.connection import Connection
from tests.engine.stage import Child, start


@step
def forget(thing: str) -> None:
    """Take it back."""


@step(compensate=forget)
def remember(thing: str) -> str:
    return thing


@step(effect=Effect.NONE, retry=RetryPolicy(maximum_attempts=1))
def refuse(thing: str) -> None:
    raise ValueError(thing)


@saga.define
async def remember_and_refuse(thing: str) -> None:
    await saga.step(remember, thing)
    await saga.step(refuse, thing)


@pytest.fixture
def heard() -> Iterator[list[telemetry.Event]]:
    events: list[telemetry.Event] = []
    unsubscribe = telemetry.subscribe(events.append)
    yield events
    unsubscribe()


def test_a_run_that_goes_back_is_told_step_by_step(
    child: Child, connection: Connection, heard: list[telemetry.Event]
) -> None:
    start(connection, remember_and_refuse, "x")
    child.drain()
    assert [type(event).__name__ for event in heard] == [
        "RunStarted",
        "StepFinished",
        "AttemptFailed",
        "StepFinished",
        "UndoFinished",
        "RunFinished",
    ]
    assert {event.run_id for event in heard} == {"run"}
    ended = heard[-1]
    assert isinstance(ended, telemetry.RunFinished)
    assert (ended.state, ended.error_type) == ("compensated", "StepFailed")


@step
def forget_never(thing: str) -> None:
    raise Rejected(f"{thing} is not forgotten")


@step(compensate=forget_never)
def remember_for_ever(thing: str) -> str:
    return thing


@saga.define
async def goes_wrong(thing: str) -> None:
    await saga.step(remember_for_ever, thing)
    if thing == "a typo":
        raise NameError(thing)
    await saga.step(refuse, thing)


def test_what_waits_for_a_person_is_in_the_log_without_a_payload(
    child: Child, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    start(connection, goes_wrong, "secret", run_id="undone")
    child.drain()
    start(connection, goes_wrong, "a typo", run_id="mistaken")
    child.drain()
    key = f"{remember_for_ever.name}#0"
    told = "and waits for a person; `saga explain {0}` says why, and what helps"
    assert [line.getMessage() for line in caplog.records if "is parked" in line.getMessage()] == [
        f"run undone of {goes_wrong.name} is parked (the undo of {key}) {told.format('undone')}",
        f"run mistaken of {goes_wrong.name} is parked (as a whole, code) {told.format('mistaken')}",
    ]
