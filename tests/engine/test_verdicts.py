"""What a step declares as non-retryable is said of its own errors alone."""

from __future__ import annotations

from datetime import timedelta

import pytest

from orchestrator import RetryPolicy, saga, step
from orchestrator.step import StepStopped, StepTimeout
from orchestrator.store.connection import Connection
from tests.engine.stage import Child, start, states

NEVER_AGAIN = RetryPolicy(timedelta(0), 1.0, timedelta(0), 1, non_retryable_error_types=(Exception,))
BOOK: list[str] = []


@step
def refund(how: str) -> None:
    BOOK.append("refund")


@step(compensate=refund, retry=NEVER_AGAIN)
def charge(how: str) -> str:
    if how == "its own error":
        raise ValueError("this card is not known")
    BOOK.append("charge")
    if how == "a timeout":
        raise StepTimeout("the step overran its start_to_close_timeout")  # in the midst of it
    if how == "an order to stop":
        raise StepStopped("the run does not want the result any more")  # by a heartbeat
    return "x" * 300_000


@saga.define(name="verdicts.pays")
async def pays(how: str) -> None:
    await saga.step(charge, how)


@pytest.mark.parametrize("how", ["a result that is too large", "a timeout", "an order to stop", "its own error"])
def test_what_is_not_an_error_of_its_own_leaves_a_step_in_doubt_whatever_it_declares(
    how: str, child: Child, connection: Connection
) -> None:
    """Its effect may be there, or is: rejected it would not be undone."""
    BOOK.clear()
    start(connection, pays, how)
    child.drain()
    if how == "its own error":
        assert (BOOK, states(connection)) == ([], {"run": "failed"})
    else:
        assert (BOOK, states(connection)) == (["charge", "refund"], {"run": "compensated"})


class Account:
    """Declares errors as a model of Django does."""

    class DoesNotExist(Exception):
        pass

    class Frozen(DoesNotExist):
        pass


class Order:
    class DoesNotExist(Exception):
        pass


@step(compensate=refund)
def debit(how: str) -> str:
    raise {"account": Account.DoesNotExist, "subclass": Account.Frozen, "order": Order.DoesNotExist}[how](how)


@saga.define(name="verdicts.debits")
async def debits(declared: str, whose: str) -> None:
    name = Account.DoesNotExist if declared == "class" else "DoesNotExist"
    policy = RetryPolicy(maximum_attempts=1, non_retryable_error_types=(name,))
    await saga.step(debit.with_options(retry=policy), whose)


@pytest.mark.parametrize(
    ("declared", "whose", "undone"),
    [
        ("class", "account", []),
        ("class", "subclass", []),
        ("class", "order", ["refund"]),
        ("name", "account", []),
        ("name", "subclass", []),
        ("name", "order", []),
    ],
)
def test_an_error_that_is_declared_within_another_class_is_known_as_non_retryable(
    declared: str, whose: str, undone: list[str], child: Child, connection: Connection
) -> None:
    """In doubt, a debit that was refused would be credited by its undo; one of another class says nothing."""
    BOOK.clear()
    start(connection, debits, declared, whose)
    child.drain()
    assert undone == BOOK
