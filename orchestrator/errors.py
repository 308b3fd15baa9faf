"""Every error that this package raises on purpose, in one tree.

    OrchestratorError
    ├── Rejected                certainly no effect: raised by a step's own code
    ├── StepFailed              a step is settled and did not succeed: saga code may go on
    ├── SagaFailed              a run ended in an error: the caller of ``get`` decides
    │   └── SagaCancelled       ... because somebody cancelled it
    │   └── ChildFailed         ... of a child; a StepFailed as well, since its parent may go on
    ├── MapFailed               more items of a saga.map failed than it tolerates
    ├── DeadlockError           runs wait for each other's locks: this one goes back, or asks in another order
    ├── ConflictError           same run id, other input: the caller picks another id
    ├── DriftError              saga code no longer asks what its journal recorded: its author mends it
    ├── UnknownSagaError        no saga of that name here: deploy it or correct the name
    ├── UnknownRunError         no run of that id in this database, or it was pruned: look it up
    ├── PayloadError            a value that cannot be stored: the caller changes the value
    ├── StoreUnavailableError   the database does not answer: try again, nothing was started
    ├── SchemaError             the database's schema does not fit this code: run the migrations
    ├── ConfigurationError      a setting is missing or unreadable: whoever deploys mends it
    ├── DefinitionError         a wrong declaration, raised at import: its author mends it
    └── UsageError              the right thing in the wrong place: the message names the right call

Every message says what happened, to which run and step, and what to do now. All of them pickle and
copy, because they cross process boundaries. This module must never import anything but the standard library.
"""

from __future__ import annotations

import re
import shlex
import traceback
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, cast

if TYPE_CHECKING:
    from orchestrator.saga.mapping import MapSummary

__all__ = [
    "ChildFailed",
    "ConfigurationError",
    "ConflictError",
    "DeadlockError",
    "DefinitionError",
    "DriftError",
    "MapFailed",
    "OrchestratorError",
    "Outcome",
    "PayloadError",
    "Rejected",
    "SagaCancelled",
    "SagaFailed",
    "SchemaError",
    "StepFailed",
    "StoreUnavailableError",
    "UnknownRunError",
    "UnknownSagaError",
    "UsageError",
    "describe_exception",
    "message_of",
]

Outcome = Literal["rejected", "unknown", "failed"]

MESSAGE_BYTES: Final = 8 * 1024
TRACEBACK_BYTES: Final = 16 * 1024


class OrchestratorError(Exception):
    """Catch this to catch every error that the orchestrator raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls cls(*args), which loses (and misses) keyword-only arguments.
        return _rebuild, (type(self), self.args, dict(self.__dict__))


def _rebuild(kind: type[OrchestratorError], args: tuple[Any, ...], state: dict[str, Any]) -> OrchestratorError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class Rejected(OrchestratorError):
    """Raise this in a step to say that it certainly had no effect: it is not retried and not undone."""


class StepFailed(OrchestratorError):
    """Report a step that is settled and did not succeed.

    ``outcome`` is ``rejected`` (certainly no effect), ``unknown`` (in doubt; undone, or listed in the run's
    ``left`` if the step declares no undo) or ``failed`` (the step declares that it has no effect). ``error``
    describes the last attempt's exception: ``type``, ``message`` and ``traceback``.
    """

    def __init__(
        self,
        message: str = "",
        *,
        run_id: str = "",
        key: str = "",
        outcome: Outcome = "unknown",
        error: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.run_id = run_id
        self.key = key
        self.outcome: Outcome = outcome
        self.error: dict[str, Any] = dict(error or {})

    @property
    def error_type(self) -> str:
        """Return the name of the last attempt's exception class, or an empty string."""
        return str(self.error.get("type", ""))


class SagaFailed(OrchestratorError):
    """Report a run that ended in an error.

    ``state`` is the run's terminal state, ``error`` what ended it (``type``, ``message``, ``traceback``),
    ``left`` the effects that happened and have no undo.
    """

    def __init__(
        self,
        message: str = "",
        *,
        run_id: str,
        state: str,
        error: Mapping[str, Any] | None = None,
        left: Sequence[Any] = (),
    ) -> None:
        super().__init__(message)
        self.run_id = run_id
        self.state = state
        self.error: dict[str, Any] = dict(error or {})
        self.left: tuple[Any, ...] = tuple(left)

    @property
    def error_type(self) -> str:
        """Return the name of the exception class that ended the run, or an empty string."""
        return str(self.error.get("type", ""))


class SagaCancelled(SagaFailed):
    """Report a run that ended because it was cancelled; what it had done is undone."""


class ChildFailed(StepFailed, SagaFailed):
    """Report a child that ended in an error, to the saga that asked for it.

    ``run_id`` is the child's, ``key`` its key in the parent. It is settled and undone, so that code that catches this
    may go on; what it could not undo is in ``left``.
    """

    def __init__(
        self,
        message: str = "",
        *,
        run_id: str = "",
        key: str = "",
        state: str = "",
        error: Mapping[str, Any] | None = None,
        left: Sequence[Any] = (),
    ) -> None:
        Exception.__init__(self, message)
        self.run_id, self.key, self.state = run_id, key, state
        self.outcome: Outcome = "rejected"
        self.error: dict[str, Any] = dict(error or {})
        self.left: tuple[Any, ...] = tuple(left)


