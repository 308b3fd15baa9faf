"""Runs steps as the Celery tasks that they are: through Celery's own tracer, under a time limit.

Owns the translation between what a task does (return, raise, retry, ignore, reject) and what the engine records.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what `signal` is made of
import asyncio
import contextlib
import ctypes
import inspect
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn

from billiard.einfo import ExceptionInfo
from celery import Celery, states
from celery._state import get_current_worker_task
from celery.app.trace import TraceInfo, build_tracer
from celery.exceptions import Reject, Retry
from celery.result import allow_join_result
from celery.utils.time import maybe_make_aware

from orchestrator.celery import handlers
from orchestrator.celery.events import Attempt, StepEvents, task_id
from orchestrator.celery.fixups import Fixups
from orchestrator.codec import FunctionCodec, check
from orchestrator.engine.worker import Invocation
from orchestrator.errors import PayloadError, Rejected, from_user_code
from orchestrator.machine.journal import AttemptEnded
from orchestrator.machine.policy import LONGEST_PAUSE_S, RetryPolicy
from orchestrator.step import Step, StepContext, StepTimeout, legacy_codec, running
from orchestrator.step import registry as step_registry
from orchestrator.store.connection import CommitUnknown, Connection, TransactionFailed
from orchestrator.store.turns import Taken

if TYPE_CHECKING:
    from orchestrator.store.transaction import Transactions


logger = logging.getLogger(__name__)


class _RolledBack(Exception):
    """Leaves the transaction of a step that failed; `invocation` says with what."""

    def __init__(self, invocation: Invocation) -> None:
        super().__init__()
        self.invocation = invocation


_invoked: ContextVar[str] = ContextVar("orchestrator_invoked", default="")  # the task that the engine runs
_asked: ContextVar[list[Retry] | None] = ContextVar("orchestrator_asked", default=None)  # what `retry` did not raise
_limit: ContextVar[float] = ContextVar("orchestrator_limit", default=0.0)
_hangs: ContextVar[Callable[[], None] | None] = ContextVar("orchestrator_hangs", default=None)
_HANGS_AFTER_S = 1.0
_UNCOMMITTED = 1000  # attempts that the events of a process remember
# Without the conversions from and to enumerations, which take twice as long as all else that an alarm does.
_handle: Callable[[int, Any], Any] = _signal.signal


class Runner:
    """Runs steps in this process; see `orchestrator.engine.worker.StepRunner`."""

    def __init__(self, app: Celery, worker: str, transactions: Callable[[], Transactions], events: StepEvents) -> None:
        self.worker = worker
        self._app = app
        self._open_transactions = transactions
        self._events = events
        self._attempts: dict[int, Attempt] = {}  # by fence: those that are told of once their outcome is committed
        self._fixups = Fixups(app)
        self._tracers: dict[str, Callable[..., Any]] = {}
        self._transactions: Transactions | None = None

    def invoke(self, taken: Taken, context: StepContext) -> Invocation:
        """Run a step, undo or probe and encode its result."""
        task = self._app.tasks.get(taken.task)
        if task is None:
            return Invocation(error=LookupError(f"task {taken.task} is not registered in this worker"), harmless=True)
        try:
            args, kwargs = _decode(taken)
            told = handlers.told(task, args)
        except Exception as error:
            return Invocation(error=error, harmless=True)
        if told is None:
            return self._traced(task, taken, context, args, kwargs)
        invocation = self._traced(task, taken, context, told, kwargs)
        # What a handler returns interests nobody, so that it need not be fit to be stored.
        return Invocation() if isinstance(invocation.error, PayloadError) else invocation

    def invoke_in_transaction(
        self, taken: Taken, context: StepContext, settle: Callable[[Connection, Invocation], None]
    ) -> Invocation:
        """Run a transactional step; its rows and what `settle` writes commit together.

        Raises: CommitUnknown, TransactionEnded; whatever `settle` raises, after a rollback.
        """
        task = self._app.tasks.get(taken.task)
        try:
            args, kwargs = _decode(taken)
        except Exception as error:
            return Invocation(error=error, harmless=True)

        def work(connection: Any) -> Invocation:
            context.connection = connection
            invocation = self._traced(task, taken, context, (connection, *args), kwargs)
            if invocation.error is not None:
                raise _RolledBack(
                    invocation
                )  # at once: its transaction may be unusable, and its error must not be lost
            return invocation

        def finish(connection: Connection, invocation: Invocation) -> bool:
            settle(connection, invocation)
            return True

        if self._transactions is None:
            self._transactions = self._open_transactions()
        declared = step_registry.steps[taken.task]
        timeout = timedelta(seconds=(taken.call or {}).get("t", 300.0))
        try:
            return self._transactions.run(wants_session(declared), timeout, work, finish)
        except _RolledBack as failed:
            return failed.invocation
        except TransactionFailed as failed:
            return Invocation(error=failed.reason, harmless=True)

    def is_transactional(self, task: str) -> bool:
        """Tell whether a task is declared as a transactional step."""
        declared = step_registry.steps.get(task)
        return declared is not None and declared.options.transactional

    def non_retryable(self, task: str) -> RetryPolicy | None:
        """Return the declared policy of a task, for its non-retryable errors."""
        declared = step_registry.steps.get(task)
        return declared.options.retry if declared else None

    def finished(self, taken: Taken, outcome: AttemptEnded) -> None:
        """Send the task's events, after the commit."""
        attempt = self._attempts.pop(taken.fence or 0, None)
        if taken.role == "once":
            self._fixups.after_step()
        if taken.role != "once" and not taken.refused:
            self._events.finish(attempt, taken, outcome, taken.again)

    def _begin(self, taken: Taken) -> Attempt | None:
        attempt = self._events.begin(taken)
        if attempt is not None:
            if len(self._attempts) >= _UNCOMMITTED:  # far more than are about at once: these have lost their fences
                self._attempts.pop(next(iter(self._attempts)))
            self._attempts[taken.fence or 0] = attempt
        return attempt

    def _traced(
        self, task: Any, taken: Taken, context: StepContext, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Invocation:
        tracer = self._tracers.get(taken.task)
        if tracer is None:
            _let_replace(task)
            _hear_retry(task)
            options = {"loader": self._app.loader, "hostname": self.worker, "app": self._app, "Info": _StepTrace}
            tracer = build_tracer(taken.task, task, **options)
            self._tracers[taken.task] = tracer
        request = {
            "id": task_id(taken), "root_id": taken.run_id, "retries": taken.attempt - 1,
            "hostname": self.worker, "ignore_result": True,
            "is_eager": True,  # so that retry() raises and sends nothing
            "delivery_info": {"routing_key": taken.queue, "exchange": "", "redelivered": taken.attempt > 1},
            "headers": {},  # none of its own; a Context without them looks through all its names for some, each time
            **self._events.representations,
        }  # fmt: skip
        asked: list[Retry] = []
        invoked, hears = _invoked.set(task.name), _asked.set(asked)
        seconds = (context.deadline - taken.now).total_seconds()
        limit, hangs = _limit.set(seconds), _hangs.set(context.hangs)
        attempt = self._begin(taken)
        process = os.getpid()
        try:
            guard = contextlib.nullcontext() if isinstance(task, steps_base()) else time_limit(seconds, context.hangs)
            with self._fixups.around_step(), running(context), guard:
                traced = tracer(request["id"], args, kwargs, request)
        except BaseException as error:  # KeyboardInterrupt too: in a worker SIGINT raises none, so the step's code did
            self._fixups.after_failure()
            return Invocation(error=error)
        finally:
            if os.getpid() != process:
                _end_copy(task.name)
            if attempt is not None:
                self._events.leave(attempt)
            _invoked.reset(invoked)
            _asked.reset(hears)
            _limit.reset(limit)
            _hangs.reset(hangs)
        if traced.info is not None:
            self._fixups.after_failure()
        elif asked:  # it wants to be called again, whatever it returned
            return _again(asked[-1])
        return _translate(task, taken, traced)


class _StepTrace(TraceInfo):
    """Tells of a failure with the traceback from user code on.

    Celery copies the code of each frame, its own large ones too: a third of the time of a worker whose steps fail.
    """

    __slots__ = ()

    def handle_failure(self, task: Any, req: Any, **options: Any) -> Any:
        """Hand the failure on, as Celery does; what a handler or the result backend raises is not the step's error.

        In its place a step that was rejected would be in doubt: tried again, and undone although it did nothing.
        """
        error = self.retval
        error.__traceback__ = from_user_code(error.__traceback__)
        try:
            return super().handle_failure(task, req, **options)
        except BaseException:
            logger.exception("step %s failed, and so did what is told of that; its own error counts", req.id)
            return ExceptionInfo((type(error), error, error.__traceback__))


def _end_copy(task: str) -> NoReturn:
    """End a copy of the worker's child that a step has made; it would drain on the connections of its parent."""
    logger.error("step %s forked, and its copy came back from the step; end such a copy with os._exit()", task)
    os._exit(os.EX_SOFTWARE)


def _let_replace(task: Any) -> None:
    """Let what replaces a task run in its place and be waited for, which Celery refuses in a worker."""
    on_replace = task.on_replace

    def replace(sig: Any) -> Any:
        with allow_join_result() if _invoked.get() else contextlib.nullcontext():
            return on_replace(sig)

    task.on_replace = replace


def _hear_retry(task: Any) -> None:
    """Hear of ``retry(throw=False)``: Celery sends the message of the next attempt by then, and the task goes on."""
    given = task.retry

    def retry(*args: Any, **options: Any) -> Any:
        wanted = given(*args, **options)
        asked = _asked.get()
        if asked is not None and _invoked.get() == task.name:
            asked.append(wanted)
        return wanted

    task.retry = retry


def steps_base() -> type:
    """Return the mark of tasks that arm their own time limit, innermost."""
    return StepTaskMixin


class StepTaskMixin:
    """What makes a Celery task of a step; mixed into the app's own Task class."""

    step: Step[Any, Any]
    orchestrator: Any
    typing = False

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step's function: with the engine's values inside a saga, with a message's values outside.

        What replaces a plain task in a saga gets values as of a message, too.
        """
        declared = self.step
        if _invoked.get() == declared.name:
            with time_limit(_limit.get(), _hangs.get()):
                return call(declared.function, args, kwargs)
        if not _invoked.get():
            self.orchestrator.refuse_plain_messages(declared.name)
        encoded = declared.codec.encode_call(args, kwargs, from_json=True)
        args, kwargs = declared.codec.decode_call(encoded)
        if declared.options.transactional:
            return self.orchestrator.in_transaction(declared, args, kwargs)
        return declared.codec.encode_result(call(declared.function, args, kwargs))

    def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        """Send the step as a plain Celery task, its arguments encoded from the annotations."""
        encoded = self._encoded(tuple(args or ()), dict(kwargs or {}), options.pop("from_json", False))
        return super().apply_async(*self.step.codec.message_call(encoded), *more, **options)  # type: ignore[misc]

    def _encoded(self, args: tuple[Any, ...], kwargs: dict[str, Any], from_json: bool) -> dict[str, Any]:
        """Encode what a caller passes; in a worker also what Celery hands on to a next link, which is JSON by then."""
        codec = self.step.codec
        try:
            return codec.encode_call(args, kwargs, from_json=from_json)
        except PayloadError:
            if from_json or get_current_worker_task() is None:
                raise
            with contextlib.suppress(PayloadError):
                return codec.encode_call(args, kwargs, from_json=True)
            raise

    def signature_from_request(self, *given: Any, **options: Any) -> Any:
        """Return what Celery's `retry` sends: the arguments of a message, as they came."""
        return super().signature_from_request(*given, **options).set(from_json=True)  # type: ignore[misc]


def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function, running a coroutine to its end."""
    result = function(*args, **kwargs)
    return asyncio.run(_awaited(result)) if inspect.iscoroutine(result) else result


async def _awaited(coroutine: Any) -> Any:
    return await coroutine


def wants_session(declared: Step[Any, Any]) -> bool:
    """Tell whether a transactional step takes a SQLAlchemy Session rather than a Connection."""
    first = next(iter(inspect.signature(declared.function).parameters.values()), None)
    return first is not None and "Session" in str(first.annotation)


def time_limit(seconds: float, hangs: Callable[[], None] | None = None) -> contextlib.AbstractContextManager[None]:
    """Interrupt the block after `seconds` with StepTimeout, as soon as it runs Python code.

    In the main thread `hangs` is called in the midst of the block once it has taken a second; it must not raise.
    """
    if seconds <= 0:
        return contextlib.nullcontext()
    if threading.current_thread() is threading.main_thread():
        return _Alarm(seconds, hangs)
    return _interruption(seconds)


def _overran(seconds: float) -> StepTimeout:
    return StepTimeout(f"the step overran its start_to_close_timeout of {seconds:g} s and was interrupted")


class _Alarm:
    """By a signal, which reaches the main thread even while it waits."""

    __slots__ = ("_before", "_hangs", "_over", "_seconds", "_until")

    def __init__(self, seconds: float, hangs: Callable[[], None] | None) -> None:
        self._seconds, self._over = seconds, False
        self._hangs = hangs if seconds > _HANGS_AFTER_S else None

    def __enter__(self) -> None:
        self._until = monotonic() + self._seconds
        self._before = _handle(signal.SIGALRM, self._interrupt)
        signal.setitimer(signal.ITIMER_REAL, self._seconds if self._hangs is None else _HANGS_AFTER_S)

    def __exit__(self, *_: object) -> None:
        self._over = True  # a signal that came just before is heard a little later
        signal.setitimer(signal.ITIMER_REAL, 0)
        _handle(signal.SIGALRM, self._before)

    def _interrupt(self, number: int, frame: Any) -> None:
        if self._over:
            return
        if self._hangs is None:
            raise _overran(self._seconds)
        hangs, self._hangs = self._hangs, None
        hangs()
        signal.setitimer(signal.ITIMER_REAL, max(self._until - monotonic(), 0.001))


@contextlib.contextmanager
def _interruption(seconds: float) -> Iterator[None]:
    """By an exception that the interpreter raises in this thread; one that comes too late is taken back."""
    thread, lock, over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(StepTimeout))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except StepTimeout as error:
        if error.args:
            raise
        raise _overran(seconds) from None  # what is raised into a thread is a class, and comes without words
    finally:
        timer.cancel()
        with lock:
            over = True
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)


def _codec_of(taken: Taken) -> FunctionCodec:
    declared = step_registry.steps.get(taken.task)
    return declared.codec if declared else legacy_codec


def _decode(taken: Taken) -> tuple[tuple[Any, ...], dict[str, Any]]:
    codec = _codec_of(taken)
    args = taken.call["a"]
    if taken.role == "probe":
        args = {name: value for name, value in args.items() if name in codec.parameters}
    return codec.decode_call(args)


def _translate(task: Any, taken: Taken, traced: Any) -> Invocation:
    info = traced.info
    if info is None and taken.role == "undo":
        return Invocation()  # it is undone; what that gave is for nobody, and so need not be fit to be stored
    if info is None:
        return _returned(task, taken, traced.retval)
    raised = info.retval
    if info.state == states.RETRY and isinstance(raised, Retry):
        return _again(raised)
    if info.state == states.IGNORED:
        return Invocation(None)
    if isinstance(raised, Reject):
        return Invocation(error=Rejected(str(raised.reason or "the task raised Reject")))
    if not isinstance(raised, BaseException):
        return Invocation(error=RuntimeError(str(raised)))
    told = traced.retval  # of the exception itself, or of one in its place that can be pickled
    return Invocation(error=raised, trace=told.traceback if getattr(told, "exception", None) is raised else "")


def _returned(task: Any, taken: Taken, value: Any) -> Invocation:
    ignored = bool(task.ignore_result) and taken.task not in step_registry.steps  # Celery looks at no such result
    try:
        result = _codec_of(taken).encode_result(value)
        if ignored:
            check(result)
        return Invocation(result)
    except PayloadError as error:
        return Invocation() if ignored else Invocation(error=error)


def _again(wanted: Retry) -> Invocation:
    return Invocation(error=wanted.exc or wanted, pause=_seconds(wanted.when))


def _seconds(when: Any) -> float | None:
    """Return the pause that a task asks for, if it makes sense; an instant without a time zone is UTC, as in Celery."""
    if isinstance(when, datetime):
        when = (maybe_make_aware(when) - datetime.now(UTC)).total_seconds()
    if not isinstance(when, int | float) or math.isnan(when):
        return None
    return min(max(0.0, float(when)), LONGEST_PAUSE_S)


__all__ = ["CommitUnknown", "Runner", "StepTaskMixin", "StepTimeout", "call", "time_limit"]
