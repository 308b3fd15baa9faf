"""Durable time and waiting: `sleep`, `now`, and asyncio's `wait` and `as_completed` in request order.

Owns what depends on journal time.  Must never look at a clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Set
from datetime import datetime, timedelta
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.saga.inside import code_of


async def sleep(duration: timedelta) -> None:
    """Sleep durably; no worker is held meanwhile.  Raises: UsageError for a bare number, and outside of a saga."""
    code_of("sleep")
    if not isinstance(duration, timedelta):
        raise UsageError("saga.sleep() takes a timedelta, such as timedelta(seconds=5); seconds are asyncio.sleep's")
    await asyncio.sleep(duration.total_seconds())


async def sleep_until(instant: datetime) -> None:
    """Sleep durably until an aware instant; one in the past returns at once.  Raises: UsageError for a naive one."""
    code_of("sleep_until")
    if instant.tzinfo is None:
        raise UsageError("saga.sleep_until() needs an aware datetime; say which time zone it is in")
    await asyncio.sleep(max(0.0, (instant - now()).total_seconds()))


def now() -> datetime:
    """Return journal time (aware, UTC): the same on every replay, and standing still between outcomes."""
    return code_of("now").now()


_RETURN_WHEN = (asyncio.FIRST_COMPLETED, asyncio.FIRST_EXCEPTION, asyncio.ALL_COMPLETED)


async def wait(
    awaitables: Iterable[Any], *, timeout: float | timedelta | None = None, return_when: str = asyncio.ALL_COMPLETED
) -> tuple[list[asyncio.Future[Any]], list[asyncio.Future[Any]]]:
    """Wait as ``asyncio.wait`` does; returns (done, pending) as lists in the order of `awaitables`.

    Raises: TypeError for one that is in no list; UsageError for another word as `return_when`.
    """
    code_of("wait")
    if return_when not in _RETURN_WHEN:  # asyncio raises ValueError, which would undo the run
        raise UsageError(f"saga.wait: return_when= is one of {', '.join(_RETURN_WHEN)}, not {return_when!r:.80}")
    _refuse_lone("saga.wait", awaitables)
    _refuse_unordered(awaitables)
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
    code_of("as_completed")
    _refuse_lone("saga.as_completed", awaitables)
    _refuse_unordered(awaitables)
    pending = [asyncio.ensure_future(item) for item in awaitables]
    while pending:
        done, pending = await wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for future in done:
            yield future


def _refuse_lone(call: str, awaitables: Any) -> None:
    """A future can be iterated as well, by whoever awaits it."""
    if asyncio.iscoroutine(awaitables):
        awaitables.close()
    elif not asyncio.isfuture(awaitables):
        return
    raise TypeError(f"{call}() takes a list of what is waited for, of one as well: write `{call}([saga.step(...)])`")


def _refuse_unordered(awaitables: Iterable[Any]) -> None:
    """A coroutine becomes a branch in its turn, and the order of a set of them differs from process to process."""
    coroutines = [item for item in awaitables if asyncio.iscoroutine(item)] if isinstance(awaitables, Set) else []
    for coroutine in coroutines:
        coroutine.close()
    if coroutines:
        raise UsageError("saga.wait() and saga.as_completed() take coroutines in an order: pass a list, not a set")
