"""Workers of the simulation: the real drainer in each child, the real companion beside them, real connections.

Owns what a worker's main process does: it starts the others and starts them again.  What Celery does for a step is
done by `Runner`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg

from orchestrator import saga as sagas
from orchestrator.celery.companion import Companion, Config, _Child
from orchestrator.engine.commit import Identity, Scope
from orchestrator.engine.drain import Drainer
from orchestrator.engine.lead import SIZE, Lead
from orchestrator.engine.worker import Invocation, Worker
from orchestrator.errors import StoreUnavailableError
from orchestrator.machine.journal import AttemptEnded
from orchestrator.machine.policy import RetryPolicy
from orchestrator.machine.turn import Script
from orchestrator.settings import Settings
from orchestrator.step import StepContext, current_step
from orchestrator.step import registry as registry_of_steps
from orchestrator.store.connection import Connection, TransactionFailed
from orchestrator.store.transaction import Transactions
from orchestrator.store.turns import Taken
from tests.simulation.provider import limit
from tests.simulation.scheduler import Process
from tests.simulation.steps import SAGAS, TASKS

if TYPE_CHECKING:
    from tests.simulation.world import Simulation


class _RolledBack(Exception):
    def __init__(self, invocation: Invocation) -> None:
        super().__init__()
        self.invocation = invocation


class Runner:
    """Runs steps by calling their functions, and notes whose outcome was refused."""

    def __init__(self, name: str, settings: Settings, world: Simulation) -> None:
        self.worker = name
        self._world = world
        self._scheduler = world.scheduler
        self._settings = settings
        self._transactions: Transactions | None = None

    def invoke(self, taken: Taken, context: StepContext) -> Invocation:
        self._scheduler.tell(f"{self.worker}: runs {taken.role} of {taken.run_id} {taken.key}, attempt {taken.attempt}")
        self._world.ran(taken.run_id, taken.call.get("k", 0), taken.key, taken.role, taken.attempt)
        declared = registry_of_steps.steps[taken.task]
        now = self._scheduler.monotonic
        inside, current = limit.set(now + taken.call["t"]), current_step.set(context)
        try:
            args, kwargs = declared.codec.decode_call(taken.call["a"])
            injected = () if context.connection is None else (context.connection,)
            return Invocation(declared.codec.encode_result(declared.function(*injected, *args, **kwargs)))
        except Exception as error:
            return Invocation(error=error)
        finally:
            limit.reset(inside)
            current_step.reset(current)

    def invoke_in_transaction(
        self, taken: Taken, context: StepContext, settle: Callable[[Connection, Invocation], None]
    ) -> Invocation:
        def work(connection: Any) -> Invocation:
            context.connection = connection
            invocation = self.invoke(taken, context)
            if invocation.error is not None:
                raise _RolledBack(invocation)
            return invocation

        def finish(connection: Connection, invocation: Invocation) -> bool:
            settle(connection, invocation)
            return True

        if self._transactions is None:
            self._transactions = Transactions(self._settings.sqlalchemy_url)
        try:
            return self._transactions.run(False, timedelta(seconds=taken.call["t"]), work, finish)
        except _RolledBack as failed:
            return failed.invocation
        except TransactionFailed as failed:
            return Invocation(error=failed.reason, harmless=True)

    def is_transactional(self, task: str) -> bool:
        declared = registry_of_steps.steps.get(task)
        return declared is not None and declared.options.transactional

    def non_retryable(self, task: str) -> RetryPolicy | None:
        return registry_of_steps.steps[task].options.retry if task in registry_of_steps.steps else None

    def finished(self, taken: Taken, outcome: AttemptEnded) -> None:
        if taken.refused and taken.role == "do":
            self._world.refused.append((taken.run_id, taken.call.get("k", 0), taken.key, taken.attempt))


class Child:
    """A pool child: answers doorbells by draining."""

    def __init__(self, node: Node) -> None:
        self.node = node
        world = node.world
        self.pid = next(world.new_pid)
        self.busy = False
        self.incarnation = node.incarnation
        self.process = Process(f"{node.name}/{self.pid}")
        self.runner = Runner(self.process.name, node.settings, world)
        self._drainer = Drainer(
            Worker(
                settings=node.settings,
                scope=Scope(frozenset(node.queues), frozenset(node.targets), lambda: not node.stopping),
                identity=lambda: Identity(self.incarnation, self.pid),
                script_of=node.script_of,
                runner=self.runner,
                ring=world.broker.ring,
                stopping=lambda: node.stopping,
                waited_for=lambda: node.slots == 1,
                lead=Lead(node.lead, self.pid),
            )
        )
        world.scheduler.spawn(self.process, self.process.name, self._answer)

    def _answer(self) -> None:
        world = self.node.world
        while True:
            world.scheduler.wait(1e9, lambda: self.node.stopping or world.broker.has(self.node.queues))
            if self.node.stopping:
                break
            if not world.broker.take(self.node.queues):
                continue
            self.busy = True
            try:
                self._drainer.drain()
            except StoreUnavailableError:
                world.scheduler.wait(0.2)
            except Exception as error:
                world.broke("a drain ended in " + "".join(traceback.format_exception(error)))
            self.busy = False
        self._drainer.close()


class _Beside(Companion):
    """The companion without its sockets: it is told of deaths by who kills, and tells children by hand."""

    def __init__(self, node: Node, config: Config) -> None:
        super().__init__(config, lambda line: None)
        self._selector.close()
        self._selector = self  # type: ignore[assignment]
        self._node = node
        self._main = node.main  # of this start: the next one has a companion of its own

    def select(self, timeout: float) -> list[Any]:
        self._node.world.scheduler.wait(max(timeout, 0.001), self._wanted)
        known, self._children = self._children, {}
        for child in [] if self._main.ended else self._node.children:
            self._children[child] = _Child([child.pid])  # type: ignore[index]
            if child not in known:
                self._tell(child)
        if self._main.ended and self._main_ended_at is None:
            self._main_ended_at = self._node.world.scheduler.monotonic
        return []

    def _wanted(self) -> bool:
        """Whether a socket ended; a database that is away is not asked again at once."""
        return bool(self._gone) and self._node.world.scheduler.monotonic > self._retry_at

    def _listen(self) -> None:
        self._node.incarnation = self._incarnation or 0

    def _tell(self, connection: Any) -> None:
        self._node.incarnation = self._incarnation or 0
        connection.incarnation = self._node.incarnation

    def _ring(self, queue: str, times: int) -> None:
        self._node.world.broker.ring(queue, times)

    def gone(self, pid: int) -> None:
        self._gone.append(pid)


class Node:
    """A worker: a companion and its children, under one name through all its starts."""

    def __init__(
        self, world: Simulation, name: str, *, queues: list[str], slots: int, knows_saga: bool, **settings: Any
    ) -> None:
        self.world = world
        self.name = name
        self.queues = queues
        self.slots = slots
        self.knows_saga = knows_saga
        self.targets = [*TASKS, *SAGAS] if knows_saga else list(TASKS)
        self.settings = Settings.from_environment({}, database_url=world.database_url, **settings)
        self.children: list[Child] = []
        self.lead = bytearray(SIZE)
        self.companion: _Beside | None = None
        self.beside, self.main = Process(""), Process("")
        self.incarnation = 0
        self.pid = 0
        self.stopping = self.up = False

    def script_of(self, name: str, version: int) -> Script | None:
        found = sagas.registry.sagas.get((name, version)) if self.knows_saga else None
        return found.script() if found else None

    # -- life ----------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Start the main process: the companion first, the children once it has an incarnation."""
        self.pid = next(self.world.new_pid)
        self.world.pids.add(self.pid)
        self.stopping = False
        self.incarnation = 0
        self.up = True
        self.main = Process(f"{self.name}/main")
        self._start_companion()
        self.world.scheduler.spawn(self.main, self.main.name, self._keep)

    def _keep(self) -> None:
        """As the main process does: children are replaced, and so is the companion."""
        scheduler = self.world.scheduler
        while not self.incarnation:
            scheduler.wait(1e9, lambda: self.incarnation > 0 or self.beside.dead)
            if self.beside.dead:
                self._start_companion()
        for queue in self.queues:
            self.world.broker.ring(queue, self.slots)
        while not self.stopping:
            while len(self.children) < self.slots:
                self._start_child()
            if self.beside.dead or not self.beside.actors or self.beside.actors[0].over:
                self._start_companion()
            scheduler.wait(1e9, lambda: self.stopping or len(self.children) < self.slots or self.beside.dead)
        scheduler.wait(1e9, lambda: not any(child.process in self._running() for child in self.children))
        self._forget_children()
        self.world.pids.discard(self.pid)
        self.up = False

    def _running(self) -> list[Process]:
        return [actor.process for actor in self.world.scheduler.actors if not actor.over]

    def _start_child(self) -> None:
        child = Child(self)
        self.world.pids.add(child.pid)
        self.children.append(child)

    def _start_companion(self) -> None:
        config = Config.of(
            self.settings, broker={}, socket="/nonexistent/simulated/socket", node=self.name, pid=self.pid,
            queues=self.queues, targets=self.targets, slots=self.slots, incarnation=self.incarnation or None,
        )  # fmt: skip
        self.beside = Process(f"{self.name}/companion")
        self.world.scheduler.spawn(self.beside, self.beside.name, lambda: self._live(config))

    def _live(self, config: Config) -> None:
        while True:
            self.companion = _Beside(self, config)
            try:
                self.companion.run()
                return
            except (StoreUnavailableError, psycopg.OperationalError):  # it ends, and main starts another one
                self.world.scheduler.wait(0.5)

    def stop(self) -> None:
        """Ask for a warm shutdown."""
        self.stopping = True

    # -- death ---------------------------------------------------------------------------------------------------------
    def kill(self) -> None:
        """SIGKILL everything of this worker."""
        self.up = False
        self._forget_children()
        self.world.pids.discard(self.pid)
        for process in [*self._processes, self.beside, self.main]:
            self.world.scheduler.doom(process)

    def _forget_children(self) -> None:
        self._processes = [child.process for child in self.children]
        for child in self.children:
            self.world.pids.discard(child.pid)
        self.children = []

    def kill_child(self, child: Child) -> None:
        """SIGKILL a child: its socket ends, and its companion sees it."""
        self.world.pids.discard(child.pid)
        self.children.remove(child)
        if self.companion is not None:
            self.companion.gone(child.pid)
        self.world.scheduler.doom(child.process)

    @property
    def processes(self) -> list[Process]:
        return [*(child.process for child in self.children), self.beside, self.main]
