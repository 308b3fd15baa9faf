"""An environment for tests: the real engine on a real Postgres, driven in the test's own process, its time skipped.

Owns when things happen: nothing moves unless the test says so.  Must never be pointed at a database that is worked
with; `orchestrator.store.testbed` refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Final, Literal, Self

from orchestrator.canvas import Durable
from orchestrator.client import Client
from orchestrator.codec import set_limit
from orchestrator.engine.pump import Pump
from orchestrator.errors import UsageError
from orchestrator.saga import Saga
from orchestrator.saga import registry as sagas
from orchestrator.saga.declare import Starter
from orchestrator.settings import Settings
from orchestrator.store import testbed, turns
from orchestrator.store.connection import open_connection
from orchestrator.store.transaction import Transactions
from orchestrator.testing.faults import EVERY, Fault, Kind
from orchestrator.testing.handle import EnvironmentRun
from orchestrator.testing.result import as_saga
from orchestrator.testing.stubs import name_of
from orchestrator.testing.worker import Child, Script

FOREVER: Final = timedelta(days=3650)
_MOVES: Final = 100_000
_NOTICED: Final = timedelta(seconds=1.1)  # after a death: reservations have run out, forgotten arrivals are found
_PATIENCE: Final = tuple(timedelta(seconds=0.1 * 2**n) for n in range(14))

How = Literal["rejected", "unknown", "crash"]
At = Literal["before", "after", "committed"]
_CRASHES: Final = {"before": Kind.DIED_BEFORE, "after": Kind.DIED_AFTER, "committed": Kind.DIED_COMMITTED}


class Environment:
    """Start runs on a database of the test's own, and let them go on step by step or until they end.

    It takes the place of the app that sagas are bound to: ``checkout.delay(...)`` starts runs here.  Steps are called
    as they are, unless they are stubbed; a transactional one gets a connection to `database_url`.  Use it as a context
    manager, or call `close`.  With `replay` saga code starts anew from its journal at every turn, as it may in
    production; what is not deterministic then parks the run as drift.
    Raises: UsageError for a database that holds runs of somebody else.
    """

    def __init__(
        self, database_url: str, *, replay: bool = True, default_queue: str = "celery", **settings: Any
    ) -> None:
        testbed.claim(database_url)
        settings = {"cache_runs": 0, **settings} if replay else settings
        self.database_url = database_url
        self.settings = Settings.from_environment({}, database_url=database_url, **settings)
        set_limit(self.settings.payload_limit)
        self.client = Client(self.settings, lambda queue, times: None, lambda: default_queue)
        self._connection = open_connection(self.settings.dsn, name="test")
        self._tables = testbed.tables(self._connection)
        self._transactions = Transactions(self.settings.sqlalchemy_url)
        self._pump = Pump(lambda queue, times: None, lease=FOREVER, reservation=self.settings.reservation)
        self._skipped = timedelta(0)
        self._script = Script(skip=self.skip, cancel=self._cancel)
        self._children: list[Child] = []
        self._driving = 0
        self._bound: dict[Saga[Any, Any], Starter | None] = {}
        self.reset()

    # -- starting ------------------------------------------------------------------------------------------------------
    def start(
        self, saga: Saga[Any, Any] | Durable, *args: Any, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> EnvironmentRun:
        """Start a run, of a saga or a durable canvas, and do all that is due at once; time stands still.

        Options are those of ``apply_async``.
        """
        run = self._started(saga, args, kwargs, options)
        self.drain()
        return run

    def run(
        self, saga: Saga[Any, Any] | Durable, *args: Any, kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> EnvironmentRun:
        """Start a run and skip time until it has ended, is parked, or waits for something that nobody sends."""
        return self._started(saga, args, kwargs, options).finish()

    def _started(
        self,
        played: Saga[Any, Any] | Durable,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        options: dict[str, Any],
    ) -> EnvironmentRun:
        saga, args, given = as_saga(played, args, kwargs or {})
        self._bind(saga)
        return EnvironmentRun(self, saga, self.client.start(saga, args, given, options))

    def handle(self, run_id: str) -> EnvironmentRun:
        """Return a run of this environment by its id, say that of a child.  Raises: UnknownRunError."""
        outcome = self.client.outcome(run_id)
        return self._handle_of(run_id, outcome.saga, outcome.version)

    @property
    def runs(self) -> list[EnvironmentRun]:
        """All runs, in the order of their start."""
        return self.runs_in()

    def runs_in(self, *states: str) -> list[EnvironmentRun]:
        """Return the runs in one of these states, in the order of their start."""
        return [self._handle_of(*row) for row in testbed.runs(self._connection, states)]

    def _handle_of(self, run_id: str, name: str, version: int) -> EnvironmentRun:
        saga = sagas.sagas.get((name, version)) or sagas.latest(name)
        return EnvironmentRun(self, saga, self.client.handle(saga, run_id))

    # -- what steps do -------------------------------------------------------------------------------------------------
    def stub(self, stubs: Mapping[Any, Any]) -> None:
        """Let stubs play steps from now on; see ``testing.run`` for what a stub may be."""
        self._script.cast.add(stubs)

    def fail(
        self,
        step: Any,
        how: How,
        *,
        attempt: int | None = None,
        effect: bool = True,
        at: At = "after",
        key: str = "",
    ) -> None:
        """Let a step, compensation, probe or task fail, from now on until `reset` or `heal`.

        ``"rejected"``: it certainly had no effect.  ``"unknown"``: its answer is lost, after its `effect` or without
        it.  ``"crash"``: the worker dies `at` ``"before"`` its code, ``"after"`` its effect, or once its outcome was
        ``"committed"``; all memory is gone, and another worker goes on.  `attempt` counts from 1; without it a crash
        comes at the first attempt, the others at every one.  `key` says which of several requests for the step is
        meant.  Raises: UsageError.
        """
        kinds = {"rejected": Kind.REJECTED, "unknown": Kind.LOST if effect else Kind.SILENT, "crash": _CRASHES.get(at)}
        kind = kinds.get(how)
        if kind is None:
            raise UsageError(f"fail() knows rejected, unknown, and crash at before, after, committed; not {how} {at}")
        which = attempt if attempt is not None else 1 if how == "crash" else EVERY
        self._script.faults.append(Fault(kind, name_of(step), which, key))

    def heal(self) -> None:
        """Let nothing fail any more that `fail` made fail."""
        self._script.faults.clear()

    # -- time ----------------------------------------------------------------------------------------------------------
    @property
    def now(self) -> datetime:
        """The time of the database, by which everything is decided."""
        return testbed.now(self._connection)

    def drain(self) -> None:
        """Do all that is due, without skipping time."""
        self._drive(timedelta(0))

    def advance(self, length: timedelta) -> None:
        """Let so much time pass, and do what falls due on the way."""
        until = self.now + length
        self._drive(length)
        self.skip(max(timedelta(0), until - self.now))
        self.drain()

    def finish(self, before_time_passes: Callable[[], bool] = lambda: False) -> None:
        """Skip time until every run has ended, is parked, or waits for something that nobody sends.

        `before_time_passes` may give orders, and says whether it did: no time is skipped then.
        """
        self._drive(FOREVER, before_time_passes)

    def skip(self, length: timedelta) -> None:
        """Move the clock ahead and do nothing else."""
        testbed.skip(self._connection, length)
        self._skipped += length

    # -- driving -------------------------------------------------------------------------------------------------------
    def _drive(self, limit: timedelta, before_time_passes: Callable[[], bool] = lambda: False) -> None:
        """Do what is due and, as far as `limit` allows, move on to what falls due next."""
        if self._driving == len(self._children):
            self._children.append(
                Child(self.settings, self._connection, self._script, self._transactions, lambda: self._skipped)
            )
        child = self._children[self._driving]
        self._driving += 1  # a drive inside of a step, say of another run, takes another child
        try:
            self._drive_with(child, limit, before_time_passes)
        finally:
            self._driving -= 1

    def _drive_with(self, child: Child, limit: timedelta, before_time_passes: Callable[[], bool]) -> None:
        patience = iter(_PATIENCE)
        limit += self._skipped  # what steps take, and what is waited for after a crash, is part of the time that passes
        for _ in range(_MOVES):
            looked, moved = self._do_what_is_due(child)
            if looked.stray or looked.lined or (looked.next is None and looked.open):
                self._pump.run_once(self._connection)
                looked, again = self._do_what_is_due(child)
                moved = moved or again
            patience = iter(_PATIENCE) if moved else patience
            held_back = looked.due or looked.lined  # by a pause, by a limit
            pause = next(patience, None) if looked.next is None and held_back else looked.next
            if pause is None or self._skipped + pause > limit:
                return
            if not before_time_passes():
                self.skip(pause)
        raise UsageError(f"after {_MOVES:,} moves of the clock there is still something to do; does a saga loop?")

    def _do_what_is_due(self, child: Child) -> tuple[testbed.Look, bool]:
        """Drain until nothing more can be taken; tells what is left, and whether anything was done."""
        before: list[str] = []
        for drains in range(_MOVES):
            looked = testbed.look(self._connection, [*child.targets, turns.ANYONE], self.settings.reservation)
            if not looked.due or looked.due == before:
                return looked, drains > bool(looked.due)
            before = looked.due
            if not child.drain(frozenset(looked.queues)):
                self.skip(_NOTICED)
                before = []
        raise UsageError(f"after {_MOVES:,} drains there is still something due; does a saga loop without waiting?")

    # -- from test to test ---------------------------------------------------------------------------------------------
    def reset(self) -> None:
        """Forget every run, stub and fault.  The clock stays ahead: the time of a database never goes back."""
        testbed.empty(self._connection, self._tables)
        self._script.clear()
        for saga in sagas.sagas.values():
            self._bind(saga)

    def _cancel(self, run_id: str) -> None:
        with suppress(UsageError):  # past its pivot, or ended
            self.client.cancel(run_id, "in a test", "test")

    def _bind(self, saga: Saga[Any, Any]) -> None:
        self._bound.setdefault(saga, saga.starter)
        saga.starter = self.client

    def release(self) -> None:
        """Give sagas back to the app that they were bound to, until the next `reset` or start."""
        for saga in list(self._bound):
            saga.starter = self._bound.pop(saga)

    def close(self) -> None:
        """Close all connections, and give sagas back to the app that they were bound to."""
        self.release()
        for child in self._children:
            child.close()
        self._transactions.dispose()
        self.client.pool.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- for the explorer ----------------------------------------------------------------------------------------------
    def order(self, faults: Sequence[Fault], meanwhile: Callable[[], object] | None = None) -> None:
        """Order faults by request key."""
        self._script.faults = list(faults)
        self._script.meanwhile = meanwhile or (lambda: None)

    @property
    def script(self) -> Script:
        """What is played, and what was."""
        return self._script
