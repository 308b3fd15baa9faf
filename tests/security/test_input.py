"""Forged and oversized input is refused where it comes in, and never leaves a run that cannot end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from orchestrator import Effect, PayloadError, Rejected, UnknownRunError, UsageError, saga, step
from orchestrator.client import Client
from orchestrator.store.connection import Connection
from tests.engine.stage import QUEUE, Child
from tests.security.conftest import count

UNSTORABLE = {"NUL": "a\0b", "a lone surrogate": "a\ud800b"}
NAMES = {**UNSTORABLE, "a line break": "a\nb", "a reversed line": "a\u202eb", "too long": "k" * 501}


@step(effect=Effect.NONE)
def echo(text: str) -> str:
    return text


@step(effect=Effect.NONE)
def answer(which: str) -> Any:
    match which:
        case "nothing that is data":
            return object()
        case "too large":
            return "x" * 300_000
        case "too deep":
            return _nested(200)
        case "a long number":
            return 10**5000
        case "an error with NUL":
            raise Rejected("a\0b")
        case "an error with a surrogate":
            raise Rejected("a\ud800")
        case "a huge error":
            raise Rejected("x" * 5_000_000)
    return UNSTORABLE.get(which, which)


def _nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@saga.define(name="security.answers")
async def answers(which: str) -> Any:
    return await saga.step(answer, which)


@saga.define(name="security.says")
async def says(text: str) -> str:
    return text


@saga.define(name="security.sleeps")
async def sleeps(text: str) -> str:
    await saga.sleep(timedelta(hours=1))
    return text


@saga.define(name="security.badly")
async def badly_named(what: str, which: str) -> Any:
    """Name something in saga code by what cannot be a name."""
    name = NAMES[which]
    if what == "key":
        return await saga.step(echo.with_options(key=name), "x")
    if what == "queue":
        return await saga.step(echo.with_options(queue=name), "x")
    return await saga.once(name, lambda: 1)


@step
def forget(text: str) -> None: ...


@step(compensate=forget)
def remember(text: str) -> str:
    return text


TEXTS = {**UNSTORABLE, "too large": "x" * 300_000}


@saga.define(name="security.signs")
async def signs(how: str, which: str) -> Any:
    """Pass what cannot be stored in a signature, or in that of a compensation; go on if that is refused."""
    text = TEXTS[which]
    try:
        if how == "step":
            return await saga.step(remember.s(text))
        return await saga.step(remember.with_options(compensate=forget.s(text)), "x")
    except PayloadError as refused:
        return str(refused).partition(" at ")[0].partition(" takes ")[0]


FAR = datetime.max.replace(tzinfo=UTC)
OPTIONS: dict[str, list[Any]] = {
    "task_id": [*NAMES.values(), ""],
    "queue": [*NAMES.values(), 5, ["celery"]],
    "countdown": [float("inf"), float("nan"), 1e300, 10**400, "soon", [1]],
    "eta": ["rubbish", "2026-01-01", 5],
    "priority": [True, -1, 10, 1.5, "3", None.__class__],
    "deadline": [float("inf"), float("nan"), timedelta.max, "soon", True],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_start_option_that_cannot_be_is_refused(option: str, client: Client, connection: Connection) -> None:
    for value in OPTIONS[option]:
        with pytest.raises(UsageError):
            client.start(says, ("x",), {}, {option: value})
    assert count(connection) == count(connection, "work") == 0


@pytest.mark.parametrize("text", [*UNSTORABLE.values(), "x" * 300_000], ids=[*UNSTORABLE, "too large"])
def test_an_input_that_cannot_be_stored_starts_nothing(text: str, client: Client, connection: Connection) -> None:
    with pytest.raises(PayloadError) as refused:
        client.start(says, (text,), {}, {})
    assert text not in str(refused.value)
    assert count(connection) == 0


def test_an_id_that_no_run_can_have_is_unknown_and_disturbs_nobody(
    client: Client, new_child: Callable[[], Child]
) -> None:
    """Callers of a process share one statement: what one of them asks for must not fail the others."""
    result = client.start(says, ("x",), {}, {"queue": QUEUE})
    told: list[Any] = []
    waiting = threading.Thread(target=lambda: told.append(result.get(timeout=30)))
    waiting.start()
    for name in [*NAMES.values(), ""]:
        handle = client.handle(says, name)
        with pytest.raises(UnknownRunError):
            handle.get(timeout=5)
        for ask in (lambda h=handle: h.status, handle.cancel, handle.terminate, handle.ready):
            with pytest.raises(UnknownRunError):
                ask()
    new_child().drain()
    waiting.join(30)
    assert told == ["x"]


@pytest.mark.parametrize("text", [*UNSTORABLE.values(), "x" * 300_000], ids=[*UNSTORABLE, "too large"])
def test_an_order_that_cannot_be_stored_is_refused(
    text: str, client: Client, new_child: Callable[[], Child], connection: Connection
) -> None:
    result = client.start(sleeps, ("x",), {}, {"queue": QUEUE})
    new_child().drain()
    for order in (result.cancel, result.terminate):
        for given in ({"reason": text}, {"by": text}):
            with pytest.raises(PayloadError):
                order(**given)
    assert count(connection, "arrivals") == 0
    assert result.status == "running"


@pytest.mark.parametrize("what", ["key", "queue", "once"])
def test_a_name_in_saga_code_that_cannot_be_one_parks_the_run(
    what: str, client: Client, new_child: Callable[[], Child]
) -> None:
    """As any error of saga code does; tried again for ever, it would be a run that cannot end."""
    results = [client.start(badly_named, (what, which), {}, {"queue": QUEUE}) for which in NAMES]
    child = new_child()
    child.drain()
    for result in results:
        assert result.status == "parked"
        (parked,) = result.parked
        assert "printable" in parked["why"]  # type: ignore[index,call-overload,operator]
        result.cancel()
    child.drain()
    assert {result.status for result in results} == {"cancelled"}


@pytest.mark.parametrize("how", ["step", "undo"])
def test_what_a_signature_holds_is_refused_where_it_cannot_be_stored(
    how: str, client: Client, new_child: Callable[[], Child]
) -> None:
    """It ended the drain, and with it what other runs had in hand there."""
    results = [client.start(signs, (how, which), {}, {"queue": QUEUE}) for which in TEXTS]
    new_child().drain()
    said = "the arguments of tests.security.test_input.remember"
    if how == "undo":
        said = f"{said.replace('remember', 'forget')}, which undoes tests.security.test_input.remember"
    assert [result.get(timeout=0) for result in results] == [said] * len(TEXTS)


def test_a_result_or_an_error_that_cannot_be_stored_is_a_failed_step(
    client: Client, new_child: Callable[[], Child], connection: Connection
) -> None:
    whiches = [*UNSTORABLE, "nothing that is data", "too large", "too deep", "a long number", "an error with NUL",
               "an error with a surrogate", "a huge error"]  # fmt: skip
    results = {which: client.start(answers, (which,), {}, {"queue": QUEUE, "task_id": which}) for which in whiches}
    child = new_child()
    child.drain()
    connection.execute("UPDATE orchestrator.work SET due_at = orchestrator.now()")
    for _ in range(6):  # every attempt but those that were rejected
        child.drain()
        connection.execute("UPDATE orchestrator.work SET due_at = orchestrator.now()")
    assert {which: result.status for which, result in results.items()} == dict.fromkeys(whiches, "failed")
    largest = connection.execute("SELECT max(length(entries::text)) FROM orchestrator.journal").fetchone()
    assert largest is not None and largest[0] < 64 * 1024
