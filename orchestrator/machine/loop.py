"""A tiny deterministic event loop: stock asyncio code runs on it, journal time passes in it.

Owns the order in which callbacks run: first in, first out; timers by due time, then by creation.  Must never touch a
socket, a thread or a clock: whatever asyncio offers that needs one raises and names the durable replacement.
"""

from __future__ import annotations

import asyncio
import asyncio.queues
import asyncio.tasks
import contextlib
import heapq
import sys
import zlib
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context
from types import FrameType
from typing import Any, NoReturn

from orchestrator.errors import UsageError
from orchestrator.machine.keys import Branch

_WAIT_FOR = asyncio.tasks.wait_for.__code__
_ENSURE_FUTURE = {
    function.__code__ for name, function in vars(asyncio.tasks).items() if name in ("ensure_future", "_ensure_future")
}
_WAIT = asyncio.tasks._wait.__code__  # type: ignore[attr-defined]
_QUEUE_GET = asyncio.queues.Queue.get.__code__
_TASKS_FILE = asyncio.tasks.__file__
_TIMER_SLACK = 1e-6  # journal time has microseconds; a timer is due within one of them


class BlockedError(BaseException):
    """Interrupts saga code that does not come to rest; which of it has run by then no replay can tell."""


class SagaTask(asyncio.Task[Any]):
    """A task that knows its branch of the saga; sets of tasks, as in a TaskGroup, keep the same order everywhere.

    asyncio keeps a set of all tasks of the process, and each run has a task of each number: the high bits of the hash,
    which order a set only where tasks of one run collide many times, tell runs apart.
    """

    branch: Branch

    def __init__(self, coro: Coroutine[Any, Any, Any], number: int, run: int, **options: Any) -> None:
        self.number = number
        self._hash = (run << 31) + number
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._hash


class SagaLoop(asyncio.AbstractEventLoop):
    """Run coroutines until they are quiet; time stands still between turns."""

    def __init__(self, run_id: str) -> None:
        self._run = zlib.crc32(run_id.encode())
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._timer_count = 0
        self._now = 0.0
        self._tasks: dict[int, SagaTask] = {}
        self._task_count = 0
        self.failures: list[dict[str, Any]] = []
        self.rests = 0  # how often it was quiet; for who watches whether saga code ever is
        self.blocked: BlockedError | None = None

    # -- driving ---------------------------------------------------------------------------------------------------
    def run_until_quiet(self) -> None:
        """Run callbacks until none is ready."""
        outer = events._get_running_loop()
        events._set_running_loop(self)
        try:
            while self._ready:
                handle = self._ready.popleft()
                if not handle._cancelled:
                    try:
                        handle._run()
                    except SystemExit:  # its task keeps it as its exception
                        continue
            self.rests += 1
        finally:
            events._set_running_loop(outer)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Be the running loop for a while, inside of another one if need be."""
        outer = events._get_running_loop()
        events._set_running_loop(self)
        try:
            yield
        finally:
            events._set_running_loop(outer)

    def interrupt(self, why: str) -> NoReturn:
        """Interrupt the saga code that runs in this thread; nothing that comes of it may be recorded."""
        self.blocked = BlockedError(why)
        raise self.blocked

    def pending_tasks(self) -> list[SagaTask]:
        """Return the tasks that are not done, oldest first; asyncio would look through all loops' tasks, unordered."""
        return list(self._tasks.values())

    def advance_to(self, seconds: float) -> None:
        """Let time pass to `seconds` since the start of the run and fire what falls due, in order."""
        self._now = max(self._now, seconds)
        while self._timers and self._timers[0][0] <= self._now + _TIMER_SLACK:
            _, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled():
                self._ready.append(timer)
                self.run_until_quiet()

    def next_timer(self) -> float | None:
        """Return when the earliest timer is due, in seconds since the start of the run."""
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    # -- what asyncio asks of a loop -----------------------------------------------------------------------------------
    def time(self) -> float:
        return self._now

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._timer_count += 1
        heapq.heappush(self._timers, (when, self._timer_count, timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are dropped when they surface."""

    def create_future(self) -> asyncio.Future[Any]:
        self._refuse_unordered_waits(sys._getframe(1))
        return asyncio.Future(loop=self)

    @staticmethod
    def _refuse_unordered_waits(frame: Any) -> None:
        """asyncio's own wait and as_completed walk over sets, whose order differs from process to process."""
        if frame.f_code is _WAIT:
            raise UsageError("asyncio.wait() in a saga is not replayable; use saga.wait(), which keeps request order")
        if frame.f_code is _QUEUE_GET and frame.f_back and frame.f_back.f_code.co_filename == _TASKS_FILE:
            raise UsageError("asyncio.as_completed() in a saga is not replayable; use saga.as_completed()")

    def create_task(
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Context | None = None, **_: Any
    ) -> asyncio.Task[Any]:
        if isinstance(coro, asyncio.Future):
            raise TypeError(
                "create_task() takes a coroutine, and what saga.step() and its like return is none: that is under way "
                "already, so keep it, and await it when its result is needed"
            )
        parent = asyncio.current_task(self)
        if not isinstance(parent, SagaTask):
            branch = Branch()
        elif _called_by_wait_for(sys._getframe(1)):
            branch = parent.branch
        else:
            branch = parent.branch.child()
        self._task_count += 1
        name = name or f"branch {branch.path}"
        task = SagaTask(coro, self._task_count, self._run, loop=self, name=name, context=context)
        task.branch = branch
        self._tasks[task.number] = task  # kept alive too: when garbage is collected must not decide what a saga does
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: Any) -> None:
        self._tasks.pop(task.number, None)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.failures.append(context)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return events._get_running_loop() is self

    def is_closed(self) -> bool:
        return False

    def stop_timers(self) -> None:
        """Forget everything that is planned; the loop is about to be dropped."""
        self._timers.clear()
        self._ready.clear()


def _called_by_wait_for(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code in _ENSURE_FUTURE:
        frame = frame.f_back
    return frame is not None and frame.f_code is _WAIT_FOR


_stock_wait_for = asyncio.wait_for


async def _wait_for(fut: Any, timeout: float | None) -> Any:
    """Python 3.12's: it awaits in place, where 3.11's makes a task that starts and ends a little later."""
    if not inside_saga() or (timeout is not None and timeout <= 0):
        return await _stock_wait_for(fut, timeout)
    async with asyncio.timeout(timeout):
        return await fut


if sys.version_info < (3, 12):  # a journal recorded on one Python has to replay on the others
    asyncio.wait_for = asyncio.tasks.wait_for = _wait_for


def _refusal(name: str, instead: str) -> Callable[..., Any]:
    def refuse(self: SagaLoop, *args: Any, **kwargs: Any) -> Any:
        raise UsageError(f"loop.{name}() cannot run inside a saga: {instead}")

    refuse.__name__ = name
    return refuse


_IN_A_STEP = "saga code is replayed, so IO belongs into a step; `await saga.step(...)` or `await saga.once(name, fn)`"
for _name in dir(asyncio.AbstractEventLoop):
    if (
        _name.startswith(
            (
                "sock_",
                "create_",
                "connect_",
                "start_",
                "sendfile",
                "subprocess_",
                "getaddrinfo",
                "getnameinfo",
                "add_",
                "remove_",
                "run_",
                "call_soon_threadsafe",
            )
        )
        and _name not in SagaLoop.__dict__
    ):
        setattr(SagaLoop, _name, _refusal(_name, _IN_A_STEP))


def inside_saga() -> bool:
    """Tell whether the calling code is saga code."""
    return isinstance(events._get_running_loop(), SagaLoop)
