"""The error tree, and what is kept of an exception."""

from __future__ import annotations

import copy
import pickle

import pytest

from orchestrator import errors
from orchestrator.codec import check, describe_exception

ALL = [
    errors.Rejected("no"),
    errors.StepFailed("m", run_id="r", key="k", outcome="rejected", error={"type": "ValueError", "message": "x"}),
    errors.SagaFailed("m", run_id="r", state="compensated", left=("mail",)),
    errors.SagaCancelled("m", run_id="r", state="cancelled"),
    errors.PayloadError("m"),
]


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
def test_errors_survive_pickle_and_copy(error: errors.OrchestratorError) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert twin.args == error.args
        assert vars(twin) == vars(error)


def test_every_public_error_is_in_the_tree_and_in_its_drawing() -> None:
    names = [name for name in errors.__all__ if name[0].isupper() and name != "Outcome"]
    for name in names:
        assert issubclass(getattr(errors, name), errors.OrchestratorError)
        assert name in (errors.__doc__ or "")


def test_the_type_of_the_underlying_error_is_at_hand() -> None:
    assert errors.StepFailed("m", error={"type": "Declined"}).error_type == "Declined"
    assert errors.StepFailed("m").error_type == ""


class HostileError(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__


class RecursiveError(Exception):
    def __str__(self) -> str:
        return str(self)


@pytest.mark.parametrize(
    "error",
    [
        HostileError("x"),
        RecursiveError(),
        ValueError("a\0b\ud800"),
        ValueError("é" * 10**6),
        SystemExit(1),
        KeyboardInterrupt(),
        ExceptionGroup("many", [HostileError(), ValueError("\0")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_exception_can_be_described_and_stored(error: BaseException) -> None:
    try:
        raise error
    except BaseException as caught:
        described = describe_exception(caught)
    check(described)
    assert len(described["message"].encode()) <= 8 * 1024
    assert len(described["traceback"].encode()) <= 16 * 1024
    assert described["mro"][-1] == "BaseException"


def test_the_description_names_type_message_and_place() -> None:
    try:
        raise errors.Rejected("insufficient funds")
    except errors.Rejected as caught:
        described = describe_exception(caught)
    assert described["type"] == "Rejected"
    assert described["module"] == "orchestrator.errors"
    assert described["message"] == "insufficient funds"
    assert described["mro"] == ["Rejected", "OrchestratorError", "Exception", "BaseException"]
    assert "test_the_description_names" in described["traceback"]


def test_the_end_of_a_long_traceback_is_kept() -> None:
    described = describe_exception(ValueError("x" * 20_000 + "the end"))
    assert described["traceback"].endswith("the end\n")
    assert described["message"].endswith("...")


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def because(error: Exception, cause: Exception) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_the_message_of_a_group_tells_people_the_exceptions_in_it() -> None:
    failed = raised(errors.StepFailed("step charge ended rejected\nand so on"))
    within = raised(ExceptionGroup("within", [failed, KeyError()]))
    group = ExceptionGroup("unhandled errors in a TaskGroup", [because(ValueError("no"), raised(OSError("x"))), within])
    described = describe_exception(raised(group))
    assert errors.message_of(described) == (
        "unhandled errors in a TaskGroup (2 sub-exceptions): ValueError: no; StepFailed: step charge ended rejected; "
        "KeyError"
    )
    assert described["message"] == "unhandled errors in a TaskGroup (2 sub-exceptions)"  # as histories have it
    described["message"] = told = errors.message_of(described)
    assert errors.message_of(described) == told
    described["message"] = "x" * errors.MESSAGE_BYTES
    assert len(errors.message_of(described)) == errors.MESSAGE_BYTES


def test_the_message_of_any_other_exception_is_its_own() -> None:
    assert errors.message_of(describe_exception(because(ValueError("no"), ExceptionGroup("x", [OSError()])))) == "no"
    assert errors.message_of({"type": "ChildFailed", "message": "told by a child"}) == "told by a child"
    assert errors.message_of({}) == ""
