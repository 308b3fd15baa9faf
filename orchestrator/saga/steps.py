"""Asking for steps: `step` and `once`.

Owns how a call in saga code becomes a request with its compensation armed.  Must never run a step.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

from orchestrator.codec import Json, check, copied, encode_any, is_name
from orchestrator.declaration import StepOptions
from orchestrator.errors import DefinitionError, PayloadError, StepFailed, UsageError
from orchestrator.machine.code import Request, SagaCode
from orchestrator.machine.journal import Asked
from orchestrator.machine.policy import START_TO_CLOSE, Effect
from orchestrator.machine.record import Step as StepRecord
from orchestrator.saga.declare import Saga
from orchestrator.saga.inside import code_of
from orchestrator.step import Step, legacy_codec
from orchestrator.step import registry as declared_steps

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class CeleryTask(Protocol):
    """What tells a Celery task that is no step from one, for type checkers: the arguments of a step are checked."""

    @property
    def name(self) -> str: ...
    @property
    def request(self) -> Any: ...


@overload
def step(task: Step[P, R], /, *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]: ...
@overload
def step(task: CeleryTask | dict[str, Any], /, *args: Any, **kwargs: Any) -> asyncio.Future[Any]: ...
def step(task: Any, /, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
    """Ask for a step; the returned awaitable is scheduled already, so it may be awaited later.

    `task` is a step, a Celery task, or a Celery signature, also that of a chain, group or chord.  Awaiting it gives the
    step's result, or raises StepFailed once the step is settled: rejected, undone, or by declaration without effect.
    Raises: PayloadError for arguments that cannot be stored; UsageError outside of a saga.
    """
    code = code_of("step")
    if isinstance(task, Step):
        return code.ask(request_of(task, task.codec.encode_call(args, kwargs), code))
    if isinstance(task, dict) and _is_canvas(task):
        from orchestrator.canvas.walking import ask  # made of steps itself

        return ask(task, args, kwargs)
    return code.ask(_legacy_request(task, args, kwargs, code))


def request_of(task: Step[Any, Any], args: dict[str, Json], code: SagaCode) -> Request:
    """Return the request for a step with encoded arguments.  Raises: PayloadError if they cannot be stored."""
    check(args, what=f"the arguments of {task.name}")
    return Request(
        name=task.name,
        key=task.options.key,
        asked=functools.partial(asked_of, task, args, code.fold.info.queue),
        same=functools.partial(_same, task, args),
        decode=functools.partial(decode_result, task),
        failure=functools.partial(failure_of, code.fold.info.id),
    )


def asked_of(task: Step[Any, Any], args: dict[str, Json], run_queue: str, key: str) -> Asked:
    """Return the journal entry for a call of a step with encoded arguments.

    Raises: PayloadError if its compensation has arguments of its own that cannot be stored.
    """
    options, undo = task.options, task.arm(args)
    if undo is not None and undo.args is not None:
        check(undo.args, what=f"the arguments of {undo.task}, which undoes {task.name}")
    queue = "" if task.options.local or task.queue == run_queue else task.queue
    heartbeat = options.heartbeat_timeout
    timeout = options.start_to_close_timeout
    return Asked(
        key,
        task.name,
        args,
        effect=task.effect,
        undo=undo,
        probe=task.probe_step.name if task.probe_step else "",
        on_unknown=task.on_unknown,
        queue=queue,
        local=options.local,
        transactional=options.transactional,
        retry=options.retry.encode() if options.retry else None,
        timeout=timeout.total_seconds() if timeout != START_TO_CLOSE else 0.0,
        heartbeat=heartbeat.total_seconds() if heartbeat else 0.0,
        priority=options.priority,
        limit=task.limit(args),
    )


def _same(task: Step[Any, Any], args: dict[str, Json], asked: Asked) -> bool:
    if asked.task != task.name:
        return False
    return bool(asked.args == args) or task.codec.same(asked.args, args)


def decode_result(task: Any, result: Json) -> Any:
    """Decode what is recorded of a step or saga.  Raises: DefinitionError if today's annotation does not accept it."""
    try:
        return task.codec.decode_result(result)
    except PayloadError as error:
        raise DefinitionError(f"the recorded result of {task.name} no longer fits its annotation: {error}") from error