class MapFailed(OrchestratorError):
    """Report that more items of a `saga.map` failed than it tolerates; ``summary`` tells which (a MapSummary)."""

    def __init__(self, message: str = "", *, summary: MapSummary | None = None) -> None:
        super().__init__(message)
        self.summary = cast("MapSummary", summary)


class DeadlockError(OrchestratorError):
    """Refuse a lock that could never be had: the runs ahead wait, in the end, for the run that asks."""


class ConflictError(OrchestratorError):
    """Refuse to start a run whose id is taken by a run with another saga or other input."""


class DriftError(OrchestratorError):
    """Refuse a turn in which saga code did not ask again for what its journal recorded."""


class UnknownSagaError(OrchestratorError):
    """Name a saga that is not registered here."""


class UnknownRunError(OrchestratorError):
    """Name a run id that the database does not have."""


class PayloadError(OrchestratorError):
    """Refuse a value that cannot be stored, or stored text that is no longer a valid value."""


class StoreUnavailableError(OrchestratorError):
    """Report that the database does not answer; whatever was asked for has not been promised.

    ``in_doubt`` says that it may have been done all the same, because the connection was lost under way: ask again with
    the same id.
    """

    in_doubt = False


class SchemaError(OrchestratorError):
    """Report a schema that is missing, newer or older than this code; see ``celery -A ... saga migrate``."""


class ConfigurationError(OrchestratorError):
    """Report a setting that is missing or unreadable, by the name of its environment variable."""


class DefinitionError(OrchestratorError):
    """Refuse a wrong declaration of a step or saga; raised at import, so that it never reaches production."""


class UsageError(OrchestratorError):
    """Refuse the right thing in the wrong place; the message names the right call."""


def describe_exception(error: BaseException, trace: str = "") -> dict[str, Any]:
    """Describe an exception as JSON: type, module, message, traceback (`trace`, if known), names of its classes.

    The message is bounded to 8 KiB, the traceback to 16 KiB (its end is kept: there the error is). Never
    raises, whatever the exception's own ``__str__`` and ``__repr__`` do; NUL and lone surrogates are
    replaced.
    """
    kind = type(error)
    return {
        "type": _storable(kind.__qualname__, 255),
        "module": _storable(kind.__module__, 255),
        "message": _storable(_message(error), MESSAGE_BYTES),
        "traceback": _storable(trace or _traceback(error), TRACEBACK_BYTES, keep_end=True),
        "mro": [_storable(base.__qualname__, 255) for base in kind.__mro__ if base is not object][:20],
    }


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as second:
        return f"<{type(error).__name__}: its __str__ raised {type(second).__name__}>"


def _traceback(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(type(error), error, from_user_code(error.__traceback__), limit=50))
    except BaseException:
        try:
            return "".join(traceback.format_tb(error.__traceback__, limit=50))
        except BaseException:
            return ""


def from_user_code(trace: TracebackType | None) -> TracebackType | None:
    """Return the part of a traceback that begins where user code does; all of it if there is none."""
    found = trace
    while found is not None and found.tb_frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_USER_CODE:
        found = found.tb_next
    return found or trace


_NOT_USER_CODE = {"asyncio", "celery", "orchestrator"}


_PLAIN: Final = re.compile(r"[\w@%+=:,.][\w@%+=:,./#~-]*", re.ASCII)


def as_typed(text: str) -> str:
    """Return an id or a name as one types it in a shell: quoted where the shell would read it otherwise."""
    return text if _PLAIN.fullmatch(text) else shlex.quote(text)


def message_of(described: Mapping[str, Any]) -> str:
    """Return what a described exception says to people: of a group, whose message counts them, those in it as well."""
    said = str(described.get("message") or "")
    if "BaseExceptionGroup" not in described.get("mro", ()):
        return said
    members = "; ".join(_members(str(described.get("traceback"))))
    if said.endswith(members):  # as the message of an attempt does
        return said
    return _storable(f"{said}: {members}", MESSAGE_BYTES)


def _members(trace: str) -> list[str]:
    """Return type and message of the exceptions in a group, by its traceback: histories have them nowhere else."""
    found: list[str] = []
    is_next = False
    for line in trace.splitlines():
        text = line.lstrip(" ").removeprefix("|").removeprefix(" ")
        if text.startswith("+ Exception Group Traceback "):  # its own, or before that one what it came from
            found.clear()
        elif _MEMBER.match(text):
            found.append("")
            is_next = True
        elif text.startswith("Exception Group Traceback "):  # of a group in the group: its own members follow
            is_next = False
        elif text.startswith("Traceback "):  # the last one is its own, those before are of what it came from
            is_next = True
        elif found and is_next and text.strip() and not text.startswith(" "):
            kind, colon, message = text.partition(": ")
            found[-1], is_next = f"{kind.rpartition('.')[2]}{colon}{message}", False
    return list(filter(None, found))


_MEMBER: Final = re.compile(r"\+(-\+)?-+ (\d+|\.\.\.) -+$")


def _storable(text: object, limit_bytes: int, *, keep_end: bool = False) -> str:
    """Return text that Postgres can store, cut to a number of UTF-8 bytes."""
    text = text if isinstance(text, str) else type(text).__name__
    text = text[-limit_bytes:] if keep_end else text[: limit_bytes + 1]
    raw = text.encode(errors="replace").replace(b"\0", b"\xef\xbf\xbd")
    if len(raw) <= limit_bytes:
        return raw.decode()
    room = limit_bytes - 3
    return "..." + raw[-room:].decode(errors="ignore") if keep_end else raw[:room].decode(errors="ignore") + "..."
