"""Waiting for runs to end: one thread and one statement for all waiting callers of a process.

Owns the thread and what it asks for.  Must never be the reason that a caller waits for ever: the thread ends when
nobody waits, a forked child begins with a poller of its own, and an error reaches the callers that it concerns.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Protocol, TypeAlias, TypeVar

from orchestrator.errors import StoreUnavailableError, UnknownRunError
from orchestrator.machine.states import TERMINAL
from orchestrator.store import runs
from orchestrator.store.missing import unknown_run
from orchestrator.store.pool import ClientPool

_SHORTEST_PAUSE_S = 0.0005
_LONGEST_PAUSE_S = 0.25
_SHARE = 0.05  # of the time that the last caller has waited
_LONGEST_HEAD_START_S = 0.01
_AHEAD = 100


class Handle(Protocol):
    """A handle to a run, which is told how the run ended."""

    id: str
    ended: runs.Outcome | None


H = TypeVar("H", bound=Handle)
Asked: TypeAlias = Mapping[str, Sequence["Future[runs.Outcome]"]]


class _Book:
    """Who waits, and which handles are held, in one process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Condition()
        self.waiting: dict[str, list[Future[runs.Outcome]]] = {}
        self.expected: weakref.WeakValueDictionary[str, Handle] = weakref.WeakValueDictionary()
        self.thread: threading.Thread | None = None
        self.away = False  # whether the database could not be reached the last time
        self.somebody_new = False
        self.asked_at = 0.0  # when the last caller came
        self.usual_s = 0.0  # how long callers had to wait lately

    def next_pause(self) -> float:
        """Return how long to wait before the next look: until it is nearly due as usual, then briefly, then longer.

        Who has waited long waits a little longer, in proportion.
        """
        waited = monotonic() - self.asked_at
        if self.away:
            return _LONGEST_PAUSE_S
        head_start = min(self.usual_s * 0.7, _LONGEST_HEAD_START_S) - waited
        if head_start > _SHORTEST_PAUSE_S:
            return head_start
        if waited < min(self.usual_s, _LONGEST_HEAD_START_S) * 2:
            return _SHORTEST_PAUSE_S
        return min(max(_SHORTEST_PAUSE_S, waited * _SHARE), _LONGEST_PAUSE_S)


class Poller:
    """Asks for all waiting callers of a process at once; from half a millisecond up to 250 ms apart, as it is usual.

    Who starts many runs and then waits for one after the other asks once for many: the first statement for a new caller
    also asks for the oldest handles that the process holds.
    """

    def __init__(self, pool: ClientPool) -> None:
        self._pool = pool
        self._book = _Book()

    def expect(self, handle: H) -> H:
        """Remember a handle for as long as its owner does, and until it is known how its run ended."""
        book = self._own_book()
        with book.lock:
            book.expected[handle.id] = handle
        return handle

    def wait(self, run_id: str) -> Future[runs.Outcome]:
        """Return a future that is done when the run is terminal, or that it is unknown."""
        future: Future[runs.Outcome] = Future()
        book = self._own_book()
        with book.lock:
            book.waiting.setdefault(run_id, []).append(future)
            book.somebody_new, book.asked_at = True, monotonic()
            if book.thread is None:
                thread = threading.Thread(target=self._poll, args=(book,), name="orchestrator results", daemon=True)
                thread.start()  # where no more threads can be had it raises, and the next caller tries again
                book.thread = thread
            book.lock.notify()
        return future

    def forget(self, run_id: str, future: Future[runs.Outcome]) -> None:
        """Stop waiting."""
        book = self._own_book()
        with book.lock:
            futures = book.waiting.get(run_id, [])
            if future in futures:
                futures.remove(future)
                if not futures:
                    del book.waiting[run_id]

    def _own_book(self) -> _Book:
        """Return this process's book: in a forked child the thread is gone, and whoever held the lock with it."""
        if self._book.pid != os.getpid():
            self._book = _Book()
        return self._book

    def _poll(self, book: _Book) -> None:
        while True:
            with book.lock:
                if not book.waiting:
                    book.lock.wait(1.0)
                if not book.waiting:
                    book.thread = None
                    return
                asked = {run_id: [*futures] for run_id, futures in book.waiting.items()}
                ahead = list(itertools.islice(book.expected, _AHEAD)) if book.somebody_new else []
                book.somebody_new = False
            try:
                with self._pool.connection() as connection:
                    found = runs.outcomes(connection, [*asked, *ahead])
                    missing = {run_id: unknown_run(run_id, connection) for run_id in asked if run_id not in found}
                book.away = False
                _settle(book, asked, found, missing)
            except StoreUnavailableError:
                book.away = True  # the database comes back, or the callers' timeouts end their waiting
            except BaseException as error:
                _fail(book, asked, error)
            with book.lock:
                book.lock.wait(book.next_pause())  # a new caller is answered at once, whatever the pause has grown to


def _settle(book: _Book, asked: Asked, found: dict[str, runs.Outcome], missing: dict[str, UnknownRunError]) -> None:
    with book.lock:
        for ended in found.values():
            handle = book.expected.pop(ended.id, None) if ended.state in TERMINAL else None
            if handle is not None:
                handle.ended = ended
        for run_id, futures in asked.items():
            outcome = found.get(run_id)
            if outcome is not None and outcome.state not in TERMINAL:
                continue
            waiting = book.waiting.pop(run_id, [])
            if outcome is None:  # at that moment: who came later may have started it meanwhile
                later = [future for future in waiting if future not in futures]
                book.waiting |= {run_id: later} if later else {}
                waiting = [future for future in waiting if future in futures]
            for future in waiting:
                if not future.set_running_or_notify_cancel():
                    continue
                if outcome is None:
                    future.set_exception(missing[run_id])
                else:
                    book.usual_s += (monotonic() - book.asked_at - book.usual_s) / 4
                    future.set_result(outcome)


def _fail(book: _Book, asked: Asked, error: BaseException) -> None:
    with book.lock:
        for run_id in asked:
            for future in book.waiting.pop(run_id, ()):
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
