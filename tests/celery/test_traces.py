"""The traceback of a failed step, which Celery has formatted already."""

from __future__ import annotations

from orchestrator import step
from tests.celery.conftest import Invoke


class TornError(Exception):
    """Cannot be made again from its arguments, so that Celery tells of another one in its place."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


def test_what_celery_has_formatted_is_not_formatted_again(invoke: Invoke) -> None:
    @step(name="traced.fails")
    def fails() -> None:
        raise ValueError("no such account")

    failed = invoke("traced.fails")
    first, *_, last = failed.trace.splitlines()
    assert (first, last) == ("Traceback (most recent call last):", "ValueError: no such account")
    assert "in fails" in failed.trace and "celery/app/trace.py" not in failed.trace


def test_of_an_error_that_celery_replaces_its_own_traceback_is_told(invoke: Invoke) -> None:
    @step(name="traced.tears")
    def tears() -> None:
        raise TornError("torn", "here")

    failed = invoke("traced.tears")
    assert (type(failed.error), failed.trace) == (TornError, "")
