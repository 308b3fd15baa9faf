"""What is declared wrongly is refused at import: in a run it would be taken for something else, or stop it for good."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group, shared_task
from sqlalchemy.ext.asyncio import AsyncSession

from orchestrator import saga, step
from orchestrator.errors import DefinitionError
from orchestrator.machine.policy import RetryPolicy
from orchestrator.saga.steps import asked_of


def pay(n: int) -> None: ...


async def paying(n: int) -> None: ...


def test_an_option_that_there_is_not_is_named_with_those_that_there_are() -> None:
    options: dict[str, Any] = {"timeout": 5}
    with pytest.raises(
        DefinitionError, match=r"^saga\.define of paying has no option timeout=; it has deadline, name, "
    ):
        saga.define(**options)(paying)
    with pytest.raises(
        DefinitionError, match=r"^step declared\.sound has no option timeout= for a call; it has .*queue, "
    ):
        sound.with_options(**options)


def test_a_step_is_no_saga() -> None:
    with pytest.raises(
        DefinitionError, match=r"^saga 'paying': tests\.machine\.test_declarations\.paying is a step already"
    ):
        saga.define(step(paying))


def test_a_saga_and_a_step_are_no_step() -> None:
    """Calling it, which a saga refuses, failed every attempt."""
    where = r"tests\.machine\.test_declarations\.paying"
    with pytest.raises(DefinitionError, match=rf"^step 'paying': {where} is a saga already; .* saga\.child\(paying, "):
        step(saga.define(paying))
    with pytest.raises(DefinitionError, match=rf"^step 'paying': {where} is a step already; one `@step` "):
        step(queue="fast")(step(paying))


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
        ("start_to_close_timeout", 30),
        ("heartbeat_timeout", 5),
        ("retry", 3),
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
        ("deadline", 3600),
        ("signals", ["approved"]),
        ("queue", "two\nlines"),
        ("version", 0),
        ("version", "2"),
    ],
)
def test_an_option_of_a_saga_that_makes_no_sense_is_refused(option: str, value: Any) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(DefinitionError, match=rf"saga paying: {option}"):
        saga.define(name="declared.paying", **options)(paying)


async def lies_in_async(session: AsyncSession, n: int) -> None: ...


def takes_nothing() -> None: ...


def takes_what_it_likes(conn, n: int) -> None: ...  # type: ignore[no-untyped-def]


@pytest.mark.parametrize("wrong", [pay, takes_nothing, lies_in_async])
def test_a_transactional_step_that_takes_no_connection_is_refused(wrong: Any) -> None:
    with pytest.raises(DefinitionError, match="hands it a Connection of SQLAlchemy, or a Session"):
        step(name="declared.transactional", transactional=True)(wrong)
    step(name="declared.transactional", transactional=True)(takes_what_it_likes)


def test_no_queue_is_said_as_celery_says_it() -> None:
    """Every reader of the options takes a queue for text: `saga doctor` could not sort None among the others."""
    declared = step(name="declared.queueless", queue=None)(pay)
    assert (declared.options.queue, sound.with_options(queue=None).options.queue) == ("", "")
    assert saga.define(name="declared.queueless", queue=None)(paying).options.queue == ""


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
        {"initial_interval": 1},
        {"maximum_interval": 60},
        {"non_retryable_error_types": "ValueError"},
        {"non_retryable_error_types": ValueError},
        {"non_retryable_error_types": (ValueError, 5)},
        {"non_retryable_error_types": (ValueError("no"),)},
        {"non_retryable_error_types": (int,)},
    ],
)
def test_a_retry_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DefinitionError, match="RetryPolicy"):
        RetryPolicy(**wrong)


@pytest.mark.parametrize("name", ["shop.errors.CardDeclined", "", "Card Declined"])
def test_a_name_that_no_error_can_have_is_refused(name: str) -> None:
    """It was never met, so that an error that says "certainly no effect" was tried again, and its step undone."""
    policy = RetryPolicy(non_retryable_error_types=(name,))
    with pytest.raises(DefinitionError, match="no class's name"):
        step(name="declared.refused", retry=policy)(pay)
    with pytest.raises(DefinitionError, match="no class's name"):
        sound.with_options(retry=policy)
    assert RetryPolicy.decode(policy.encode()).error_names == (name,)


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


# -- undoing with tasks of Celery's ------------------------------------------------------------------------------------
@shared_task(name="declared.give_back")
def give_back(n: int, result: Any) -> None: ...


@shared_task(name="declared.refund")
def refund(n: int, reason: str) -> None: ...


CANVASES: list[Any] = [
    chain(give_back.s(1, 2), refund.s("no")),
    group(give_back.s(1, 2), refund.s(1, "no")),
    chord([give_back.s(1, 2)], refund.s("no")),
    give_back.starmap([(1, 2)]),
    {"task": "celery.backend_cleanup"},
]


@pytest.mark.parametrize("undo", CANVASES, ids=lambda undo: str(undo["task"]))
def test_a_canvas_is_refused_as_an_undo_because_no_worker_would_ever_take_it(undo: Any) -> None:
    with pytest.raises(DefinitionError, match=r"compensate= takes one task, and celery\.\w+ is"):
        step(name="declared.undone", compensate=undo)(pay)
    with pytest.raises(DefinitionError, match="compensate="):
        sound.with_options(compensate=undo)


@pytest.mark.parametrize("option", ["countdown", "eta", "link", "link_error", "priority", "task_id"])
def test_an_option_of_an_undo_that_would_be_lost_is_refused_by_its_name(option: str) -> None:
    with pytest.raises(DefinitionError, match=f"not {option}"):
        sound.with_options(compensate=give_back.s(1, 2).set(**{option: 1}))


@pytest.mark.parametrize("by", [step(name="declared.undoes")(pay), give_back], ids=["a step", "a plain task"])
def test_an_undo_is_due_on_the_queue_of_its_signature(by: Any) -> None:
    args = (1,) if by is not give_back else (1, 2)
    signature = {"task": by.name, "args": args, "options": {"queue": "undos"}}
    armed = sound.with_options(compensate=signature).arm({"n": 1})
    assert armed is not None and armed.queue == "undos"


def test_a_plain_task_takes_the_parameters_of_the_step_that_it_undoes_and_no_others() -> None:
    armed = sound.with_options(compensate=give_back).arm({"n": 1})
    assert armed is not None and (armed.names, armed.result) == (("n",), True)
    with pytest.raises(DefinitionError, match=r"declared\.refund takes reason, which step declared\.sound does not"):
        sound.with_options(compensate=refund)


@step(name="declared.withdraw")
def withdraw(result: str) -> None: ...


def publish(result: str) -> None: ...


def test_an_undo_cannot_take_the_result_of_a_step_that_has_a_parameter_of_that_name() -> None:
    """It would get what the step returned, under the name of what it was given."""
    with pytest.raises(DefinitionError, match=r"step declared\.publish: .* rename that one"):
        step(name="declared.publish", compensate=withdraw)(publish)
    step(name="declared.publish", compensate=give_back.s(1, 2))(publish)


# -- names -------------------------------------------------------------------------------------------------------------
SCRIPT = """
from orchestrator import saga, step

@step
def charge() -> None: ...

@charge.probe
def find() -> None: ...

@saga.define
async def checkout() -> None: ...

print(charge.name, charge.probe_step.name, checkout.name)
"""


@pytest.mark.parametrize("how", [["shop.py"], ["-m", "shop"], ["-c", "import shop"]], ids=lambda how: " ".join(how))
def test_a_module_that_is_run_as_a_script_has_the_names_under_which_a_worker_imports_it(
    how: list[str], tmp_path: Path
) -> None:
    """Under __main__ it would start runs that no worker knows."""
    (tmp_path / "shop.py").write_text(SCRIPT)
    path = os.pathsep.join(sys.path)
    script = [sys.executable, *how]
    said = subprocess.run(script, cwd=tmp_path, env={"PYTHONPATH": path}, check=True, capture_output=True, text=True)
    assert said.stdout.split() == ["shop.charge", "shop.find", "shop.checkout"]
