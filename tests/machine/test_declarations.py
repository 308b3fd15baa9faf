"""What is declared wrongly is refused at import: in a run it would be taken for something else, or stop it for good."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from orchestrator import saga, step
from orchestrator.errors import DefinitionError
from orchestrator.machine.policy import RetryPolicy
from orchestrator.saga.steps import asked_of


def pay(n: int) -> None: ...


async def paying(n: int) -> None: ...


def found(n: int) -> bool | None: ...


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("priority", 10),
        ("priority", -1),
        ("priority", True),
        ("priority", 1.0),
        ("priority", None),
        ("on_unknown", "Park"),
        ("on_unknown", "undo"),
        ("effect", "pivot"),
        ("start_to_close_timeout", timedelta(0)),
        ("start_to_close_timeout", timedelta.max),
        ("heartbeat_timeout", timedelta(0)),
        ("heartbeat_timeout", timedelta(seconds=-1)),
    ],
)
def test_an_option_of_a_step_that_makes_no_sense_is_refused(option: str, value: Any) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(DefinitionError, match=rf"step declared\.pay: {option}"):
        step(name="declared.pay", **options)(pay)
    with pytest.raises(DefinitionError, match=option):
        sound.with_options(**options)


sound = step(name="declared.sound")(pay)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("priority", 10),
        ("priority", None),
        ("on_code_error", "Park"),
        ("deadline", timedelta(0)),
        ("deadline", timedelta.max),
        ("queue", "two\nlines"),
        ("version", 0),
    ],
)
def test_an_option_of_a_saga_that_makes_no_sense_is_refused(option: str, value: Any) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(DefinitionError, match=rf"saga paying: {option}"):
        saga.define(name="declared.paying", **options)(paying)


@pytest.mark.parametrize(
    "wrong",
    [
        {"maximum_attempts": 0},
        {"maximum_attempts": float("inf")},
        {"maximum_attempts": 2.5},
        {"maximum_attempts": True},
        {"backoff_coefficient": 0.5},
        {"backoff_coefficient": float("inf")},
        {"backoff_coefficient": float("nan")},
        {"initial_interval": timedelta(seconds=-1)},
        {"initial_interval": timedelta(minutes=2)},
    ],
)
def test_a_retry_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DefinitionError, match="RetryPolicy"):
        RetryPolicy(**wrong)


@pytest.mark.parametrize("longest", [timedelta.max, timedelta(days=400_000)])
def test_a_pause_without_a_bound_is_read_back_from_a_journal(longest: timedelta) -> None:
    policy = RetryPolicy(maximum_interval=longest)
    assert RetryPolicy.decode(policy.encode()).delay(3) == policy.delay(3)
    assert RetryPolicy(timedelta.max, 1.0, timedelta.max).encode()[0] == 1e9


@pytest.mark.parametrize("name", ["two\nlines", "a\0b", "\ud800", "x" * 501])
def test_a_name_that_cannot_be_stored_is_refused(name: str) -> None:
    with pytest.raises(DefinitionError, match="name"):
        step(name=name)(pay)
    with pytest.raises(DefinitionError, match="name"):
        saga.define(name=name)(paying)


def test_who_says_that_a_probe_decides_has_to_declare_one() -> None:
    """It may come after the step, so that only the first use can tell."""
    lonely = step(name="declared.lonely", on_unknown="probe")(pay)
    with pytest.raises(DefinitionError, match="needs a probe"):
        asked_of(lonely, {}, "celery", "")
    lonely.probe(found)
    assert asked_of(lonely, {}, "celery", "").on_unknown == "probe"
