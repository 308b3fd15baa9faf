"""Who plays a step in a test: a stub, or the step's own function.

Owns calling it as a worker would: arguments and results pass through the codec both ways, and
``step.current()`` works. Must never decide what follows from an outcome; the machine does.
"""

from __future__ import annotations

import asyncio
import contextvars
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, NamedTuple, Protocol, cast

from orchestrator.codec import Json, check
from orchestrator.errors import Rejected, UsageError, describe_exception
from orchestrator.machine.policy import is_among
from orchestrator.step import NOT_ITS_OWN, Step, StepContext, StepTimeout, legacy_codec, registry, running
from orchestrator.store.connection import refuse_ended, refuse_lost_rows

NO_TIME: Final = timedelta(0)
_NOBODY: Final = object()
_NEAR: Final = 0.85  # so similar (difflib's ratio) is meant to be the same


@dataclass(frozen=True, slots=True)
class After:
    """A stub whose attempt takes `duration` of virtual time and then ends as `outcome`, itself any stub.

    An attempt that takes longer than its ``start_to_close_timeout`` ends there, in doubt, after its effect.
    """

    duration: timedelta
    outcome: Any = None


class Call(NamedTuple):
    """One attempt of a rehearsal; `role` is do, undo, probe or once, `attempt` counts from 1.

    `result` is what the function or stub returned, `error` what it raised.
    """

    name: str
    role: str
    args: tuple[Any, ...]
    result: Any
    kwargs: dict[str, Any]
    error: BaseException | None
    key: str
    attempt: int


@dataclass(slots=True)
class Attempt:
    """How an attempt went, as a worker would report it; `verdict` is succeeded, rejected, failed or doubt."""

    call: Call
    verdict: str
    result: Json = None
    error: dict[str, Any] | None = None
    duration: timedelta = NO_TIME


