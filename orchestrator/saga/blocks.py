"""Blocks in saga code: `scope` undoes what was done inside it, `lock` keeps other runs out.

Owns what `async with` does; what follows from it is the machine's.
"""

from __future__ import annotations

import asyncio
import functools
import json
from contextvars import Token
from datetime import timedelta
from types import TracebackType
from typing import Any

from orchestrator.codec import encode_any, is_name
from orchestrator.errors import DeadlockError, UsageError, describe_exception
from orchestrator.machine import code as machine
from orchestrator.machine.blocks import SEPARATOR
from orchestrator.machine.code import Request, RequestFuture, SagaCode
from orchestrator.machine.journal import Asked
from orchestrator.machine.policy import Effect
from orchestrator.machine.record import Step as StepRecord
from orchestrator.saga.inside import code_of
from orchestrator.saga.steps import failure_of


class scope:  # noqa: N801 - a context manager reads like a function
    """Undo what was done inside this block if an exception leaves it, before the exception goes on.

    Partial rollback: whoever catches the exception outside may go on with another way.  Steps are undone as at the end
    of a run, from the journal; one whose undo keeps failing parks the run.
    """

    async def __aenter__(self) -> None:
        self._code = code_of("scope")
        self._key = self._code.branch.key("scope")
        outer = machine.scope.get()
        self._path = f"{outer}{SEPARATOR}{self._key}" if outer else self._key
        self._token: Token[str] = machine.scope.set(self._path)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, (machine.Discarded, GeneratorExit)):
            return  # in whatever context the code is dropped
        machine.scope.reset(self._token)
        if isinstance(error, (Exception, asyncio.CancelledError)):
            await _to_its_end(self._code.ask(_undoing(self._key, self._path, error, self._code)))


async def _to_its_end(undoing: RequestFuture) -> None:
    """Wait until everything is undone; who is cancelled meanwhile, by a timeout say, hears of it then."""
    cancelled: asyncio.CancelledError | None = None
    while not undoing.done():
        try:
            await asyncio.shield(undoing)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    undoing.result()


def _undoing(key: str, path: str, error: BaseException, code: SagaCode) -> Request:
    """The request to undo a block; where that may not be possible it says by which error the block was left."""
    told = {"error": describe_exception(error)} if code.fold.past_pivot or code.fold.pivots_in_flight else {}
    return Request(
        name=key,
        key=key,
        asked=lambda key: Asked(key, path, told, kind="scope", effect=Effect.NONE),
        same=lambda asked: asked.kind == "scope" and asked.task == path,
        decode=lambda result: None,
        failure=functools.partial(failure_of, code.fold.info.id),
    )


class lock:  # noqa: N801 - a context manager reads like a function
    """Hold the lock of a business key to the end of the block: ``async with saga.lock("account", 7):``.

    First come, first served, over all runs; a run and its children do not keep each other out.  `timeout` (timedelta or
    seconds) bounds the waiting; with 0 the lock is had if it is free.  A block that an exception leaves keeps the
    lock until the run has ended, if the run goes back because of it: what was done under the lock is undone under it.
    So is what was given up under it: a step that a timeout left running keeps the lock until it has settled.
    Raises: TimeoutError; DeadlockError if the runs ahead wait for this one.
    """

    def __init__(self, *name: Any, timeout: timedelta | float | None = None) -> None:
        if not name:
            raise UsageError('saga.lock() needs a business key: `async with saga.lock("account", account_id):`')
        self._name = json.dumps(encode_any(list(name), "the name of a lock"), separators=(",", ":"), ensure_ascii=False)
        if not is_name(self._name):
            raise UsageError("saga.lock: its name must be at most 500 printable bytes")
        self._timeout = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout

    async def __aenter__(self) -> None:
        self._code = code_of("lock")
        future = self._code.ask(_locking(self._name, self._code))
        self._key, self._late = future.key, False
        if self._timeout is None:
            await future
            return
        timer = self._code.loop.call_later(max(self._timeout, 0), self._give_up, future)
        try:
            await future
        except asyncio.CancelledError:
            if not self._late:
                raise
            raise TimeoutError(f"lock {self._name} was not free within {self._timeout} s") from None
        finally:
            timer.cancel()

    def _give_up(self, future: RequestFuture) -> None:
        """Wait no longer, unless the lock was granted while the timer fell due: a free one is had with any timeout."""
        if not self._code.has_come(self._key):
            self._late = future.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, (machine.Discarded, machine.ContinueAsNew, GeneratorExit)):
            self._code.unlock(self._key, error is not None)


def _locking(name: str, code: SagaCode) -> Request:
    return Request(
        name=f"lock:{name}",
        asked=lambda key: Asked(key, name, {}, kind="lock", effect=Effect.NONE),
        same=lambda asked: asked.kind == "lock" and asked.task == name,
        decode=lambda result: None,
        failure=functools.partial(_refused, code.fold.info.id),
    )


def _refused(run_id: str, record: StepRecord) -> Exception:
    return DeadlockError(f"run {run_id}: {(record.error or {}).get('message', 'the lock was not granted')}")
