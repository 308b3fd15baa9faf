"""Sagas: durable async functions, and what their code may ask for.

Owns the authors' side of a run: `define` declares a saga, the other functions are called inside one.  Must never touch
the database or the clock: requests go to the deterministic loop that runs the saga.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import uuid as _uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from orchestrator.codec import FunctionCodec, Json, check, encode_any, is_name
from orchestrator.errors import DefinitionError, PayloadError, StepFailed, UnknownSagaError, UsageError
from orchestrator.machine.code import Request, SagaCode
from orchestrator.machine.fold import Step as StepRecord
from orchestrator.machine.journal import Asked
from orchestrator.machine.loop import SagaLoop, inside_saga
from orchestrator.machine.policy import START_TO_CLOSE, Effect
from orchestrator.machine.turn import Script
from orchestrator.step import Step, StepOptions, legacy_codec

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

__all__ = [
    "Info", "Saga", "as_completed", "define", "info", "now", "once", "random", "registry", "sleep", "sleep_until",
    "step", "uuid4", "version", "wait",
]  # fmt: skip


class Starter(Protocol):
    """Starts runs; an `Orchestrator` provides it."""

    def start(
        self, saga: Saga[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
    ) -> Any: ...
    def start_many(
        self, saga: Saga[Any, Any], calls: Iterable[tuple[Any, ...]], options: dict[str, Any]
    ) -> list[Any]: ...
    async def astart(
        self, saga: Saga[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
    ) -> Any: ...
    def handle(self, saga: Saga[Any, Any], run_id: str) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaOptions:
    """Everything that is declared about a saga; see `define`."""

    version: int = 1
    deadline: timedelta | None = None
    queue: str = ""
    priority: int = 0
    on_code_error: Literal["park", "compensate"] = "park"


class Saga(Generic[P, R]):
    """A declared saga: start it like a Celery task."""

    def __init__(self, function: Callable[..., Coroutine[Any, Any, Any]], name: str, options: SagaOptions) -> None:
        self.function = function
        self.name = name
        self.options = options
        self.codec = FunctionCodec(function, what=name)
        self.starter: Starter | None = None
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__wrapped__ = function

    def __repr__(self) -> str:
        return f"<saga {self.target}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Refuse: a saga is started, not called.  Raises: UsageError."""
        if inside_saga():
            raise UsageError(f"{self.name} was called in saga code; start it from a step (`await saga.step(...)`)")
        raise UsageError(
            f"{self.name} is a saga: start it with {self.__name__}.delay(...), or in a unit test run it with "
            f"orchestrator.testing.run({self.__name__}, ...)"
        )

    @property
    def target(self) -> str:
        """Name and version, as work for it is addressed."""
        return f"{self.name}@{self.options.version}"

    # -- starting ------------------------------------------------------------------------------------------------------
    def _starter(self) -> Starter:
        if inside_saga():
            raise UsageError(f"{self.name} was started in saga code, so start it from a step (`await saga.step(...)`)")
        if self.starter is None:
            raise UsageError(f"saga {self.name} belongs to no Celery app yet; create `Orchestrator(app)` first")
        return self.starter

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Start a run; it is committed in Postgres when this returns.

        Raises: PayloadError, ConflictError, StoreUnavailableError.
        """
        return self._starter().start(self, args, kwargs, {})

    def apply_async(self, args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None, **options: Any) -> Any:
        """Start a run with options: `task_id` (the run id), `countdown` (seconds), `eta` (aware), `priority` (higher
        first), `transaction` (the caller's own: the run starts if and only if it commits), `deadline` (timedelta).

        Raises: PayloadError, ConflictError, StoreUnavailableError; UsageError for an option that has no meaning here.
        """
        return self._starter().start(self, tuple(args or ()), kwargs or {}, options)

    def start_many(self, calls: Iterable[tuple[Any, ...]], **options: Any) -> list[Any]:
        """Start a run for each tuple of arguments, many with one commit; returns their handles in the same order.

        Takes the options of `apply_async` but `transaction`, for all of them; `task_ids` instead of `task_id`.
        Raises: as `apply_async`; then some are started, and to start all of them again with the same ids is harmless.
        """
        return self._starter().start_many(self, calls, options)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Start a run without blocking the event loop; see `delay`."""
        return await self._starter().astart(self, args, kwargs, {})

    async def aapply_async(self, args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None, **options: Any) -> Any:
        """Start a run without blocking the event loop; see `apply_async`."""
        return await self._starter().astart(self, tuple(args or ()), kwargs or {}, options)

    def AsyncResult(self, task_id: str) -> Any:  # noqa: N802 - Celery's name
        """Return a handle to a run by its id; asks nothing of the database yet."""
        return self._starter().handle(self, task_id)

    # -- what the machine is told --------------------------------------------------------------------------------------
    def script(self) -> Script:
        """Return this saga as the machine runs it."""
        return Script(self._main, self.options.on_code_error == "park")

    async def _main(self, encoded: Any) -> Json:
        try:
            args, kwargs = self.codec.decode_call(encoded)
        except PayloadError as error:
            raise DefinitionError(f"the recorded input no longer fits {self.name}: {error}") from error
        output = self.codec.encode_result(await self.function(*args, **kwargs))
        check(output, what=f"the result of {self.name}")
        return output


# -- declaring ---------------------------------------------------------------------------------------------------------
class Registry:
    """All sagas declared in this process, by name and version."""

    def __init__(self) -> None:
        self.sagas: dict[tuple[str, int], Saga[Any, Any]] = {}
        self._listeners: list[Callable[[Saga[Any, Any]], None]] = []

    def add(self, saga: Saga[Any, Any]) -> None:
        """Add `saga`, and tell whoever binds sagas to an app."""
        self.sagas[saga.name, saga.options.version] = saga
        for listener in self._listeners:
            listener(saga)

    def listen(self, listener: Callable[[Saga[Any, Any]], None]) -> None:
        """Call `listener` for every saga declared so far and from now on."""
        self._listeners.append(listener)
        for saga in list(self.sagas.values()):
            listener(saga)

    def latest(self, name: str) -> Saga[Any, Any]:
        """Return the highest version of a saga.  Raises: UnknownSagaError."""
        versions = [saga for (other, _), saga in self.sagas.items() if other == name]
        if not versions:
            raise UnknownSagaError(
                f"no saga named {name!r} is registered here; known: {', '.join(self.names) or 'none'}"
            )
        return max(versions, key=lambda saga: saga.options.version)

    @property
    def names(self) -> list[str]:
        return sorted({name for name, _ in self.sagas})


registry = Registry()


@overload
def define(function: Callable[P, Coroutine[Any, Any, R]], /) -> Saga[P, R]: ...
@overload
def define(
    *,
    name: str = ...,
    version: int = ...,
    deadline: timedelta | None = ...,
    queue: str = ...,
    priority: int = ...,
    on_code_error: Literal["park", "compensate"] = ...,
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Saga[P, R]]: ...
def define(function: Any = None, /, *, name: str = "", **options: Any) -> Any:
    """Declare an async function as a saga.

    `version` pins runs: one that started with version 1 is driven by version 1, and several can be registered side by
    side under one `name`.  `deadline` (a timedelta from the start) compensates a run that takes longer.
    `on_code_error` says what a TypeError and its like in the saga function itself does to the run.
    Raises: DefinitionError at import.
    """
    if function is None:
        return lambda f: define_saga(f, name, options)
    return define_saga(function, name, options)


def define_saga(function: Any, name: str, options: dict[str, Any]) -> Saga[Any, Any]:
    """Declare and register a saga.  Raises: DefinitionError."""
    if not inspect.iscoroutinefunction(function):
        raise DefinitionError(f"saga {getattr(function, '__name__', function)!r} must be an `async def` function")
    try:
        declared = SagaOptions(**options)
    except TypeError as error:
        raise DefinitionError(f"saga.define of {function.__name__}: {error}") from None
    if declared.version < 1:
        raise DefinitionError(f"saga {function.__name__}: version must be 1 or more")
    saga: Saga[Any, Any] = Saga(function, name or f"{function.__module__}.{function.__name__}", declared)
    registry.add(saga)
    return saga


# -- inside a saga -----------------------------------------------------------------------------------------------------
def _code(call: str) -> SagaCode:
    loop = asyncio._get_running_loop()
    if not isinstance(loop, SagaLoop):
        raise UsageError(f"saga.{call}() works inside a saga function only; outside, start a saga with .delay(...)")
    return cast(SagaCode, loop.code)  # type: ignore[attr-defined]


@overload
def step(task: Step[P, R], /, *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]: ...
@overload
def step(task: Any, /, *args: Any, **kwargs: Any) -> asyncio.Future[Any]: ...
def step(task: Any, /, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
    """Ask for a step; the returned awaitable is scheduled already, so it may be awaited later.

    `task` is a step, a Celery task, or a Celery signature.  Awaiting it gives the step's result, or raises StepFailed
    once the step is settled: rejected, undone, or by declaration without effect.
    Raises: PayloadError for arguments that cannot be stored; UsageError outside of a saga.
    """
    code = _code("step")
    if isinstance(task, Step):
        encoded = task.codec.encode_call(args, kwargs)
        check(encoded, what=f"the arguments of {task.name}")
        return code.ask(_request(task, encoded, code))
    return code.ask(_legacy_request(task, args, kwargs, code))


def _request(task: Step[Any, Any], args: dict[str, Json], code: SagaCode) -> Request:
    return Request(
        name=task.name,
        key=task.options.key,
        asked=functools.partial(_asked, task, args, code.fold.info.queue),
        same=functools.partial(_same, task, args),
        decode=functools.partial(_decode, task),
        failure=functools.partial(_failure, code.fold.info.id),
    )


def _asked(task: Step[Any, Any], args: dict[str, Json], run_queue: str, key: str) -> Asked:
    options = task.options
    queue = "" if task.options.local or task.queue == run_queue else task.queue
    heartbeat = options.heartbeat_timeout
    timeout = options.start_to_close_timeout
    return Asked(
        key,
        task.name,
        args,
        effect=task.effect,
        undo=task.arm(args),
        probe=task.probe_step.name if task.probe_step else "",
        on_unknown=task.on_unknown,
        queue=queue,
        local=options.local,
        transactional=options.transactional,
        retry=options.retry.encode() if options.retry else None,
        timeout=timeout.total_seconds() if timeout != START_TO_CLOSE else 0.0,
        heartbeat=heartbeat.total_seconds() if heartbeat else 0.0,
        priority=options.priority,
    )


def _same(task: Step[Any, Any], args: dict[str, Json], asked: Asked) -> bool:
    if asked.task != task.name:
        return False
    return bool(asked.args == args) or task.codec.canonical(asked.args) == task.codec.canonical(args)


def _decode(task: Step[Any, Any], result: Json) -> Any:
    try:
        return task.codec.decode_result(result)
    except PayloadError as error:
        raise DefinitionError(f"the recorded result of {task.name} no longer fits its annotation: {error}") from error


def _failure(run_id: str, record: StepRecord) -> Exception:
    error = record.error or {}
    outcome = {"rejected": "rejected", "failed": "failed"}.get(record.forward, "unknown")
    said = f"{error.get('type')}: {error.get('message')}" if error else "given up before it began"
    text = f"step {record.key} of run {run_id} ended {outcome} after {record.attempts or 1} attempt(s): {said}"
    return StepFailed(text, run_id=run_id, key=record.key, outcome=cast(Any, outcome), error=error)


def _legacy_request(task: Any, args: tuple[Any, ...], kwargs: dict[str, Any], code: SagaCode) -> Request:
    """A Celery task that was not declared as a step, or a signature of one."""
    if isinstance(task, dict) and task.get("task"):
        if task.get("subtask_type"):
            raise UsageError(
                f"a {task['subtask_type']} is not a step of a saga in this release; ask for its tasks one by one"
            )
        name, options = task["task"], dict(task.get("options") or {})
        args, kwargs = (*args, *task.get("args", ())), {**(task.get("kwargs") or {}), **kwargs}
    elif hasattr(task, "run") and isinstance(getattr(task, "name", None), str):
        name, options = task.name, {"queue": getattr(task, "queue", None)}
    else:
        raise UsageError(f"saga.step() takes a step, a Celery task or a signature, not {type(task).__name__}")
    declared = _declared(name)
    if declared is not None:
        queue = options.get("queue")
        declared = declared.with_options(queue=queue) if queue else declared
        return _request(declared, declared.codec.encode_call(args, kwargs), code)
    stand_in = _LegacyStep(name, StepOptions(queue=options.get("queue") or ""))
    encoded = legacy_codec.encode_call(args, kwargs)
    check(encoded, what=f"the arguments of {name}")
    return _request(stand_in, encoded, code)


class _LegacyStep(Step[Any, Any]):
    """A Celery task used as a step as it is."""

    def __init__(self, name: str, options: StepOptions) -> None:
        super().__init__(_nothing, name, options)
        self.codec = legacy_codec


def _nothing(*args: Any, **kwargs: Any) -> Any:
    """Stands for the function of a Celery task, which only a worker knows."""


def _declared(name: str) -> Step[Any, Any] | None:
    from orchestrator.step import registry as steps

    return steps.steps.get(name)


async def sleep(duration: timedelta) -> None:
    """Sleep durably; no worker is held meanwhile."""
    await asyncio.sleep(duration.total_seconds())


async def sleep_until(instant: datetime) -> None:
    """Sleep durably until an aware instant; one in the past returns at once.  Raises: UsageError for a naive one."""
    if instant.tzinfo is None:
        raise UsageError("saga.sleep_until() needs an aware datetime; say which time zone it is in")
    await asyncio.sleep(max(0.0, (instant - now()).total_seconds()))


def now() -> datetime:
    """Return journal time (aware, UTC): the same on every replay, and standing still between outcomes."""
    return _code("now").now()


def uuid4() -> _uuid.UUID:
    """Return a UUID that is the same on every replay."""
    return _uuid.UUID(bytes=_digest("uuid4")[:16], version=4)


def random() -> float:
    """Return a number in [0, 1) that is the same on every replay."""
    return int.from_bytes(_digest("random")[:7]) / 2.0**56


def _digest(call: str) -> bytes:
    code = _code(call)
    return hashlib.sha256(f"{code.fold.info.id}\0{code.branch.key(call)}".encode()).digest()


def once(name: str, function: Callable[[], T | Awaitable[T]]) -> asyncio.Future[T]:
    """Run `function` in the worker that drives the saga and record what it returned; replays get the recorded value.

    It is tried again as a step is; its result comes back as plain JSON.
    """
    code = _code("once")
    if not is_name(name):
        raise UsageError("saga.once: its name must be text of 1 to 500 printable bytes")
    record = functools.partial(Asked, task=name, args={}, kind="once", effect=Effect.NONE, local=True)
    return code.ask(
        Request(
            name=f"once:{name}",
            asked=lambda key: record(key),
            same=lambda asked: asked.kind == "once",
            decode=lambda result: result,
            failure=functools.partial(_failure, code.fold.info.id),
            run=lambda: encode_any(_run(function), f"the result of saga.once({name!r})"),
        )
    )


def _run(function: Callable[[], Any]) -> Any:
    result = function()
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(value: Awaitable[T]) -> T:
    return await value


def version(change: str, minimum: int, maximum: int) -> int:
    """Answer `maximum` to a run that comes here for the first time, and what it was told then to every replay.

    A run that passed this point before the gate was deployed gets `minimum`.
    """
    return _code("version").version(change, minimum, maximum)


@dataclass(frozen=True, slots=True)
class Info:
    """What a saga may know about its run; `deadline` is an aware UTC instant."""

    run_id: str
    name: str
    version: int
    deadline: datetime | None
    attempt: int = 1


def info() -> Info:
    """Return the running saga's own description."""
    run = _code("info").fold.info
    return Info(run.id, run.saga, run.version, run.deadline)


async def wait(
    awaitables: Iterable[Any], *, timeout: float | timedelta | None = None, return_when: str = asyncio.ALL_COMPLETED
) -> tuple[list[asyncio.Future[Any]], list[asyncio.Future[Any]]]:
    """Wait as ``asyncio.wait`` does; returns (done, pending) as lists in the order of `awaitables`."""
    _code("wait")
    futures = [asyncio.ensure_future(item) for item in awaitables]
    if not futures:
        raise ValueError("saga.wait() needs something to wait for")
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()

    def release() -> None:
        if not waiter.done():
            waiter.set_result(None)

    def look(_: object) -> None:
        done = [future for future in futures if future.done()]
        failed = any(not f.cancelled() and f.exception() is not None for f in done)
        enough = {asyncio.FIRST_COMPLETED: bool(done), asyncio.FIRST_EXCEPTION: failed}.get(return_when, False)
        if enough or len(done) == len(futures):
            release()

    look(None)
    for future in futures:
        future.add_done_callback(look)
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    timer = None if seconds is None else loop.call_later(seconds, release)
    try:
        await waiter
    finally:
        if timer is not None:
            timer.cancel()
        for future in futures:
            future.remove_done_callback(look)
    return [f for f in futures if f.done()], [f for f in futures if not f.done()]


async def as_completed(awaitables: Iterable[Any]) -> AsyncIterator[asyncio.Future[Any]]:
    """Yield the futures of `awaitables` as they are done; those done at once in the order of `awaitables`."""
    pending = [asyncio.ensure_future(item) for item in awaitables]
    while pending:
        done, pending = await wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for future in done:
            yield future
