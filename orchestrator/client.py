"""Starting runs and asking for them, from any process: web backends, scripts, steps.

Owns what a caller sees.  Must never run saga code or a step.
"""

from __future__ import annotations

import asyncio
import functools
import getpass
import logging
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from orchestrator import starting
from orchestrator.codec import Json, canonical_text, check, is_name, read_stored
from orchestrator.codec.values import explain
from orchestrator.engine.reconcile import Report, reconcile
from orchestrator.errors import (
    ConflictError,
    PayloadError,
    SchemaError,
    StoreUnavailableError,
    UsageError,
    as_typed,
)
from orchestrator.failpoints import failpoint
from orchestrator.machine.journal import Arrival, Cancel, Operate, Signal, Terminate, encode
from orchestrator.machine.states import TERMINAL
from orchestrator.poller import Poller
from orchestrator.reconcile import Looked
from orchestrator.result import SagaResult, saga_of
from orchestrator.retention import Chosen, Pruned, prune
from orchestrator.saga import Saga
from orchestrator.saga.declare import positional
from orchestrator.saga.signals import payload_of
from orchestrator.settings import Settings
from orchestrator.step import registry as step_registry
from orchestrator.store import arrivals, pauses, runs
from orchestrator.store.connection import Connection
from orchestrator.store.missing import unknown_run
from orchestrator.store.pool import ClientPool

if TYPE_CHECKING:
    from orchestrator.bulk import Effects

logger = logging.getLogger(__name__)
T = TypeVar("T")
Ring = Callable[[str, int], None]

_PAGE = 500  # runs that start_many starts with one commit
_OPERATED = {"retry": "retried", "skip": "skipped", "resolve": "resolved", "pause": "paused", "resume": "resumed"}


