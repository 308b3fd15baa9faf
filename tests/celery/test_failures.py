"""What a step failed with is its own error, with its own traceback, whatever Celery makes of it for others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Retry

from orchestrator import PayloadError, Rejected, step
from orchestrator.celery.runner import Runner
from tests.celery.conftest import Invoke


def _page(*_: Any) -> None:
    raise ConnectionError("nobody answers the pager")


def _exit(*_: Any) -> None:
    raise SystemExit(1)


class _Backend:
    def mark_as_failure(self, *_: Any, **__: Any) -> None:
        raise OSError("the result backend is gone")

    def process_cleanup(self) -> None: ...


class TornError(Exception):
    """Cannot be made again from its arguments, so that Celery tells of another one in its place."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


def _debit() -> None:
    raise Rejected("insufficient funds")


@pytest.mark.parametrize("tells", ["on_failure", "on_failure that exits", "the backend"])
def test_a_rejected_step_is_rejected_although_telling_of_it_fails(
    tells: str, app: Celery, invoke: Invoke, caplog: pytest.LogCaptureFixture
) -> None:
    """In doubt it would be tried again, and undone: a debit that never was would be credited."""
    handlers: Any = {"on_failure": {"on_failure": _page}, "on_failure that exits": {"on_failure": _exit}}
    step(name="failing.debit", **handlers.get(tells, {}))(_debit)
    if tells == "the backend":
        app.tasks["failing.debit"].backend = _Backend()
    failed = invoke("failing.debit")
    assert isinstance(failed.error, Rejected) and str(failed.error) == "insufficient funds"
    assert "step run:failing.debit#0 failed, and so did what is told of that" in caplog.text


def test_what_celery_has_formatted_is_not_formatted_again(invoke: Invoke) -> None:
    step(name="failing.debit")(_debit)
    trace = invoke("failing.debit").trace
    first, *_, last = trace.splitlines()
    assert (first, last) == (
        "Traceback (most recent call last):",
        "orchestrator.errors.Rejected: insufficient funds",
    )
    assert "in _debit" in trace and "celery/app/trace.py" not in trace


def test_of_an_error_that_celery_replaces_its_own_traceback_is_told(invoke: Invoke) -> None:
    @step(name="failing.tears")
    def tears() -> None:
        raise TornError("torn", "here")

    failed = invoke("failing.tears")
    assert (type(failed.error), failed.trace) == (TornError, "")


def test_a_task_that_asks_to_be_tried_again_and_goes_on_is_tried_again(app: Celery, invoke: Invoke) -> None:
    """In Celery it runs again, whether it returns after that or not; in a saga its first result was the last."""

    @app.task(name="failing.polls", bind=True, max_retries=None, shared=False)
    def polls(self: Any, *_: Any) -> str:
        self.retry(countdown=7, exc=ConnectionError("not yet"), throw=False)
        return "went on"

    asked = invoke("failing.polls")
    assert isinstance(asked.error, ConnectionError) and asked.pause == 7


def test_what_a_task_asked_for_does_not_count_for_the_next_attempt(app: Celery, invoke: Invoke) -> None:
    asks = [True, False]

    @app.task(name="failing.once", bind=True, shared=False)
    def once(self: Any, *_: Any) -> str:
        if asks.pop(0):
            self.retry(throw=False)
        return "done"

    assert isinstance(invoke("failing.once").error, Retry)
    ended = invoke("failing.once")
    assert (ended.error, ended.result) == (None, "done")


@pytest.mark.parametrize("value", [object(), "a\0b", "x" * 300_000, "kept"], ids=range(4))
def test_a_task_whose_result_nobody_wants_need_not_return_what_can_be_stored(
    value: Any, app: Celery, invoke: Invoke
) -> None:
    """In Celery it succeeds; in a saga it was done again until its attempts were used up."""

    @app.task(name="failing.mails", ignore_result=True, shared=False)
    def mails(*_: Any) -> Any:
        return value

    done = invoke("failing.mails")
    assert (done.error, done.result) == (None, value if value == "kept" else None)


def test_a_result_that_cannot_be_stored_fails_where_somebody_may_want_it(app: Celery, invoke: Invoke) -> None:
    @app.task(name="failing.asks", shared=False)
    def asks(*_: Any) -> Any:
        return object()

    assert isinstance(invoke("failing.asks").error, PayloadError)


@pytest.mark.parametrize(("told", "most"), [(None, 0), (SimpleNamespace(ended=1.0), 1000)], ids=["no events", "events"])
def test_attempts_that_nobody_finishes_are_forgotten(
    told: Any, most: int, invoke: Invoke, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has lost the fence reports to nobody; each such attempt was kept for as long as the process lived."""
    monkeypatch.setattr(runner._events, "begin", lambda taken: told)
    monkeypatch.setattr(runner._events, "leave", lambda attempt: None)
    step(name="failing.ends")(lambda: None)
    for _ in range(1500):
        invoke("failing.ends")
    assert len(runner._attempts) == most
