"""Saga code while it runs: requests become keys and futures, outcomes are delivered in journal order.

Owns the meeting of recorded and repeated requests, and therefore what drift is.  Must never record anything itself:
what is new goes to its `Recorder`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from types import NoneType
from typing import Any, NoReturn, Protocol

from orchestrator.errors import DriftError, UsageError, describe_exception
from orchestrator.machine.fold import Fold
from orchestrator.machine.journal import Asked, Entry, Json, Settled, Versioned
from orchestrator.machine.keys import Branch
from orchestrator.machine.loop import SagaLoop, SagaTask
from orchestrator.machine.record import Step

_SAID = 500  # characters of an error's message in a sentence about a drift


class Discarded(BaseException):
    """Thrown into saga code that is being dropped; it must not catch it."""


class ContinueAsNew(BaseException):
    """Ends this link of the run; it goes on with this input, under this version of its saga."""

    def __init__(self, given: Json, version: int) -> None:
        super().__init__("the run is continued as new")
        self.input = given
        self.version = version


class Recorder(Protocol):
    """Takes what saga code asks for that the journal does not have yet."""

    def record(self, entry: Entry) -> None: ...
    def abandon(self, key: str) -> None: ...
    def unlock(self, key: str, failed: bool) -> None: ...
    def unlock_left_blocks(self) -> None: ...


scope: ContextVar[str] = ContextVar("orchestrator_scope", default="")  # the blocks of partial rollback around a task


@dataclass(slots=True)
class Request:
    """What saga code asks for, before it has a key.

    `asked` makes the journal entry for a key; `same` tells whether recorded arguments equal these ones; `decode` turns
    a result into a value; `failure` turns an unsuccessful outcome into the exception that the awaiting code gets; `run`
    is the function of a ``saga.once``.
    """

    name: str
    asked: Callable[[str], Asked]
    same: Callable[[Asked], bool]
    decode: Callable[[Json], Any]
    failure: Callable[[Step], Exception]
    key: str = ""
    run: Callable[[], Any] | None = None


class RequestFuture(asyncio.Future[Any]):
    """The awaitable of a request; cancelling it abandons the request.  Sets of them keep the same order everywhere."""

    observed: bool = False
    key: str = ""

    def __init__(self, key: str, number: int, code: SagaCode) -> None:
        super().__init__(loop=code.loop)
        self.key, self.number, self._code = key, number, code

    def __hash__(self) -> int:
        return self.number

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled:
            self._code.abandon(self.key)
        return cancelled

    def add_done_callback(self, *args: Any, **kwargs: Any) -> None:
        self.observed = True
        super().add_done_callback(*args, **kwargs)

    def __await__(self) -> Any:
        self.observed = True
        return super().__await__()

    def __iter__(self) -> NoReturn:
        raise TypeError(self._not_awaited)

    def __getitem__(self, item: object) -> NoReturn:
        raise TypeError(self._not_awaited)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(self._not_awaited)

    @property
    def _not_awaited(self) -> str:
        return f"{self.key} was asked for, and not awaited: `await` it before its result is used"

    def result(self) -> Any:
        self.observed = True
        return super().result()

    def exception(self) -> BaseException | None:
        self.observed = True
        return super().exception()


class SagaCode:
    """One live execution of a saga function, at some position of its journal."""

    def __init__(self, main: Callable[[], Coroutine[Any, Any, Json]], fold: Fold) -> None:
        self.loop: Any = SagaLoop(fold.info.id)  # type: ignore[abstract]
        self.loop.code = self  # type: ignore[attr-defined]
        self.fold = fold
        self._main = main
        self._task: asyncio.Task[Any] | None = None
        self._requests: dict[str, Request] = {}
        self._futures: dict[str, RequestFuture] = {}
        self._asked_again = 0
        self._old_gates: set[str] = set()
        self._undelivered: list[str] = []
        self._recorder: Recorder | None = None
        self._closed = False
        self.asking: tuple[str, Request] | None = None  # the last request, for whoever explains a drift
        self._beside: list[asyncio.Task[Any]] = []
        self.drift: DriftError | None = None
        self.published: dict[str, Json] = {}
        self.tags: dict[str, Json] = {}

    # -- driven by the turn --------------------------------------------------------------------------------------------
    def resume(self, rows: Iterable[tuple[datetime | None, list[str]]], recorder: Recorder) -> None:
        """Let time pass, unless a row goes on, and deliver what was settled, row by row.

        Raises: DriftError; BlockedError, if it was interrupted.
        """
        self._recorder = recorder
        for at, settled in rows:
            self._undelivered.extend(settled)
            if at is not None:
                recorder.unlock_left_blocks()  # before code goes on, be it alive or run again
                self.loop.advance_to((at - self.fold.info.started).total_seconds())
            self._begin()
            self._deliver()
            self._check()
        self._check()

    def _begin(self) -> None:
        """Start the main coroutine, at the instant of the first row: a run may have waited long for its first turn."""
        if self._task is None:
            self._task = self.loop.create_task(self._main())
            self.loop.run_until_quiet()

    def _check(self) -> None:
        if self.loop.blocked is not None:
            raise self.loop.blocked
        if self.drift is not None:
            raise self.drift
        if self.ended and self._outstanding_records:
            how, cause = self._ending()
            raise DriftError(self._drift_text(how, None)) from cause

    def _ending(self) -> tuple[str, BaseException | None]:
        """Tell how the saga function ended too early: an error that it raised says more than what was not asked for."""
        error = (
            self._task.exception() if self._task is not None and self.raised and not self._task.cancelled() else None
        )
        if error is None:
            return "the saga ended", None
        described = describe_exception(error)
        return f"the saga function raised {described['type']}: {described['message'][:_SAID]}", error

    def _deliver(self) -> None:
        while True:
            key = next((k for k in self._undelivered if k in self._futures), None)
            if key is None:
                return
            self._undelivered.remove(key)
            future, step = self._futures[key], self.fold.steps[key]
            if not future.done():
                self._fulfil(future, step)
                self.loop.run_until_quiet()

    def _fulfil(self, future: RequestFuture, step: Step) -> None:
        request = self._requests[step.key]
        if step.forward == "succeeded":
            try:
                future.set_result(request.decode(step.result))
            except Exception as error:  # a result that today's annotations do not accept is the author's to mend
                future.set_exception(error)
        else:
            future.set_exception(request.failure(step))

    @property
    def ended(self) -> bool:
        """Whether the saga function returned, and what it left beside it is done, or whether it raised."""
        if self._task is None or not self._task.done():
            return False
        failed = self._task.cancelled() or self._task.exception() is not None
        return failed or all(task.done() for task in self._beside)

    def asked(self) -> list[Asked]:
        """Return what was asked for so far, as this code would record it."""
        return [request.asked(key) for key, request in self._requests.items()]

    @property
    def raised(self) -> bool:
        """Whether the saga function has ended in an error of its own."""
        if self._task is None or not self._task.done():
            return False
        return self._task.cancelled() or not isinstance(self._task.exception(), (ContinueAsNew, NoneType))

    def outcome(self) -> tuple[Json, BaseException | None]:
        """Return what the function returned or raised; failures that nobody looked at count as raised."""
        assert self._task is not None
        if self._task.cancelled():
            return None, asyncio.CancelledError("the saga cancelled itself")
        error = self._task.exception()
        return (None, error) if error else (self._task.result(), self._unseen_failure())

    def _unseen_failure(self) -> BaseException | None:
        for future in self._futures.values():
            if future.done() and not future.observed and not future.cancelled():
                error = future.exception()
                if error is not None:
                    return error
        unseen = (task for task in self._beside if not task.cancelled() and task._log_traceback)
        return next((task.exception() for task in unseen), None)

    def cancel_branches(self) -> None:
        """Cancel what still runs beside a main coroutine that has ended."""
        for task in self.loop.pending_tasks():
            task.cancel()
        self.loop.run_until_quiet()

    def function_of(self, key: str) -> Callable[[], Any] | None:
        """Return the function of a ``saga.once`` that is being asked for."""
        request = self._requests.get(key)
        return request.run if request else None

    def discard(self) -> None:
        """Drop the coroutine; whatever its ``finally`` blocks ask for is refused."""
        self._closed = True
        self.loop.stop_timers()
        for task in self.loop.pending_tasks():
            coroutine: Any = task.get_coro()
            with contextlib.suppress(BaseException), self.loop.running():
                coroutine.close()
            task._log_destroy_pending = False
        for future in self._futures.values():
            future._log_traceback = False
        self._cut_circles()

    def _cut_circles(self) -> None:
        """Let go of what leads back here, so that memory is free at once and not when garbage is collected."""
        self._futures.clear()
        self._requests.clear()
        self._beside.clear()
        self._task = self._recorder = self.loop.code = None

    # -- called by saga code -------------------------------------------------------------------------------------------
    @property
    def branch(self) -> Branch:
        """The branch of the running task.  Raises: UsageError outside of saga code."""
        task = asyncio.current_task(self.loop)
        if not isinstance(task, SagaTask):
            raise UsageError("this call works inside a saga function only")
        return task.branch

    def ask(self, request: Request) -> RequestFuture:
        """Ask for something: again, if the journal has it, or for the first time."""
        self._refuse_if_closed()
        key = request.key or self.branch.key(request.name)
        self.asking = key, request
        if key in self._futures:
            raise UsageError(f"key {key!r} was asked for already in this run; a key= must be unique within its run")
        step = self.fold.steps.get(key)
        if step is None:
            self._refuse_if_outstanding(f"it now asks for {key!r}")
        if step is None or key in self.fold.unasked:
            asked = request.asked(key)
            if scope.get():
                asked = replace(asked, scope=scope.get())
            assert self._recorder is not None
            self._recorder.record(asked)
        elif not request.same(step.asked):
            self._drifted(self._drift_text(f"it asks for {key!r} with other arguments than recorded", step.asked))
        self._asked_again += 1
        future = RequestFuture(key, len(self._futures), self)
        self._requests[key], self._futures[key] = request, future
        return future

    def run_beside(self, main: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a branch that counts as a request does: the run waits for it, and a failure nobody saw is the run's."""
        self._refuse_if_closed()
        task: asyncio.Task[Any] = self.loop.create_task(main)
        self._beside.append(task)
        return task

    def version(self, change: str, minimum: int, maximum: int) -> int:
        """Answer a version gate: the recorded number, the old one while replaying, else the new one."""
        self._refuse_if_closed()
        recorded = self.fold.versions.get(change)
        if recorded is not None:
            if not minimum <= recorded <= maximum:
                self._drifted(f"version gate {change!r} recorded {recorded}, this code supports {minimum} to {maximum}")
            return recorded
        if self._outstanding_records or change in self._old_gates:
            self._old_gates.add(change)  # a gate in a loop must not change its answer between two rounds
            return minimum
        assert self._recorder is not None
        self._recorder.record(Versioned(change, maximum))
        return maximum

    def abandon(self, key: str) -> None:
        """Note that nobody waits for `key` any more, not even if its outcome is on record and just not delivered."""
        step = self.fold.steps.get(key)
        if not self._closed and step is not None and not step.abandoned:
            assert self._recorder is not None
            self._recorder.abandon(key)

    def has_come(self, key: str) -> bool:
        """Tell whether the outcome of a request came with the row whose timers fire now; it is delivered after them.

        That a request was given up is none: on replay it is in the row of the very timer that gives it up.
        """
        return key in self._undelivered and self.fold.steps[key].forward != "withdrawn"

    def unlock(self, key: str, failed: bool) -> None:
        """Give a lock back at the end of its block; `failed` says that an exception left it."""
        self._refuse_if_closed()
        assert self._recorder is not None
        self._recorder.unlock(key, failed)

    def now(self) -> datetime:
        """Return journal time."""
        return self.fold.info.started + timedelta(seconds=self.loop.time())

    # -- drift ---------------------------------------------------------------------------------------------------------
    @property
    def _outstanding_records(self) -> bool:
        return self._asked_again < len(self.fold.steps) - len(self.fold.unasked)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise Discarded

    def _refuse_if_outstanding(self, what: str) -> None:
        if self._outstanding_records:
            self._drifted(self._drift_text(what, None))

    def _drifted(self, text: str) -> None:
        self.drift = self.drift or DriftError(text)
        raise Discarded

    def _drift_text(self, what: str, recorded: Asked | None) -> str:
        info = self.fold.info
        missing = [key for key in self.fold.steps if not (key in self._futures or key in self.fold.unasked)]
        lines = [f"run {info.id} of {info.saga} version {info.version} has drifted from its journal: {what}."]
        if recorded is not None:
            lines.append(f"  recorded: {recorded.key} {recorded.args}")
        lines += [f"  recorded and not asked for again: {key}" for key in missing[:10]]
        lines.append(
            "Put the change behind saga.version(...) or register it as a new version, deploy, and `saga retry` the run."
        )
        return "\n".join(lines)


def settled_keys(entries: Iterable[Entry]) -> list[str]:
    """Return the keys of the outcomes among `entries`, in order."""
    return [entry.key for entry in entries if type(entry) is Settled]