class Client:
    """Starts runs, looks at them, and leaves orders for them; safe to share between threads."""

    def __init__(self, settings: Settings, ring: Ring, default_queue: Callable[[], str]) -> None:
        self.settings = settings
        self.pool = ClientPool(settings.dsn, settings.max_connections, prepare=settings.prepared_statements)
        self._ring = ring
        self._default_queue = default_queue
        self._poller = Poller(self.pool)

    # -- starting ------------------------------------------------------------------------------------------------------
    def start(
        self, saga: Saga[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
    ) -> SagaResult:
        """Start a run, or return the one that has this id and this input already.

        Commits before it returns, or joins `transaction`.
        Raises: PayloadError, ConflictError, StoreUnavailableError, SchemaError, UsageError.
        """
        new, transaction = self.prepare(saga, saga.codec.encode_call(args, kwargs), options)
        return self.start_encoded(saga, new, transaction)

    def start_encoded(self, saga: Saga[Any, Any], new: runs.Start, transaction: Any = None) -> SagaResult:
        """Start a run whose input is encoded already."""
        if transaction is not None:
            from orchestrator.store import foreign  # and SQLAlchemy with it

            failpoint("join.before")
            created = foreign.execute(transaction, runs.START, new.values()) is not None
            failpoint("join.after")
            if not created:
                self._compare(saga, new, foreign.execute(transaction, runs.IDENTITY, {"id": new.id}))
            elif starting.is_due(new):
                foreign.after_commit(transaction, functools.partial(self._ring_quietly, new.queue))
            return SagaResult(self, new.id, saga)
        return self._start_committed(saga, [new])[0]

    def start_many(
        self, saga: Saga[Any, Any], calls: Iterable[tuple[Any, ...]], options: dict[str, Any]
    ) -> list[SagaResult]:
        """Start a run for each tuple of arguments, 500 with one commit.

        Raises: as `start`; what was committed before stays started, and starting it again returns the same runs.
        """
        calls = list(calls)
        ids = list(options.pop("task_ids", None) or [None] * len(calls))
        if len(ids) != len(calls) or len({*ids} - {None}) != sum(each is not None for each in ids):
            raise UsageError("task_ids= takes one id for each run, all of them different")
        if options.get("task_id") is not None:
            raise UsageError("start_many takes task_ids=, one id for each run, and not task_id=")
        if options.get("transaction") is not None:
            raise UsageError("start_many commits by itself; in a transaction, call apply_async(...) for each run")
        prepared = [
            self.prepare(saga, saga.codec.encode_call(positional(args), {}), {**options, "task_id": run_id})
            for args, run_id in zip(calls, ids, strict=True)
        ]
        if prepared and prepared[0][1] is not None:  # in a transactional step, whose transaction they join
            return [self.start_encoded(saga, new, transaction) for new, transaction in prepared]
        new = [each for each, _ in prepared]
        pages = (new[begin : begin + _PAGE] for begin in range(0, len(new), _PAGE))
        return [result for page in pages for result in self._start_committed(saga, page)]

    def _start_committed(self, saga: Saga[Any, Any], new: list[runs.Start]) -> list[SagaResult]:
        try:
            self._insert(saga, new)
        except StoreUnavailableError as first:  # see `_again_if_broken`
            try:
                self._insert(saga, new)
            except StoreUnavailableError as second:
                raise _of_runs(new, first if first.in_doubt else second) from None
        return [self._poller.expect(SagaResult(self, each.id, saga)) for each in new]

    async def astart(
        self, saga: Saga[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
    ) -> SagaResult:
        """Start a run without blocking the event loop; `transaction` may be async.  Raises: as `start`."""
        new, transaction = self.prepare(saga, saga.codec.encode_call(args, kwargs), options)
        if transaction is None:
            return await asyncio.to_thread(self.start_encoded, saga, new)
        from orchestrator.store import foreign

        created = await foreign.aexecute(transaction, runs.START, new.values()) is not None
        if not created:
            self._compare(saga, new, await foreign.aexecute(transaction, runs.IDENTITY, {"id": new.id}))
        elif starting.is_due(new):
            foreign.after_commit(transaction, functools.partial(self._ring_quietly, new.queue))
        return SagaResult(self, new.id, saga)

    def handle(self, saga: Saga[Any, Any] | None, run_id: str) -> SagaResult:
        """Return a handle to a run."""
        return SagaResult(self, run_id, saga)

    def unknown_tasks(self, names: set[str]) -> list[str]:
        """Return none: without an app nobody can say which tasks there are."""
        return []

    def _insert(self, saga: Saga[Any, Any], new: list[runs.Start]) -> None:
        queue = new[0].queue
        with self.pool.connection() as connection, _schema_named():
            failpoint("start.before", connection)
            started, rings = runs.start_and_look(connection, new, queue)
            failpoint("start.after", connection)
            self._try_to_ring(queue, rings)
            for each in new:
                if each.id not in started:
                    self._compare(saga, each, runs.identity(connection, each.id))

    def prepare(self, saga: Saga[Any, Any], encoded: Json, options: dict[str, Any]) -> tuple[runs.Start, Any]:
        """Return what is to be started, and the caller's transaction if any; see `starting.prepare`."""
        return starting.prepare(saga, encoded, options, self._default_queue)

    def _compare(self, saga: Saga[Any, Any], new: runs.Start, known: tuple[Any, ...] | None) -> None:
        if known is None:
            raise ConflictError(f"run {new.id} was being started by somebody else and is gone again; try once more")
        name, version, text, state = known
        given: Any = new.input
        if version is None:
            raise ConflictError(
                f"run id {new.id} belonged to a run of {name} that ended {state} and was pruned; an id is never free "
                "again, so this starts nothing. Use a new id."
            )
        if name != new.saga:
            raise ConflictError(f"run id {new.id} belongs to a run of {name}; choose another id for {new.saga}")
        recorded: Any = read_stored(text)
        if canonical_text(recorded) != canonical_text(given) and not saga.codec.same(recorded, given):
            raise ConflictError(
                f"run {new.id} of {name} was started with other input; the same id with other input is a conflict, "
                "not a second run. Use a new id, or pass the same input."
            )

    def known_to_workers(self) -> set[str]:
        """Return every task that a living worker has registered."""
        with self.pool.connection() as connection, _schema_named():
            return {target for worker in runs.serving(connection) for target in worker.targets}

    # -- asking --------------------------------------------------------------------------------------------------------
    def outcome(self, run_id: str) -> runs.Outcome:
        """Return how a run stands.  Raises: UnknownRunError, StoreUnavailableError."""
        _known(run_id)

        def ask() -> runs.Outcome:
            with self.pool.connection() as connection, _schema_named():
                found = runs.outcomes(connection, [run_id]).get(run_id)
                if found is None:
                    raise unknown_run(run_id, connection)
                return found

        return self._again_if_broken(ask)

    def wait(self, run_id: str) -> Future[runs.Outcome]:
        """Return a future that is done when the run is terminal.  Raises: UnknownRunError for what is no id."""
        _known(run_id)  # all callers share one statement, and one id that cannot be asked for would fail it for all
        return self._poller.wait(run_id)

    def forget(self, run_id: str, future: Future[runs.Outcome]) -> None:
        """Stop waiting."""
        self._poller.forget(run_id, future)

    # -- orders --------------------------------------------------------------------------------------------------------
    def cancel(self, run_id: str, reason: str = "", by: str = "") -> None:
        """Ask a run to stop and compensate; it does so in its own time.

        Raises: UnknownRunError; UsageError if the run has ended, is past its pivot, or is a child that is done.
        """
        outcome = self._open(run_id, "cancelled")
        self._check_not_done(outcome, "cancelled")
        if outcome.past_pivot:
            raise UsageError(
                f"run {run_id} is past its point of no return (its pivot succeeded) and can only go forward"
            )
        self._order(run_id, Cancel(by or whoami(), reason), "cancelled")

    def terminate(self, run_id: str, reason: str = "", by: str = "") -> None:
        """Stop a run and undo nothing; what is left is listed in its result.  Raises: UnknownRunError, UsageError."""
        self._open(run_id, "terminated")
        self._order(run_id, Terminate(by or whoami(), reason), "terminated")

    def signal(self, run_id: str, name: str, payload: Any = None, signal_id: str | None = None) -> str:
        """Tell a run something; returns the signal's id, by which the run drops a second one.

        Commits.  Raises: UnknownRunError, PayloadError; UsageError if the run has ended, or its saga declares its
        signals and this is none of them.
        """
        if not is_name(name) or not (signal_id is None or is_name(signal_id)):
            raise UsageError("the name and id of a signal must be text of 1 to 500 printable bytes")
        outcome = self._open(run_id, "signalled")
        signal_id = signal_id or str(uuid.uuid4())
        told = Signal(name, signal_id, payload_of(run_id, saga_of(outcome), name, payload))
        self._order(run_id, told, "signalled")
        return signal_id

    def operate(
        self,
        run_id: str,
        action: str,
        key: str = "",
        *,
        by: str = "",
        reason: str = "",
        value: Json = None,
        no_effect: bool = False,
    ) -> None:
        """Order `retry`, `skip` or `resolve` for a parked key (empty: the run itself), `pause` or `resume` for a run.

        Name and reason are kept on record.
        Raises: UnknownRunError; UsageError if that key is not parked, naming the keys that are, or if the step (the
        saga) is known here and returns nothing like `value`.
        """
        outcome = self._open(run_id, _OPERATED[action])
        if action in ("pause", "resume"):
            self._check_pause(outcome, action, key)
        else:
            self._check_parked(outcome, action, key)
        if action == "resolve":
            self._check_result(outcome, key, value, no_effect)
        self._order(run_id, Operate(action, key, by or whoami(), reason, value, no_effect), _OPERATED[action])

    def _check_pause(self, outcome: runs.Outcome, action: str, key: str) -> None:
        if key:
            raise UsageError(f"a run is paused as a whole: leave out the key {key!r:.100}")
        if action == "pause" and runs.goes_back(outcome.state, outcome.error, outcome.past_pivot):
            raise UsageError(f"run {outcome.id} is being undone, which cannot be paused")
        if action == "pause":
            self._check_not_done(outcome, "paused")
        if action == "resume":
            with self.pool.connection() as connection:
                held = pauses.pauses_of(connection, outcome.saga)
            if held:
                raise UsageError(
                    f"run {outcome.id} is paused with all runs of {outcome.saga}, by {held[0].by}; resume those"
                )

    def _check_not_done(self, outcome: runs.Outcome, what: str) -> None:
        with self.pool.connection() as connection:
            root = runs.done_children(connection, [outcome.id]).get(outcome.id)
        if root:
            raise UsageError(
                f"run {outcome.id} is done and only waits to be completed, or undone, with run {root}, so it cannot be "
                f"{what} alone"
            )

    def _check_parked(self, outcome: runs.Outcome, action: str, key: str) -> None:
        run_id = outcome.id
        parked = [item["key"] for item in outcome.parked if isinstance(item, dict)]
        known = ", ".join(repr(item) if item else "the run itself" for item in parked)
        if not parked:
            raise UsageError(
                f"run {run_id} is not parked, it is {outcome.state}: there is nothing to {action}; what it waits for "
                f"tells `saga explain {as_typed(run_id)}`"
            )
        if key not in parked:
            what = f"{key!r} of run {run_id} is not parked" if key else f"run {run_id} is not parked as a whole"
            raise UsageError(f"{what}; parked there: {known}")
        if not key and action == "skip":
            last = "`resolve`" if outcome.past_pivot else "`resolve` or `cancel`"
            raise UsageError(f"run {run_id} itself cannot be skipped; `retry` it with mended code, or {last} it")
        if not key and action == "resolve" and len(parked) > 1:
            raise UsageError(f"run {run_id} has other keys parked ({known}); settle those first, then resolve the run")

    def _check_result(self, outcome: runs.Outcome, key: str, value: Json, no_effect: bool) -> None:
        """What a person says that a step has returned is read by saga code as what the step returns."""
        if any(isinstance(item, dict) and (item["key"], item["role"]) == (key, "undo") for item in outcome.parked):
            if value is not None or no_effect:  # said of the step, and it would be taken as: it is undone
                raise UsageError(
                    f"run {outcome.id}: the undo of {key} is parked, not the step; to resolve that says that you undid "
                    "the step yourself, and takes no result"
                )
            return
        if no_effect:
            return
        declared: Any = saga_of(outcome)
        if key:
            with self.pool.connection() as connection:
                declared = step_registry.steps.get(runs.task_of(connection, outcome.id, key))
        try:
            if declared is not None:
                declared.codec.decode_result(value)
        except PayloadError as error:
            flaw = explain(error.__cause__ or error)
            raise UsageError(f"run {outcome.id}: this is nothing that {declared.name} returns: {flaw}") from None

    def pause(self, *, saga: Any = "", queue: str = "", reason: str = "", by: str = "") -> bool:
        """Pause a saga (its name), with all its runs and those to come, or a queue; False if it is paused already.

        It holds within a second everywhere.  Commits.  Raises: UsageError, StoreUnavailableError.
        """
        kind, name = _saga_or_queue(saga, queue)
        _check_words(by, reason)
        with self.pool.connection() as connection, _schema_named():
            paused = pauses.pause(connection, kind, name, by or whoami(), reason)
            self._tell(connection, kind, name)
        return paused

    def resume(self, *, saga: Any = "", queue: str = "", reason: str = "", by: str = "") -> bool:
        """End the pause of a saga or a queue; False if there is none.

        A run that was paused by itself stays so.  Commits.  Raises: UsageError, StoreUnavailableError.
        """
        kind, name = _saga_or_queue(saga, queue)
        _check_words(by, reason)
        with self.pool.connection() as connection, _schema_named():
            lifted = pauses.lift(connection, kind, name, by or whoami(), reason)
            self._tell(connection, kind, name)
            if kind == "queue":
                self.ring_for(connection, name, _PAGE)
        return lifted

    def bulk(
        self,
        action: str,
        *,
        by: str = "",
        reason: str = "",
        dry_run: bool = False,
        everything: bool = False,
        **chosen: Any,
    ) -> Effects:
        """Order `cancel`, `terminate`, `pause`, `resume`, `retry` or `skip` for all runs that a filter finds.

        The filter: `saga`, `states`, `step` (parked there), `started_after`, `started_before`, `tags`, `limit`; see
        `orchestrator.bulk.Filter`.  With `dry_run` it only says what would be done.  Commits page by page.
        Raises: UsageError, StoreUnavailableError; what was ordered before stays so, and ordering it again is harmless.
        """
        from orchestrator.bulk import Filter, Order, give  # and SQLAlchemy with it

        for option in ("started_after", "started_before"):
            chosen[option] = starting.aware(option, chosen.get(option))
        for option in ("saga", "step"):
            chosen[option] = getattr(named := chosen.get(option, ""), "name", named)
        try:
            wanted = Filter(**chosen)
        except TypeError as error:
            raise UsageError(f"bulk: {error}") from None
        order = Order(cast(Any, action), by or whoami(), reason, wanted.step)
        with self.pool.connection() as connection, _schema_named():
            ring = functools.partial(self.ring_for, connection)
            return give(connection, order, wanted, dry_run=dry_run, everything=everything, ring=ring)

    def prune(
        self,
        older_than: timedelta,
        *,
        states: Iterable[str] = (),
        saga: Any = "",
        limit: int | None = None,
        dry_run: bool = False,
        archive: str | os.PathLike[str] | None = None,
    ) -> Pruned:
        """Delete runs that ended longer ago than `older_than`, each with all that belongs to it; their ids stay taken.

        With `archive`, a folder, they are first written there as JSON Lines.  Commits, a few hundred runs at a time.
        Raises: UsageError, StoreUnavailableError; what was pruned before stays so.
        """
        states = states if isinstance(states, str) else tuple(states)  # and is refused
        chosen = Chosen(older_than, states, getattr(saga, "name", saga), limit)
        with self.pool.connection() as connection, _schema_named():
            return prune(connection, chosen, dry_run=dry_run, archive=archive)

    def reconcile(self, checks: Iterable[str] = (), *, directory: str | os.PathLike[str] | None = None) -> Report:
        """Run the checks of these names, or all, those of the engine as well; report into a directory, if one is given.

        Reports and never mends; a break starts a run where its check says so.  Commits how far it has come.
        Raises: UsageError, StoreUnavailableError.
        """

        def prepare(saga: Saga[Any, Any], run_id: str, found: Looked) -> runs.Start:
            return self.prepare(saga, saga.codec.encode_call((found,), {}), {"task_id": run_id})[0]

        checks = [checks] if isinstance(checks, str) else checks
        where = None if directory is None else Path(directory)
        with self.pool.connection() as connection, _schema_named():
            return reconcile(connection, list(checks), where, prepare=prepare)

    def _tell(self, connection: Connection, kind: pauses.Kind, name: str) -> None:
        more = kind == "saga"
        while more:
            more, queues = pauses.tell(connection, name)
            for queue, rows in Counter(queues).items():
                self.ring_for(connection, queue, rows)

    def _open(self, run_id: str, what: str) -> runs.Outcome:
        outcome = self.outcome(run_id)
        _refuse_ended(run_id, outcome.state, what)
        return outcome

    def _order(self, run_id: str, arrival: Arrival, what: str) -> None:
        """Leave an order for a run that has not ended: it cannot end before the order is there for its last turn."""
        check(encode(arrival), what=f"the order for run {run_id}")
        with self.pool.connection() as connection:
            failpoint("order.before", connection)
            with connection.transaction():
                failpoint("order.begun", connection)
                _refuse_ended(run_id, runs.hold(connection, run_id), what)
                queue = arrivals.leave(connection, run_id, encode(arrival), anyone=not _wants_code(arrival))
                failpoint("order.left", connection)
            failpoint("order.after", connection)
            if queue:
                self.ring_for(connection, queue, 1)

    # -- doorbells -----------------------------------------------------------------------------------------------------
    def ring_for(self, connection: Connection, queue: str, rows: int) -> None:
        """Ring as often as it helps; a doorbell that cannot be rung is the pump's to ring."""
        self._try_to_ring(queue, runs.rings_needed(connection, queue, rows))

    def _try_to_ring(self, queue: str, times: int) -> None:
        try:
            failpoint("call.ring.before")
            if times:
                self._ring(queue, times)
            failpoint("call.ring.after")
        except Exception as error:
            logger.info(
                "the doorbell of queue %s could not be rung (%s); the pump rings it", queue, type(error).__name__
            )

    def _ring_quietly(self, queue: str) -> None:
        """Ring after the caller's own commit, which must not seem to have failed because of it."""
        try:
            with self.pool.connection() as connection:
                self.ring_for(connection, queue, 1)
        except Exception as error:
            logger.info(
                "the doorbell of queue %s could not be rung (%s); the pump rings it", queue, type(error).__name__
            )

    def _again_if_broken(self, call: Callable[[], T]) -> T:
        """A pooled connection may have died unnoticed: try once more on a new one.  Calls are idempotent by run id."""
        try:
            return call()
        except StoreUnavailableError:
            return call()


def _refuse_ended(run_id: str, state: str | None, what: str) -> None:
    if state in TERMINAL:
        raise UsageError(f"run {run_id} is {state} already and cannot be {what}")


class _schema_named:  # noqa: N801 - a context manager reads like a function
    """Turn a missing schema into the sentence that says how to make it."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if getattr(error, "sqlstate", None) in ("42P01", "3F000", "42883"):
            raise SchemaError(
                "the database has no orchestrator schema; create it with `celery -A <your app> saga migrate`"
            ) from error


def whoami() -> str:
    """Return the name of the person at the keyboard, for the record of an operator's decision."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _of_runs(new: list[runs.Start], error: StoreUnavailableError) -> StoreUnavailableError:
    """Name the runs that may have started: who gave no id learns it here."""
    if error.in_doubt:
        error.args = (f"run {new[0].id}{' and others' if new[1:] else ''}: {error}",)
    return error


def _known(run_id: str) -> None:
    if not is_name(run_id, limit_bytes=2600):  # a correcting run is named after a run and a key
        raise unknown_run(run_id)


def _saga_or_queue(saga: Any, queue: str) -> tuple[pauses.Kind, str]:
    name = getattr(saga, "name", saga)
    if bool(name) is bool(queue) or not is_name(name or queue):
        raise UsageError("say which saga or which queue, by its name and not both")
    return ("saga", name) if name else ("queue", queue)


def _check_words(by: str, reason: str) -> None:
    check({"by": by, "reason": reason}, what="the order")


def _wants_code(arrival: Arrival) -> bool:
    """To tell or to go on with the run itself takes its code; stopping and mending a key can be done by any worker."""
    return isinstance(arrival, Signal) or (
        isinstance(arrival, Operate) and not arrival.key and arrival.action != "pause"
    )
