"""The Orchestrator: binds declared steps and sagas to a Celery app.

Owns what is registered with Celery: a real task for every step, one for every saga, and the drain.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Unpack

from billiard.common import terminate_handler_fired
from celery import Celery, Task, signals
from celery._state import _get_active_apps
from celery.exceptions import Ignore, Reject

from orchestrator import saga as sagas
from orchestrator.celery import events, guard, nightly, runner, worker
from orchestrator.celery.blocking import watch_for
from orchestrator.celery.doorbell import DRAIN, Bell, connection_options
from orchestrator.client import Client
from orchestrator.codec import Json, set_limit
from orchestrator.engine.commit import Scope
from orchestrator.engine.drain import Drainer
from orchestrator.engine.reconcile import Report
from orchestrator.engine.schedules import OPTIONS
from orchestrator.engine.worker import Worker
from orchestrator.errors import (
    ConfigurationError,
    DefinitionError,
    OrchestratorError,
    Rejected,
    SchemaError,
    StoreUnavailableError,
    UsageError,
)
from orchestrator.failpoints import failpoint
from orchestrator.machine.loop import inside_saga
from orchestrator.machine.turn import Script
from orchestrator.result import SagaResult
from orchestrator.retention import Pruned
from orchestrator.saga import Saga
from orchestrator.settings import PREFIX, Settings
from orchestrator.step import Step, current_step, in_transaction_of, set_router
from orchestrator.step import registry as step_registry
from orchestrator.store.permits import Permits

if TYPE_CHECKING:
    from orchestrator.bulk import Action, Effects
    from orchestrator.options import BulkOptions, PruneOptions
    from orchestrator.store.transaction import Transactions

logger = logging.getLogger(__name__)
_events_lock = threading.Lock()
_open: list[Orchestrator] = []  # of this process


class Orchestrator:
    """Bind every declared step and saga to `app`: workers of it drive sagas, and ``saga.delay`` works.

    `database_url` (or ORCHESTRATOR_DATABASE_URL) names the Postgres that holds the runs; other settings as keyword
    arguments, see `orchestrator.settings.Settings`.  Nothing is connected before it is needed.
    Of several apps in one process the last one has the sagas and steps, but in a worker that of the worker.
    Raises: UsageError for an app that has one.
    """

    def __init__(self, app: Celery, *, database_url: str | None = None, **settings: Any) -> None:
        if getattr(app, "orchestrator", None) is not None:
            raise UsageError(f"app {app.main!r} has an Orchestrator already: use that one, app.orchestrator")
        self.app = app
        self._overrides = {"database_url": database_url, **settings}
        self._local = threading.local()
        self._warned_at = 0.0
        self._step_events: events.StepEvents | None = None
        app.orchestrator = self
        app.__reduce__ = self._reduce_app
        _default_beat(app)
        _refuse_sending_in_sagas(app)
        guard.install(app)
        set_router(self._route)
        step_type = type("WorkerStep", (worker.CompanionStep,), {"orchestrator": self, "__module__": __name__})
        app.steps["worker"].add(step_type)
        app.steps["consumer"].update((worker.CompanionHeard, events.ShareEvents))
        self._register_drain()
        signals.worker_process_init.connect(self._begin_child)
        step_registry.listen(self._bind_step)
        sagas.registry.listen(self._bind_saga)
        _warn_of_another_database(self)

    def take_over(self) -> None:
        """Take sagas, steps and routes back from an app that was bound later: a worker is that of one app."""
        set_router(self._route)
        for step in step_registry.steps.values():
            step.bound = self.app.tasks[step.name]
        for saga in sagas.registry.sagas.values():
            saga.starter = self

    @property
    def database(self) -> str:
        """The database's URL as far as it is known before the settings are read; a secret."""
        return str(self._overrides["database_url"] or os.environ.get(f"{PREFIX}DATABASE_URL", ""))

    def _reduce_app(self) -> Any:
        """A pool child that is spawned, not forked, gets a copy of the app: it needs an Orchestrator as well."""
        app: Any = type(self.app)
        return _respawn, (*app.__reduce__(self.app), self._overrides)

    def _begin_child(self, **_: Any) -> None:
        """In a pool child: one that is spawned has none of main's filters of logs."""
        events.quiet_logs(self.settings.show_payloads)

    # -- what the app has ----------------------------------------------------------------------------------------------
    @functools.cached_property
    def settings(self) -> Settings:
        """The settings, read at first use.  Raises: ConfigurationError."""
        settings = Settings.from_environment(**self._overrides)
        set_limit(settings.payload_limit)
        return settings

    def settings_at_start(self) -> Settings:
        """The settings, for a worker or a beat that starts: what is wrong with them ends it with one sentence.

        Raises: SystemExit.
        """
        try:
            return self.settings
        except ConfigurationError as error:
            raise SystemExit(f"orchestrator: {error}") from None

    @functools.cached_property
    def bell(self) -> Bell:
        """The doorbells of this process."""
        return Bell(connection_options(self.app), self.settings.doorbell_expires)

    @functools.cached_property
    def client(self) -> Client:
        """The client that starts and asks for runs."""
        return Client(self.settings, self._ring, self._default_queue)

    @functools.cached_property
    def schedules(self) -> Any:
        """The schedules of this app's beat: `listing`, `pause`, `resume`, `trigger`, `backfill`."""
        from orchestrator.celery.schedules import Desk  # with Celery's beat, which no worker needs

        return Desk(self)

    def _ring(self, queue: str, times: int) -> None:
        self.bell.ring(queue, times)

    def _default_queue(self) -> str:
        return str(self.app.conf.task_default_queue)

    def _route(self, task: str) -> str:
        """Return the queue that the app sends a task to: that of the task itself, or by the app's routes."""
        known = self.app._tasks.get(task)
        queue = getattr(known, "queue", None) or self._ask_router(task, known)
        name = getattr(queue, "name", queue) or self.app.conf.task_default_queue  # it may be one of kombu's queues
        return str(name)

    def _ask_router(self, task: str, known: Any) -> Any:
        try:
            return self.app.amqp.router.route({}, task, task_type=known).get("queue")
        except Exception as error:
            raise UsageError(
                f"task_routes gives {task} no queue: {type(error).__name__}: {error}. A router is asked once for each "
                "task, without arguments: let it do without them, or name the queue with queue="
            ) from error

    # -- starting ------------------------------------------------------------------------------------------------------
    def start(
        self, saga: Saga[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
    ) -> SagaResult:
        """Start a run; see `Client.start`."""
        self._refuse_eager(saga)
        return self.client.start(saga, args, kwargs, options)

    def start_many(
        self, saga: Saga[Any, Any], calls: Iterable[tuple[Any, ...]], options: dict[str, Any]
    ) -> list[SagaResult]:
        """Start many runs; see `Client.start_many`."""
        self._refuse_eager(saga)
        return self.client.start_many(saga, calls, options)

    async def astart(
        self, saga: Saga[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
    ) -> SagaResult:
        """Start a run without blocking the event loop; see `Client.astart`."""
        self._refuse_eager(saga)
        return await self.client.astart(saga, args, kwargs, options)

    def handle(self, saga: Saga[Any, Any] | None, run_id: str) -> SagaResult:
        """Return a handle to a run."""
        return self.client.handle(saga, run_id)

    def pause(self, *, saga: Saga[Any, Any] | str = "", queue: str = "", reason: str = "", by: str = "") -> bool:
        """Pause a saga or a queue; see `Client.pause`."""
        return self.client.pause(saga=saga, queue=queue, reason=reason, by=by)

    def resume(self, *, saga: Saga[Any, Any] | str = "", queue: str = "", reason: str = "", by: str = "") -> bool:
        """End the pause of a saga or a queue; see `Client.resume`."""
        return self.client.resume(saga=saga, queue=queue, reason=reason, by=by)

    def unknown_tasks(self, names: set[str]) -> list[str]:
        """Return which of these tasks neither this app nor a living worker has."""
        missing = names - self.app.tasks.keys()
        if missing:
            self.app.loader.import_default_modules()  # what a worker of this app would have included
            missing -= self.app.tasks.keys()
        return sorted(missing - self.client.known_to_workers()) if missing else []

    def bulk(self, action: Action, **options: Unpack[BulkOptions]) -> Effects:
        """Give one order to all runs that a filter finds; see `Client.bulk`."""
        return self.client.bulk(action, **options)

    def prune(self, older_than: timedelta, **options: Unpack[PruneOptions]) -> Pruned:
        """Delete runs that ended longer ago; see `Client.prune`."""
        return self.client.prune(older_than, **options)

    def reconcile(self, checks: Iterable[str] = (), *, directory: str | Path | None = None) -> Report:
        """Run checks and report; see `Client.reconcile`."""
        return self.client.reconcile(checks, directory=directory)

    def _refuse_eager(self, saga: Saga[Any, Any]) -> None:
        if self.app.conf.task_always_eager:
            raise UsageError(
                f"task_always_eager is set, but a saga is durable and runs in workers; test {saga.name} with "
                "orchestrator.testing.run(...)"
            )

    def start_by_message(self, name: str, run_id: str, args: Any, kwargs: Any) -> str | None:
        """Start a run that a Celery message asks for; its id is the message's, so that a redelivery starts nothing."""
        saga = sagas.registry.latest(name)
        encoded = saga.codec.encode_call(tuple(args), dict(kwargs), from_json=True)
        new, _ = self.client.prepare(saga, encoded, {"task_id": run_id})
        failpoint("message.before")
        result = self.client.start_encoded(saga, new)
        failpoint("message.started")
        return result.id

    def refuse_plain_messages(self, name: str) -> None:
        """With ``accept_messages="doorbells"`` messages start nothing.  Raises: Ignore."""
        if self.settings.accept_messages == "doorbells":
            logger.warning("a message for %s was ignored: accept_messages is 'doorbells'", name)
            raise Ignore

    # -- registering ---------------------------------------------------------------------------------------------------
    def _bind_step(self, step: Step[Any, Any]) -> None:
        options = dict(step.options.celery)
        for option in options:
            if not hasattr(self.app.Task, option):
                raise DefinitionError(f"step {step.name}: {option}= is an option of neither steps nor Celery tasks")
        if step.options.queue:
            options["queue"] = step.options.queue
        # The options are inherited: of its own, Celery calls a task's queue and priority deprecated.
        base = type("StepTask", (runner.StepTaskMixin, self.app.Task), {"__module__": __name__, **options})
        attributes = {
            "name": step.name, "step": step, "orchestrator": self, "__module__": step.__module__,
            "__doc__": step.__doc__, "__wrapped__": step.function, "throws": options.get("throws", _expected(step)),
        }  # fmt: skip
        step.bound = self._register(base, attributes)

    def _bind_saga(self, saga: Saga[Any, Any]) -> None:
        saga.starter = self
        if saga.name in self.app._tasks:
            return
        base = type("SagaTask", (_SagaTask, self.app.Task), {"__module__": __name__})
        attributes = {"name": saga.name, "orchestrator": self, "__module__": saga.__module__, "__doc__": saga.__doc__}
        self._register(base, attributes)

    def _register_drain(self) -> None:
        # Not of the app's own Task: what that has around a task, such as a transaction, belongs around a step.
        base = type("DrainTask", (_DrainTask, Task), {"__module__": __name__})
        self._register(base, {"name": DRAIN, "orchestrator": self})
        for task in nightly.TASKS:
            base = type(task.__name__, (task, self.app.Task), {"__module__": __name__})
            self._register(base, {"name": task.name, "orchestrator": self})

    def _register(self, base: type[Task], attributes: dict[str, Any]) -> Any:
        task = type(base.__name__, (base,), {"app": self.app, **attributes})()
        self.app._tasks[task.name] = task
        self.app._tasks[task.name].bind(self.app)
        return task

    # -- draining ------------------------------------------------------------------------------------------------------
    def drain(self) -> None:
        """Answer a doorbell: work until nothing is due, or for about a second."""
        drainer = getattr(self._local, "drainer", None)
        if drainer is None:
            drainer = self._local.drainer = self._new_drainer()
        try:
            drainer.drain()
        except StoreUnavailableError as error:
            if monotonic() - self._warned_at > 10:
                self._warned_at = monotonic()
                logger.warning("%s", error)
            time.sleep(0.2)
        if terminate_handler_fired():
            raise SystemExit  # whoever kept the one that was raised has recorded what it interrupted

    def _events(self, node: str) -> events.StepEvents:
        """Return the events of this process; its drainers share them."""
        with _events_lock:
            if self._step_events is None:
                options, show = connection_options(self.app), self.settings.show_payloads
                self._step_events = events.StepEvents(self.app, node, options, show)
            return self._step_events

    def _new_drainer(self) -> Drainer:
        self.take_over()  # a child that was spawned has imported the apps anew
        gc.freeze()  # what was imported until now stays: no collection need look at it again
        gc.collect()  # finds nothing, and so the next full one does not wait until a quarter of all that has come anew
        bond = worker.Bond()
        targets = {name for name in self.app.tasks if not name.startswith("celery.")}
        targets |= {saga.target for saga in sagas.registry.sagas.values()}
        permits, transactions = _permits(bond.folder, bond.slots, self.settings.max_connections)
        scope = Scope(frozenset(bond.queues), frozenset(targets), lambda: not _stopping())
        return Drainer(
            Worker(
                settings=self.settings,
                scope=scope,
                identity=bond.identity,
                script_of=script_of,
                runner=runner.Runner(
                    self.app,
                    bond.node,
                    lambda: self._transactions(transactions),
                    self._events(bond.node),
                ),
                ring=self._ring,
                stopping=_stopping,
                waited_for=worker.waited_for,
                rung=worker.rung,
                interrupted=terminate_handler_fired,
                lead=worker.lead_here(),
                permits=permits,
                watch_code=watch_for(self.settings.saga_code_timeout),
            )
        )

    def _transactions(self, permits: Permits | None = None) -> Transactions:
        from orchestrator.store.transaction import Transactions  # and SQLAlchemy with it

        settings = self.settings
        return Transactions(settings.sqlalchemy_url, permits, prepare=settings.prepared_statements)

    def in_transaction(self, step: Step[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Json:
        """Run a transactional step outside of a saga, in a transaction of its own; returns its encoded result."""

        def work(connection: Any) -> Json:
            with in_transaction_of(connection):
                return step.codec.encode_result(runner.call(step.function, (connection, *args), kwargs))

        transactions = self._transactions()
        try:
            return transactions.run(
                runner.wants_session(step), timedelta(minutes=5), work, lambda connection, value: True
            )
        finally:
            transactions.dispose()


def _warn_of_another_database(made: Orchestrator) -> None:
    """Say that sagas go to another database than they did; it may be meant, such as an app that a test makes."""
    _open[:] = [other for other in _open if other.app in _get_active_apps()]  # without those that were closed
    if _open and made.database and _open[-1].database not in ("", made.database):
        logger.warning(
            "app %r has another database than app %r, and both are open in this process, where the sagas belong to the "
            "last one: from now on they start in the database of %r. Bind one app in each process, or close() the "
            "one before",
            made.app.main, _open[-1].app.main, made.app.main,
        )  # fmt: skip
    _open.append(made)


def _stopping() -> bool:
    """Tell whether this process is to begin nothing more: its worker stops, or a signal has told it alone to end."""
    return worker.stopping() or bool(terminate_handler_fired())


def _default_beat(app: Celery) -> None:
    """Let ``celery beat`` use the scheduler of this package, unless the app's configuration names one."""

    def configured(source: Any, **_: Any) -> None:
        if not source.value_set_for("beat_scheduler"):
            source.add_defaults({"beat_scheduler": "orchestrator.celery.beat:Scheduler"})

    app.on_after_configure.connect(configured, weak=False)
    if app.configured:
        configured(app.conf)


def _refuse_sending_in_sagas(app: Celery) -> None:
    """Let saga code send no task of the app, not even by a canvas: it would be sent again at every replay."""
    send = app.send_task

    @functools.wraps(send)
    def send_task(name: str, *args: Any, **options: Any) -> Any:
        if inside_saga():
            raise UsageError(
                f"task {name} was sent directly in saga code, which would send it again whenever it is replayed; write "
                "`await saga.step(...)` with the task or its signature, or send it in a step"
            )
        return send(name, *args, **options)

    app.send_task = send_task


def _respawn(rebuild: Callable[..., Celery], arguments: tuple[Any, ...], options: dict[str, Any]) -> Celery:
    app = rebuild(*arguments)
    Orchestrator(app, **options)
    return app


def _permits(folder: Path, slots: int, most: int) -> tuple[Permits | None, Permits | None]:
    """Return the permits of a worker: transactional steps have at most half; none where there is enough for all."""
    if slots * 2 <= most:
        return None, None
    half = max(1, most // 2)
    return Permits(folder, "plain", max(1, most - half)), Permits(folder, "transactional", half)


def _expected(step: Step[Any, Any]) -> tuple[type[BaseException], ...]:
    """Rejections are answers, not faults: Celery logs what a task `throws` without a traceback."""
    retry = step.options.retry
    declared = retry.non_retryable_error_types if retry else ()
    return (Rejected, *(error for error in declared if isinstance(error, type)))


def script_of(name: str, version: int) -> Script | None:
    """Return the script of a saga registered in this process."""
    saga = sagas.registry.sagas.get((name, version))
    return saga.script() if saga else None


class _DrainTask:
    """Answers doorbells; takes nothing from their messages."""

    orchestrator: Orchestrator
    Request = "orchestrator.celery.request:DoorbellRequest"
    ignore_result = True
    send_events = False
    acks_late = False
    rate_limit = 0  # whatever rate an app has for tasks that say nothing of it: as all work waits for doorbells
    embeds_ignored = True
    typing = False

    @classmethod
    def annotate(cls) -> None:
        """Do nothing: what ``task_annotations`` says of all tasks is meant for an application's own."""

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Drain the queues of this worker."""
        self.orchestrator.drain()


class _SagaTask:
    """A saga as a Celery task: starts a run, from a message, from beat, from Flower."""

    name: str
    request: Any
    orchestrator: Orchestrator
    ignore_result = True
    acks_late = True  # a start by message is acknowledged after its commit
    reject_on_worker_lost = True  # ... and comes again if the child that was to start it dies before
    embeds_ignored = True
    typing = False

    def run(self, *args: Any, **kwargs: Any) -> str | None:
        """Start the run that the message asks for."""
        start = functools.partial(self.orchestrator.start_by_message, self.name, self.request.id, args, kwargs)
        if current_step.get() is not None:  # no message, but a step or the link of a canvas: errors are its own
            return start()
        self.orchestrator.refuse_plain_messages(self.name)
        try:
            return start()
        except (StoreUnavailableError, SchemaError, OSError) as error:
            time.sleep(1.0)  # not lost: the broker keeps it until the database is back, and has its schema
            raise Reject(str(error), requeue=True) from error
        except (OrchestratorError, TypeError) as error:
            logger.error("message %s did not start %s: %s", self.request.id, self.name, error)
            raise Ignore from error

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> SagaResult:
        """Start a run directly in Postgres; this is what ``celery call`` of this app and Celery's own scheduler do.

        That scheduler passes what an entry holds for ours, and cannot make use of it.
        """
        options = {name: value for name, value in options.items() if value is not None and name not in OPTIONS}
        return sagas.registry.latest(self.name).apply_async(args or (), kwargs or {}, **options)

    def delay(self, *args: Any, **kwargs: Any) -> SagaResult:
        """Start a run directly in Postgres."""
        return self.apply_async(args, kwargs)