@dataclass(slots=True)
class _Part:
    """One attempt while it is played."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    duration: timedelta = NO_TIME
    encode: Callable[[Any], Json] | None = None


class Asked(Protocol):
    """An attempt that somebody is to play: the machine's `Work`, or what a drainer has taken."""

    @property
    def role(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def call(self) -> Any: ...


class Cast:
    """All stubs, by step name; of a list each attempt takes the next, the last one stays."""

    def __init__(self, stubs: Mapping[Any, Any], connection: Any = None) -> None:
        self._connection = connection
        self._stubs: dict[str, list[Any]] = {}
        self.add(stubs)

    def add(self, stubs: Mapping[Any, Any]) -> None:
        """Let these play from now on, in the place of earlier ones."""
        self._stubs |= {name_of(step): _in_turn(step, stub) for step, stub in stubs.items()}

    def play(self, work: Asked, context: StepContext, once: Callable[[], Any] | None) -> Attempt:
        """Make one attempt.  Raises: UsageError for a step that cannot be played without a stub."""
        part = self._part(work, context.connection or self._connection, once)
        value, error = _perform(part, context, work.call.get("t"))
        result: Json = None
        if error is None and part.encode is not None:
            try:
                result = part.encode(value)
                check(result, what=f"the result of {work.task}")
            except Exception as refused:
                error = refused
        call = Call(work.task, work.role, part.args, value, part.kwargs, error, context.key, context.attempt)
        if error is None:
            return Attempt(call, "succeeded", result, duration=part.duration)
        return Attempt(call, _verdict(error, work), None, describe_exception(error), part.duration)

    def _part(self, work: Asked, connection: Any, once: Callable[[], Any] | None) -> _Part:
        declared = registry.steps.get(work.task)
        codec = declared.codec if declared else legacy_codec
        stub, duration = self._stub(work.task)
        if work.role == "once":
            function = once if stub is _NOBODY else _as_function(stub)
            assert function is not None
            return _Part(function, duration=duration, encode=lambda value: value)
        given = work.call["a"]
        if work.role == "probe":
            given = {name: value for name, value in given.items() if name in codec.parameters}
        args, kwargs = codec.decode_call(given)
        encode = None if work.role == "undo" else codec.encode_result
        function = self._own(work, declared, connection, encode) if stub is _NOBODY else _as_function(stub)
        return _Part(function, args, kwargs, duration, encode)

    def _stub(self, name: str) -> tuple[Any, timedelta]:
        stubs = self._stubs.get(name)
        if stubs is None:
            return _NOBODY, NO_TIME
        stub = stubs.pop(0) if len(stubs) > 1 else stubs[0]
        return (stub.outcome, stub.duration) if isinstance(stub, After) else (stub, NO_TIME)

    @staticmethod
    def _own(
        work: Asked, declared: Step[Any, Any] | None, connection: Any, encode: Callable[[Any], Json] | None
    ) -> Callable[..., Any]:
        if declared is None:
            return _celery_task(work.task)
        if not declared.options.transactional:
            return declared.function
        if connection is None:
            raise UsageError(f"step {declared.name} is transactional: stub it, or pass connection= to testing.run()")
        return _in_transaction(declared.name, declared.function, connection, encode)


def _in_transaction(
    name: str, function: Callable[..., Any], connection: Any, encode: Callable[[Any], Json] | None
) -> Callable[..., Any]:
    def play(*args: Any, **kwargs: Any) -> Any:
        with getattr(connection, "begin_nested", nullcontext)() as block:
            value = _finished(function(connection, *args, **kwargs))
            refuse_lost_rows(connection)  # which the block would not, for that they are rolled back already
            refuse_ended(block)
            if encode is not None:
                check(encode(value), what=f"the result of {name}")  # as in production: or its rows are taken back
            return value

    return play


def name_of(step: Any) -> str:
    name = step if isinstance(step, str) else getattr(step, "name", None)
    if not isinstance(name, str):
        raise UsageError(f"stubs and faults are keyed by steps, Celery tasks or their names, not by {step!r:.80}")
    if isinstance(step, str) and name not in registry.steps:
        _refuse_misspelt(name)
    return name


def _refuse_misspelt(name: str) -> None:
    """Refuse a name that nothing has, but almost; any other may be that of a ``saga.once``, or of a task elsewhere."""
    same = [known for known in registry.steps if known.rpartition(".")[2] == name]
    near = same or difflib.get_close_matches(name, registry.steps, 1, _NEAR)
    if near and name not in _celery_tasks():
        raise UsageError(
            f"no step and no Celery task named {name!r} is registered here, so that this would mean nothing; "
            f"did you mean {' or '.join(map(repr, near[:3]))}? Best pass the step itself"
        )


def _in_turn(step: Any, stub: Any) -> list[Any]:
    stubs = list(stub) if isinstance(stub, list) else [stub]
    if not stubs:
        raise UsageError(f"the stub of {name_of(step)} is an empty list; give it one stub for each attempt")
    return stubs


def _as_function(stub: Any) -> Callable[..., Any]:
    if isinstance(stub, BaseException) or (isinstance(stub, type) and issubclass(stub, BaseException)):

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise stub

        return fail
    return stub if callable(stub) else lambda *args, **kwargs: stub


def _celery_tasks() -> Mapping[str, Any]:
    from celery import current_app  # a rehearsal of declared steps needs no Celery

    return cast(Mapping[str, Any], current_app.tasks)


def _celery_task(name: str) -> Callable[..., Any]:
    from orchestrator.testing import plain

    task = _celery_tasks().get(name)
    if task is None:
        raise UsageError(f"no step and no Celery task named {name} is registered here; import or stub it")
    return functools.partial(plain.call, task)


def _perform(part: _Part, context: StepContext, timeout_seconds: float | None) -> tuple[Any, BaseException | None]:
    """Call the part's function; what pytest itself raises, and Ctrl-C, pass."""
    try:
        with running(context):
            value = _off_the_loop(lambda: _finished(part.function(*part.args, **part.kwargs)))
        if timeout_seconds and part.duration.total_seconds() > timeout_seconds:
            part.duration = timedelta(seconds=timeout_seconds)
            raise StepTimeout(f"start_to_close_timeout of {timeout_seconds:g} s passed")
        return value, None
    except (Exception, SystemExit) as error:
        return None, error


def _off_the_loop(function: Callable[[], Any]) -> Any:
    """Call a function that may use ``asyncio.run``, also from inside an async test."""
    if asyncio._get_running_loop() is None:
        return function()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, function).result()


def to_its_end(value: Any) -> Any:
    """Return a value, or what an awaitable one comes to, also inside of an async test."""
    return _off_the_loop(lambda: _finished(value)) if inspect.isawaitable(value) else value


def _finished(value: Any) -> Any:
    return asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value


async def _awaited(value: Any) -> Any:
    return await value


def _verdict(error: BaseException, work: Asked) -> str:
    names = describe_exception(error)["mro"]
    declared = registry.steps.get(work.task)
    policy = declared.options.retry if declared else None  # what it declares counts for a call with a policy of its own
    refused = (policy is not None and policy.refuses(names)) or is_among(work.call.get("x", ()), names)
    if isinstance(error, Rejected) or (refused and not isinstance(error, NOT_ITS_OWN)):
        return "rejected"
    return "failed" if work.call.get("n") else "doubt"  # a transaction that was rolled back leaves no doubt