def failure_of(run_id: str, record: StepRecord) -> Exception:
    """Return what the code that awaits a step gets when it did not succeed."""
    error: Any = copied(record.error) or {}
    outcome = {"rejected": "rejected", "failed": "failed"}.get(record.forward, "unknown")
    said = f"{error.get('type')}: {error.get('message')}" if error else "given up before it began"
    text = f"step {record.key} of run {run_id} ended {outcome} after {record.attempts or 1} attempt(s): {said}"
    return StepFailed(text, run_id=run_id, key=record.key, outcome=cast(Any, outcome), error=error)


def _legacy_request(task: Any, args: tuple[Any, ...], kwargs: dict[str, Any], code: SagaCode) -> Request:
    """A Celery task that was not declared as a step, or a signature of one."""
    if isinstance(task, dict) and task.get("task"):
        name, options = task["task"], dict(task.get("options") or {})
        args, kwargs = (*args, *task.get("args", ())), {**(task.get("kwargs") or {}), **kwargs}
    elif hasattr(task, "run") and isinstance(getattr(task, "name", None), str):
        name, options = task.name, {"queue": getattr(task, "queue", None)}
    else:
        raise UsageError(f"saga.step() takes a step, a Celery task or a signature, not {_no_step(task)}")
    declared = _declared(name)
    if declared is not None:
        queue = options.get("queue")
        declared = declared.with_options(queue=queue) if queue else declared
        return request_of(declared, declared.codec.encode_call(args, kwargs), code)
    stand_in = LegacyStep(name, StepOptions(queue=options.get("queue") or ""))
    return request_of(stand_in, legacy_codec.encode_call(args, kwargs), code)


def _no_step(given: Any) -> str:
    """Name what is no step, and what to write instead."""
    name = getattr(given, "__name__", "")
    if isinstance(given, Saga):
        return f"Saga; write `await saga.child({name}, ...)`"
    if inspect.iscoroutine(given):
        given.close()
        return f"a coroutine; write `await saga.step({name}, ...)`, its arguments apart, and declare {name} with @step"
    return f"the function {name}; declare it with @step" if inspect.isroutine(given) else type(given).__name__


def _is_canvas(signature: dict[str, Any]) -> bool:
    """Tell whether a signature asks for more than a call of one task."""
    is_celerys = str(signature.get("task")).startswith("celery.")
    return is_celerys or bool(signature.get("subtask_type") or set(signature.get("options") or ()) - {"queue"})


def step_of(task: Any) -> Step[Any, Any]:
    """Return the step for a step, a Celery task or the name of either.  Raises: UsageError."""
    if isinstance(task, Step):
        return task
    name = task if isinstance(task, str) else getattr(task, "name", None)
    if not isinstance(name, str) or not (isinstance(task, str) or hasattr(task, "run")):
        raise UsageError(f"a step or a Celery task is wanted here, not {type(task).__name__}")
    return _declared(name) or LegacyStep(name, StepOptions(queue=getattr(task, "queue", "") or ""))


class LegacyStep(Step[Any, Any]):
    """A Celery task used as a step as it is."""

    def __init__(self, name: str, options: StepOptions) -> None:
        if name.startswith("celery."):
            raise UsageError(
                f"{name} is a task of Celery's own, which no worker takes as a step; make one that does it"
            )
        super().__init__(_nothing, name, options)
        self.codec = legacy_codec


def _nothing(*args: Any, **kwargs: Any) -> Any:
    """Stands for the function of a Celery task, which only a worker knows."""


def _declared(name: str) -> Step[Any, Any] | None:
    return declared_steps.steps.get(name)


def once(name: str, function: Callable[[], T | Awaitable[T]]) -> asyncio.Future[T]:
    """Run `function` in the worker that drives the saga and record what it returned; replays get the recorded value.

    It is tried again as a step is; its result comes back as plain JSON.
    """
    code = code_of("once")
    if not is_name(name):
        raise UsageError("saga.once: its name must be text of 1 to 500 printable bytes")
    if not callable(function):
        if inspect.iscoroutine(function):
            function.close()
        raise UsageError(f"saga.once({name!r}, ...) takes a function, and not what it returns: leave out its ()")
    record = functools.partial(Asked, task=name, args={}, kind="once", effect=Effect.NONE, local=True)
    return code.ask(
        Request(
            name=f"once:{name}",
            asked=lambda key: record(key),
            same=lambda asked: asked.kind == "once",
            decode=copied,
            failure=functools.partial(failure_of, code.fold.info.id),
            run=lambda: encode_any(_run(function), f"the result of saga.once({name!r})"),
        )
    )


def _run(function: Callable[[], Any]) -> Any:
    result = function()
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(value: Awaitable[T]) -> T:
    return await value
