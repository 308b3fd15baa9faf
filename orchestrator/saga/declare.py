"""Declaring sagas: `define`, the registry, and the object that callers start.

Owns what an author says about a saga as a whole.  Must never know how its runs are stored or driven.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    NoReturn,
    ParamSpec,
    Protocol,
    TypeVar,
    Unpack,
    get_args,
    overload,
)

from orchestrator.codec import FunctionCodec, Json, check, is_name
from orchestrator.errors import DefinitionError, PayloadError, UnknownSagaError, UsageError
from orchestrator.machine.loop import inside_saga
from orchestrator.machine.policy import is_priority, must_be_timedelta
from orchestrator.machine.turn import Script
from orchestrator.step import UNBOUND, Step, name_of, refuse_twin

if TYPE_CHECKING:
    from orchestrator.options import StartManyOptions, StartOptions
    from orchestrator.result import SagaResult

P = ParamSpec("P")
R = TypeVar("R")
CodeErrors = Literal["park", "compensate"]
_LONGEST_DEADLINE = timedelta(days=365_000)


class Starter(Protocol):
    """Starts runs; an `Orchestrator` provides it."""

    def start(
        self, saga: Saga[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
    ) -> SagaResult: ...
    def start_many(
        self, saga: Saga[Any, Any], calls: Iterable[tuple[Any, ...]], options: dict[str, Any]
    ) -> list[SagaResult]: ...
    async def astart(
        self, saga: Saga[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
    ) -> SagaResult: ...
    def handle(self, saga: Saga[Any, Any], run_id: str) -> SagaResult: ...
    def unknown_tasks(self, names: set[str]) -> list[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaOptions:
    """Everything that is declared about a saga; see `define`."""

    version: int = 1
    deadline: timedelta | None = None
    queue: str = ""
    priority: int = 0
    on_code_error: CodeErrors = "park"
    signals: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.queue is None:  # Celery's way to leave it to the app
            object.__setattr__(self, "queue", "")


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
            raise UsageError(f"{self.name} was called in saga code; write `await saga.child({self.__name__}, ...)`")
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
            raise UsageError(
                f"{self.name} was started in saga code; write `await saga.child({self.__name__}, ...)`, or start it "
                "in a step if it is to go on by itself"
            )
        if self.starter is None:
            raise UsageError(f"saga {self.name} belongs to no Celery app yet; {UNBOUND}")
        return self.starter

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> SagaResult:
        """Start a run; it is committed in Postgres when this returns.

        Raises: PayloadError, ConflictError, StoreUnavailableError.
        """
        return self._starter().start(self, args, kwargs, {})

    def apply_async(
        self,
        args: list[Any] | tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        **options: Unpack[StartOptions],
    ) -> SagaResult:
        """Start a run with options: `task_id` (the run id), `countdown` (seconds), `eta` (aware), `priority` (higher
        first), `transaction` (the caller's own: the run starts if and only if it commits), `deadline` (timedelta).

        Raises: PayloadError, ConflictError, StoreUnavailableError; UsageError for an option that has no meaning here.
        """
        return self._starter().start(self, positional(args), kwargs or {}, {**options})

    def start_many(self, calls: Iterable[tuple[Any, ...]], **options: Unpack[StartManyOptions]) -> list[SagaResult]:
        """Start a run for each tuple of arguments, many with one commit; returns their handles in the same order.

        Takes the options of `apply_async` but `transaction`, for all of them; `task_ids` instead of `task_id`.
        Raises: as `apply_async`; then some are started, and to start all of them again with the same ids is harmless.
        """
        return self._starter().start_many(self, calls, {**options})

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> SagaResult:
        """Start a run without blocking the event loop; see `delay`."""
        return await self._starter().astart(self, args, kwargs, {})

    async def aapply_async(
        self,
        args: list[Any] | tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        **options: Unpack[StartOptions],
    ) -> SagaResult:
        """Start a run without blocking the event loop; see `apply_async`."""
        return await self._starter().astart(self, positional(args), kwargs or {}, {**options})

    def s(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a saga is no link of a canvas.  Raises: UsageError."""
        name = self.__name__
        raise UsageError(
            f"saga {self.name} has no signature, because Celery's canvas would not wait for its run: start it with "
            f"{name}.delay(...), many with {name}.start_many(...), and in a saga with `await saga.child({name}, ...)`"
        )

    si = signature = subtask = s

    def AsyncResult(self, task_id: str) -> SagaResult:  # noqa: N802 - Celery's name
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


def positional(args: Any) -> tuple[Any, ...]:
    """Return the positional arguments of a start.  Raises: UsageError for a lone one, which ``("42")`` is as well."""
    if args is not None and not isinstance(args, (list, tuple)):  # others can be iterated, too: a model by its fields
        kind = type(args).__name__
        raise UsageError(f"a saga is started with a list or tuple of arguments, such as (order,), not with a {kind}")
    return tuple(args or ())


class Registry:
    """All sagas declared in this process, by name and version."""

    def __init__(self) -> None:
        self.sagas: dict[tuple[str, int], Saga[Any, Any]] = {}
        self._listeners: list[Callable[[Saga[Any, Any]], None]] = []

    def add(self, saga: Saga[Any, Any]) -> None:
        """Add `saga`, and tell whoever binds sagas to an app.  Raises: DefinitionError if its name is another one's."""
        known = self.sagas.get((saga.name, saga.options.version))
        if known is not None:
            refuse_twin(f"saga {saga.name} version {saga.options.version}", known.function, saga.function)
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
    def declared(self) -> list[Saga[Any, Any]]:
        """The sagas of the application; those that this package brings along are not among them."""
        return [saga for saga in self.sagas.values() if not saga.__module__.startswith("orchestrator.")]

    @property
    def names(self) -> list[str]:
        return sorted({saga.name for saga in self.declared})


registry = Registry()


@overload
def define(function: Callable[P, Coroutine[Any, Any, R]], /) -> Saga[P, R]: ...
@overload
def define(
    *,
    name: str = ...,
    version: int = ...,
    deadline: timedelta | None = ...,
    queue: str | None = ...,
    priority: int = ...,
    on_code_error: CodeErrors = ...,
    signals: Mapping[str, Any] | None = ...,
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Saga[P, R]]: ...
def define(function: Any = None, /, *, name: str = "", **options: Any) -> Any:
    """Declare an async function as a saga.

    `version` pins runs: one that started with version 1 is driven by version 1, and several can be registered side by
    side under one `name`.  `deadline` (a timedelta from the start) compensates a run that takes longer.
    `on_code_error` says what a TypeError and its like in the saga function itself does to the run.  `signals` names the
    signals that it waits for, each with the type of its payload: any other is then refused where it is sent.
    Raises: DefinitionError at import.
    """
    if function is None:
        return lambda f: define_saga(f, name, options)
    return define_saga(function, name, options)


def _check_options(name: str, options: SagaOptions) -> None:
    if type(options.version) is not int or options.version < 1:
        raise DefinitionError(f"saga {name}: version must be a whole number, 1 or more")
    if not is_priority(options.priority):
        raise DefinitionError(f"saga {name}: priority must be a whole number from 0 to 9 (higher first)")
    if options.queue and not is_name(options.queue):
        raise DefinitionError(f"saga {name}: queue= must be text of at most 500 printable bytes")
    if options.deadline is not None:
        must_be_timedelta(f"saga {name}: deadline=", options.deadline)
        if not timedelta(0) < options.deadline <= _LONGEST_DEADLINE:
            raise DefinitionError(f"saga {name}: deadline= must be positive, and at most a thousand years")
    if not isinstance(options.signals or {}, Mapping):
        raise DefinitionError(f"saga {name}: signals= gives each name its type, such as {{'approved': str}}")
    if options.on_code_error not in get_args(CodeErrors):
        raise DefinitionError(f"saga {name}: on_code_error= is one of {', '.join(get_args(CodeErrors))}")


def define_saga(function: Any, name: str, options: dict[str, Any]) -> Saga[Any, Any]:
    """Declare and register a saga.  Raises: DefinitionError."""
    if isinstance(function, Step):
        raise DefinitionError(
            f"saga {function.__name__!r}: {function.name} is a step already; the saga is a function of its own, which "
            f"asks for it with `await saga.step({function.__name__}, ...)`"
        )
    if not inspect.iscoroutinefunction(function):
        raise DefinitionError(f"saga {getattr(function, '__name__', function)!r} must be an `async def` function")
    there_are = SagaOptions.__dataclass_fields__.keys()
    for option in options:
        if option not in there_are:
            known = ", ".join(sorted([*there_are, "name"]))
            raise DefinitionError(f"saga.define of {function.__name__} has no option {option}=; it has {known}")
    declared = SagaOptions(**options)
    _check_options(function.__name__, declared)
    name = name or name_of(function)
    if not is_name(name):
        raise DefinitionError(f"saga {name!r:.80}: its name must be text of 1 to 500 printable bytes")
    saga: Saga[Any, Any] = Saga(function, name, declared)
    registry.add(saga)
    return saga
