"""Steps: ordinary functions that become Celery tasks and remember how they are undone.

Owns what an author declares about a step.  Must never import Celery or touch the database: an `Orchestrator` binds the
declared steps to its Celery app.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Concatenate, Generic, Literal, NoReturn, ParamSpec, Protocol, TypeVar, cast, overload

from orchestrator.codec import FunctionCodec, Json, PlainCodec, canonical_text, is_name
from orchestrator.declaration import OnUnknown, StepOptions, check_options, check_parameters, key_names, refuse_or_keep
from orchestrator.errors import DefinitionError, PayloadError, UsageError
from orchestrator.machine.journal import Undo
from orchestrator.machine.loop import inside_saga
from orchestrator.machine.policy import START_TO_CLOSE, Effect, Limit

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
C = TypeVar("C")


# To whoever has imported what declares a step or saga, and not the module that makes the app of it.
UNBOUND = "import the module that makes `Orchestrator(app)` first, or make it here"


class BoundTask(Protocol):
    """The Celery task that a step was registered as."""

    name: str

    def delay(self, *args: Any, **kwargs: Any) -> Any: ...
    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any: ...
    def s(self, *args: Any, **kwargs: Any) -> Any: ...
    def si(self, *args: Any, **kwargs: Any) -> Any: ...
    def signature(self, args: Any = None, *more: Any, **options: Any) -> Any: ...
    def map(self, it: Any) -> Any: ...
    def starmap(self, it: Any) -> Any: ...
    def chunks(self, it: Any, n: int) -> Any: ...


class Step(Generic[P, R]):
    """A declared step: call it like the function it is, hand it to ``saga.step``, or ``delay`` it like a task."""

    def __init__(self, function: Callable[..., Any], name: str, options: StepOptions) -> None:
        self.function = function
        self.name = name
        self.options = options
        self.codec = FunctionCodec(function, skip=1 if options.transactional else 0, what=name)
        self.probe_step: Step[Any, Any] | None = None
        self.bound: BoundTask | None = None
        self.__name__ = getattr(function, "__name__", name)
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__wrapped__ = function
        self._undo: Undo | None = None
        _check(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        self._refuse_in_saga("called")
        return cast(R, self.function(*args, **kwargs))

    def _refuse_in_saga(self, what: str) -> None:
        if inside_saga():
            done = what if what == "called" else f"sent with {what}()"
            raise UsageError(
                f"{self.name} was {done} directly in saga code; write `await saga.step({self.__name__}, ...)`"
            )

    def __repr__(self) -> str:
        return f"<step {self.name}>"

    def probe(self, function: Callable[..., C]) -> Step[..., C]:
        """Register `function` as the way to ask the provider what became of this step.

        It takes the parameters of the step (or fewer, by name), returns the step's result if the effect is there and
        None if it certainly is not.  Raises: DefinitionError for a parameter that the step does not have.
        """
        probe: Step[..., C] = Step(function, name_of(function), replace(_PROBE_OPTIONS, queue=self.options.queue))
        check_parameters(probe, self, "probe", also=())
        self.probe_step = probe
        registry.add(probe)
        return probe

    def with_options(self, **changes: Any) -> Step[P, R]:
        """Return this step with other options for one call; `key` names the call itself (`limit_key` its limit)."""
        for name in changes:
            if name not in StepOptions.__dataclass_fields__:
                known = ", ".join(sorted(StepOptions.__dataclass_fields__.keys() - {"celery"}))
                raise DefinitionError(f"step {self.name} has no option {name}= for a call; it has {known}")
        options = replace(self.options, **changes)
        if "compensate" in changes and "effect" not in changes and self.options.effect is Effect.COMPENSATABLE:
            options = replace(options, effect=None)
        step = copy.copy(self)
        step.options, step._undo = options, None
        _check(step)
        return step

    # -- as a Celery task ----------------------------------------------------------------------------------------------
    @property
    def task(self) -> BoundTask:
        """The registered Celery task.  Raises: UsageError if no Orchestrator was bound to an app."""
        if self.bound is None:
            raise UsageError(f"step {self.name} belongs to no Celery app yet; {UNBOUND}")
        return self.bound

    def delay(self, *args: Any, **kwargs: Any) -> Any:
        """Send it as a plain Celery task, outside of any saga.  Raises: UsageError in saga code."""
        self._refuse_in_saga("delay")
        return self.task.delay(*args, **kwargs)

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send it as a plain Celery task with Celery's options, outside any saga.  Raises: UsageError in saga code."""
        self._refuse_in_saga("apply_async")
        return self.task.apply_async(args, kwargs, **options)

    def s(self, *args: Any, **kwargs: Any) -> Any:
        """Return a signature: Celery's, or before an app is bound a mapping of the same shape."""
        return self.bound.s(*args, **kwargs) if self.bound else _Unbound(task=self.name, args=args, kwargs=kwargs)

    def si(self, *args: Any, **kwargs: Any) -> Any:
        """Return an immutable signature, which takes no result of a link before it; see `s`."""
        return self.bound.si(*args, **kwargs) if self.bound else _Unbound(self.s(*args, **kwargs), immutable=True)

    def signature(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Return a signature with options, as Celery's `signature`.  Raises: UsageError before an app is bound."""
        return self.task.signature(args, kwargs, **options)

    def map(self, items: Any) -> Any:
        """Return Celery's `map`: a call for each item, one by one.  Raises: UsageError before an app is bound."""
        return self.task.map(items)

    def starmap(self, items: Any) -> Any:
        """Return Celery's `starmap`: each item is a list of arguments.  Raises: UsageError before an app is bound."""
        return self.task.starmap(items)

    def chunks(self, items: Any, n: int) -> Any:
        """Return Celery's `chunks`: a group of starmaps of `n` items.  Raises: UsageError before an app is bound."""
        return self.task.chunks(items, n)

    # -- what the machine is told --------------------------------------------------------------------------------------
    @property
    def effect(self) -> str:
        """The declared effect, or the empty string."""
        if self.options.effect is not None:
            return self.options.effect
        return Effect.COMPENSATABLE if self.options.compensate is not None else ""

    @property
    def queue(self) -> str:
        """The queue it is declared for, or that the app routes its task to."""
        return self.options.queue or route(self.name)

    @property
    def on_unknown(self) -> OnUnknown:
        """What happens when the outcome is unknown.  Raises: DefinitionError if a probe decides and there is none."""
        if self.options.on_unknown == "probe" and self.probe_step is None:
            raise DefinitionError(
                f'step {self.name}: on_unknown="probe" needs a probe: declare one with `@<step>.probe`'
            )
        return self.options.on_unknown or ("probe" if self.probe_step else "compensate")

    def named_undo(self) -> Undo | None:
        """Return the compensation with its parameters by name, for any arguments that hold them."""
        return None if self.options.compensate is None else _routed(_undo_of(self))

    def arm(self, args: dict[str, Json]) -> Undo | None:
        """Return the compensation of a call with these encoded arguments."""
        if self.options.compensate is None:
            return None
        if self._undo is None:
            self._undo = _routed(_undo_of(self))
        undo = self._undo
        missing = [name for name in undo.names if name not in args]
        if missing:
            known = self.codec.encode_defaults(missing)
            undo = replace(undo, names=(), args={n: args.get(n, known.get(n)) for n in undo.names})
        other = _declared_undo(self, undo)
        if other is None or not other.limited:
            return undo
        return replace(undo, limit=other.limit({n: args[n] for n in undo.names} if undo.args is None else undo.args))

    @property
    def limited(self) -> bool:
        """Whether it has a rate limit or a concurrency of its own."""
        return self.options.rate_limit is not None or self.options.concurrency is not None

    def limit(self, args: dict[str, Json]) -> dict[str, Json] | None:
        """Return the gate that a call with these encoded arguments has to pass, with its limits; None without any.

        Raises: UsageError if its key is no name.
        """
        if not self.limited:
            return None
        gate = self.name
        if self.options.limit_key is not None:
            key = self._limit_key(self.options.limit_key, args)
            if not is_name(key):
                raise UsageError(f"step {self.name}: the key of its limit must be 1 to 500 printable bytes of text")
            gate = f"{gate}:{key}"
        return Limit(self.options.rate_limit, self.options.concurrency).encode(gate)

    def _limit_key(self, key: str | Callable[..., Any], args: dict[str, Json]) -> str:
        names = key_names(key)
        known = {**self.codec.encode_defaults(name for name in names if name not in args), **args}
        if isinstance(key, str):
            value = known[key]
            return value if isinstance(value, str) else canonical_text(value)
        return str(key(**self.codec.decode_arguments(known, names)))


class _Unbound(dict[str, Any]):
    """A signature before an app is bound.  Joined by ``|`` as mappings are, one of the two links would be lost."""

    def __or__(self, other: Any) -> NoReturn:
        raise UsageError(
            f"{self['task']} belongs to no Celery app yet, so that its signature cannot be joined with another one; "
            "create `Orchestrator(app)` first, or make the canvas in a function that is called later"
        )

    __ror__ = __ior__ = __or__


_PROBE_OPTIONS = StepOptions(effect=Effect.NONE)


# -- declaring ---------------------------------------------------------------------------------------------------------
def refuse_twin(what: str, known: Callable[..., Any], function: Callable[..., Any]) -> None:
    """Refuse a second function under the name of one in a module: every worker would run the later one for both.

    One of another module is warned of in the log, for it may be meant, such as a stand-in in tests.  A module that is
    imported again, or under two names, declares its own anew, and so may functions that are made within others.
    Raises: DefinitionError.
    """
    theirs, ours = (getattr(each, "__globals__", {}) for each in (known, function))
    there, here = (getattr(each, "__qualname__", "<locals>") for each in (known, function))
    if known is function or "<locals>" in there or "<locals>" in here:
        return
    both = f"{what} is declared by {name_of(known)} and by {name_of(function)}: workers run the later one for both"
    if theirs is ours:
        if getattr(ours.get("__spec__"), "_initializing", False):  # neither loaded again nor redefined line by line
            raise DefinitionError(f"{both}. Give one of them another name")
    elif there != here or (theirs.get("__file__") != ours.get("__file__") and name_of(known) != name_of(function)):
        logger.warning("%s", both)


class Registry:
    """All steps declared in this process, by task name."""

    def __init__(self) -> None:
        self.steps: dict[str, Step[Any, Any]] = {}
        self._listeners: list[Callable[[Step[Any, Any]], None]] = []

    def add(self, step: Step[Any, Any]) -> None:
        """Add `step`, and tell whoever binds steps to an app.  Raises: DefinitionError if its name is another one's."""
        if step.name in self.steps:
            refuse_twin(f"step {step.name}", self.steps[step.name].function, step.function)
        self.steps[step.name] = step
        for listener in self._listeners:
            listener(step)

    def listen(self, listener: Callable[[Step[Any, Any]], None]) -> None:
        """Call `listener` for every step declared so far and from now on."""
        self._listeners.append(listener)
        for step in list(self.steps.values()):
            listener(step)


registry = Registry()
_routes: dict[str, str] = {}
_router: Callable[[str], str] = lambda name: ""  # noqa: E731


def route(name: str) -> str:
    """Return the queue that the bound app routes a task to; the empty string before an app is bound."""
    if name not in _routes:
        _routes[name] = _router(name)
    return _routes[name]


def set_router(router: Callable[[str], str]) -> None:
    """Let the bound app say where tasks go."""
    global _router
    if router != _router:  # others may be routing in other threads
        _router = router
        _routes.clear()


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a step or saga: that under which workers import it, though its module be run as a script."""
    module, namespace = function.__module__, getattr(function, "__globals__", {})
    if module in ("__main__", "__mp_main__"):
        spec, file = namespace.get("__spec__"), namespace.get("__file__")
        module = spec.name if spec is not None else Path(file).stem if file else module
    return f"{module}.{function.__name__}"


def _check(step: Step[Any, Any]) -> None:
    check_options(step)
    if step.options.compensate is not None:
        _undo_of(step)


def _undo_of(step: Step[Any, Any]) -> Undo:
    """Return the compensation, with a queue only if one is declared: at import the app may not be configured yet."""
    other = step.options.compensate
    if isinstance(other, dict) and "task" in other:  # a signature: arguments of its own
        return _signed_undo(step, other)
    if not isinstance(other, Step) and hasattr(other, "run") and hasattr(other, "name"):
        # A plain Celery task takes parameters by name as well.
        plain = Step[Any, Any](other.run, other.name, StepOptions(queue=getattr(other, "queue", "") or ""))
        other = registry.steps.get(other.name, plain)
    if isinstance(other, Step):
        check_parameters(other, step, "compensation", also=("result",))
        if other.options.limit_key is not None and "result" in key_names(other.options.limit_key):
            raise DefinitionError(
                f"step {step.name}: the limit of its compensation {other.name} counts by `result`, which is not known "
                "when the undo is armed"
            )
        return _named_undo(other)
    raise DefinitionError(
        f"step {step.name}: compensate= takes a step, a Celery task or a signature like `refund.s(...)`, "
        f"not {other!r:.80}"
    )


def _signed_undo(step: Step[Any, Any], signature: dict[str, Any]) -> Undo:
    name, options = str(signature["task"]), dict(signature.get("options") or {})
    if signature.get("subtask_type") or name.startswith("celery."):
        raise DefinitionError(
            f"step {step.name}: compensate= takes one task, and {name} is a canvas or a task of Celery's own; "
            "no worker would ever take it as an undo, so make a step of it"
        )
    queue = options.pop("queue", None)
    if any(value is not None for value in options.values()):
        raise DefinitionError(
            f"step {step.name}: of a signature compensate= takes arguments and queue, not {', '.join(options)}; "
            "what else there is to say of an undo its own step declares"
        )
    declared = registry.steps.get(name)
    undo = _named_undo(declared) if declared else Undo(name)
    codec = declared.codec if declared else legacy_codec
    encoded = codec.encode_call(tuple(signature.get("args") or ()), dict(signature.get("kwargs") or {}))
    undo = replace(undo, names=(), args=encoded, result=undo.result and "result" not in encoded)
    return replace(undo, queue=str(getattr(queue, "name", queue))) if queue else undo


def _routed(undo: Undo) -> Undo:
    return undo if undo.queue else replace(undo, queue=route(undo.task))


def _declared_undo(step: Step[Any, Any], undo: Undo) -> Step[Any, Any] | None:
    other = step.options.compensate
    return other if isinstance(other, Step) else registry.steps.get(undo.task)


def _named_undo(other: Step[Any, Any]) -> Undo:
    options = other.options
    timeout = (
        options.start_to_close_timeout.total_seconds() if options.start_to_close_timeout != START_TO_CLOSE else 0.0
    )
    return Undo(
        task=other.name,
        names=tuple(name for name in other.codec.parameters if name != "result"),
        result="result" in other.codec.parameters,
        queue=other.options.queue,
        timeout=timeout,
        retry=options.retry.encode() if options.retry else None,
    )


legacy_codec = PlainCodec(what="the Celery task")
"""For Celery tasks that were not declared as steps."""


# -- while a step runs -------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class StepContext:
    """What a running step may know about itself; `deadline` is an aware UTC instant.

    `idempotency_key` stays the same over retries and resumes.  In a compensation `undoes` is the idempotency key of the
    step that is undone; a probe has the key of the step that it asks for.
    """

    run_id: str
    key: str
    attempt: int
    idempotency_key: str
    deadline: datetime
    heartbeat_details: Json = None
    undoes: str = ""
    beat: Callable[[Json], None] | None = None
    hangs: Callable[[], None] | None = None
    starts: int = 0
    connection: Any = None
    restored_by: str | None = None  # who looked after the restore that the run has heard of, if it has

    def heartbeat(self, details: Json = None) -> None:
        """Tell that the step is alive, and keep `details` for the next attempt.

        Raises: StepStopped if the result is not wanted any more; let it pass.
        """
        if self.beat is not None:
            self.beat(details)


class StepStopped(Exception):
    """Raised by ``heartbeat`` when the run was cancelled or this attempt was given up; clean up and let it pass."""


class StepTimeout(TimeoutError):
    """The step overran its start_to_close_timeout and was interrupted; its outcome is in doubt."""


# Nothing that a step declares of its own errors is said of these: its code has run, to its end even.
NOT_ITS_OWN = (StepStopped, StepTimeout, PayloadError)


current_step: ContextVar[StepContext | None] = ContextVar("orchestrator_step", default=None)
_in_main_thread: StepContext | None = None


@contextlib.contextmanager
def running(context: StepContext) -> Iterator[None]:
    """Let this be the step that runs, for its own code and for threads that this starts in a process of its own."""
    global _in_main_thread
    token, outer = current_step.set(context), _in_main_thread
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        _in_main_thread = context
    try:
        yield
    finally:
        current_step.reset(token)
        if is_main:
            _in_main_thread = outer


def stand_in() -> StepContext:
    """Return the context of a step outside of a saga, with a fresh idempotency key."""
    return StepContext("", "", 1, f"direct:{uuid.uuid4()}", datetime.now(UTC) + START_TO_CLOSE)


@contextlib.contextmanager
def in_transaction_of(connection: Any) -> Iterator[None]:
    """Let what this starts join the transaction of a step that is called as a plain Celery task, in a step or not."""
    context = current_step.get() or stand_in()
    outer, context.connection = context.connection, connection
    try:
        with running(context):
            yield
    finally:
        context.connection = outer


class _StepDecorator:
    """``@step`` and ``step.current()``."""

    @overload
    def __call__(self, function: Callable[P, Awaitable[R]], /) -> Step[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Step[P, R]: ...
    @overload
    def __call__(
        self, /, *, transactional: Literal[True], **options: Any
    ) -> Callable[[Callable[Concatenate[C, P], R]], Step[P, R]]: ...
    @overload
    def __call__(self, /, **options: Any) -> Callable[[Callable[P, R]], Step[P, R]]: ...
    def __call__(self, function: Any = None, /, **options: Any) -> Any:
        """Declare a function as a step.

        Options: `queue`, `priority`; `compensate` (a step taking, by name, any of this step's parameters and
        ``result``, or a signature); `effect`; `on_unknown` (compensate, probe or park); `retry`;
        `start_to_close_timeout`, `heartbeat_timeout` (timedelta); `transactional` (the first parameter is a connection;
        its writes commit with the step's completion); `local` (runs in the worker that drives the saga); `name`;
        `rate_limit` ("100/s", "5/m", "1000/h": how often it may begin) and `concurrency` (how many at once), over all
        workers; `key` (the name of a parameter, or a callable that takes some of them by name: each value has the
        limits for itself).  Any other option is Celery's own.
        Raises: DefinitionError at import.
        """
        if function is not None:
            return _declare(function, {})
        return lambda function: _declare(function, options)

    def current(self) -> StepContext:
        """Return the running step's context; outside of a saga a stand-in with a fresh idempotency key.

        A thread that a step has started knows of no context, and would take a fresh key at each attempt.
        """
        return current_step.get() or _in_main_thread or stand_in()


def _declare(function: Any, options: dict[str, Any]) -> Step[Any, Any]:
    _refuse_declared(function)
    own = {name: options.pop(name) for name in tuple(options) if name in StepOptions.__dataclass_fields__}
    name = options.pop("name", None) or name_of(function)
    if "key" in own:  # in a declaration the key of its limits; to name a call is for with_options()
        own["limit_key"] = own.pop("key")
    own["celery"] = refuse_or_keep(name, options)
    if own.get("rate_limit") is not None:
        own["celery"]["rate_limit"] = own["rate_limit"]  # for its messages as a plain task
    declared: Step[Any, Any] = Step(function, name, StepOptions(**own))
    registry.add(declared)
    return declared


def _refuse_declared(function: Any) -> None:
    name = getattr(function, "__name__", "")
    if isinstance(function, Step):
        raise DefinitionError(f"step {name!r}: {function.name} is a step already; one `@step` takes all options")
    if hasattr(function, "starter"):  # a saga, which this module cannot know
        raise DefinitionError(
            f"step {name!r}: {function.name} is a saga already; another saga asks for it with "
            f"`await saga.child({name}, ...)`, and a step that starts it is a function of its own"
        )


step = _StepDecorator()
