"""`testing.replay`: recorded runs against today's code, and what is said about a difference."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from orchestrator import DriftError, UnknownSagaError, saga, testing
from orchestrator.testing.history import _lengths
from tests.testing.shop import charge, checkout, mail

Deploy = Callable[[Callable[..., Any]], None]


@pytest.fixture
def history() -> Any:
    """A checkout that waited a day and completed, as it comes out of a file."""
    run = testing.run(checkout, "o1", stubs={charge: "c1", mail: None})
    return json.loads(json.dumps(run.history))


@pytest.fixture
def deploy(monkeypatch: pytest.MonkeyPatch) -> Deploy:
    """Put another function in the place of the one that recorded."""
    return lambda function: monkeypatch.setattr(checkout, "function", function)


def drift_of(history: Any) -> list[str]:
    with pytest.raises(DriftError) as raised:
        testing.replay(history)
    return [line.strip() for line in str(raised.value).splitlines()]


def test_a_history_fits_the_code_that_recorded_it(history: Any) -> None:
    testing.replay(history)
    testing.replay(history, checkout)
    testing.replay(checkout, history)


def test_a_history_of_a_saga_that_is_not_here_needs_one(history: Any) -> None:
    elsewhere = {**history, "saga": "elsewhere.checkout"}
    with pytest.raises(UnknownSagaError, match=r"elsewhere\.checkout version 1, which run test-run needs"):
        testing.replay(elsewhere)
    testing.replay(elsewhere, checkout)


def test_code_that_goes_on_where_it_waited_is_told(history: Any, deploy: Deploy) -> None:
    async def impatient(order: str) -> str:
        paid = await saga.step(charge, order)
        await saga.step(mail, order)
        return paid

    deploy(impatient)
    lines = drift_of(history)
    assert "gives more than was recorded" in lines[0]
    assert lines[1:] == [
        'tests.testing.shop.charge#0 with {"order":"o1"}',
        "- (it waits here)",
        '+ tests.testing.shop.mail#0 with {"order":"o1"}',
    ]


def test_a_step_more_is_told(history: Any, deploy: Deploy) -> None:
    async def chatty(order: str) -> str:
        await saga.step(mail, f"welcome {order}")
        paid = await saga.step(charge, order)
        await saga.sleep(timedelta(days=1))
        await saga.step(mail, order)
        return paid

    deploy(chatty)
    lines = drift_of(history)
    assert "it now asks for 'tests.testing.shop.mail#0'" in lines[0]
    assert lines[-2:] == [
        '- tests.testing.shop.charge#0 with {"order":"o1"}',
        '+ tests.testing.shop.mail#0 with {"order":"welcome o1"}',
    ]


def test_a_change_behind_a_version_gate_fits(history: Any, deploy: Deploy) -> None:
    async def gated(order: str) -> str:
        if saga.version("welcome", 1, 2) == 2:
            await saga.step(mail, f"welcome {order}")
        paid = await saga.step(charge, order)
        await saga.sleep(timedelta(days=1))
        await saga.step(mail, order)
        return paid

    deploy(gated)
    testing.replay(history)


def test_code_that_raises_where_it_waited_is_told(history: Any, deploy: Deploy) -> None:
    async def broken(order: str) -> Any:
        paid: Any = await saga.step(charge, order)
        return paid.nothing_like_it

    deploy(broken)
    assert "its code raises AttributeError: 'str' object has no attribute" in drift_of(history)[0]


def test_of_a_long_journal_a_spread_of_prefixes_is_replayed() -> None:
    assert list(_lengths(0)) == []
    assert list(_lengths(3)) == [1, 2, 3]
    assert list(_lengths(200)) == list(range(1, 201))
    long = list(_lengths(10_001))
    assert len(long) <= 201 and long[-1] == 10_001 and long == sorted(set(long))


@saga.define(name="tests.testing.at_once")
async def at_once(order: str) -> list[str]:
    heard = []
    for _ in range(2):
        try:
            async with saga.lock("till", timeout=0):
                heard.append(await saga.wait_signal("news", str, timeout=0))
        except TimeoutError:
            heard.append("nothing")
        await saga.step(mail, order)
    return heard


def test_a_run_that_did_not_wait_at_all_fits_as_well() -> None:
    """A timer that is due at once fires in the next turn, and not in the one that set it."""
    run = testing.run(at_once, "o1", stubs={mail: None}, signals=[("news", "good")])
    assert run.output == ["good", "nothing"]
    testing.replay(json.loads(json.dumps(run.history)))


def test_a_run_that_was_told_something_before_its_start_fits_as_well(saga_environment: testing.Environment) -> None:
    """Until its start its code has not run, so that there is nothing that it could have asked for."""
    run = saga_environment.start(checkout, "o1", countdown=60)
    run.pause()
    run.resume()
    testing.replay(run.history)
    assert run.finish().state == "completed"
    testing.replay(run.history)


@saga.define(name="tests.testing.if_free")
async def if_free(order: str) -> None:
    async with saga.lock("till", timeout=0):
        await saga.step(mail, order)


def test_the_code_of_a_run_that_is_let_go_long_after_its_start_begins_then(
    saga_environment: testing.Environment,
) -> None:
    saga_environment.stub({mail: None})
    run = saga_environment.start(if_free, "o1", countdown=60)
    run.pause()
    saga_environment.advance(timedelta(minutes=5))
    run.resume()
    assert run.finish().state == "completed"
    testing.replay(run.history)
