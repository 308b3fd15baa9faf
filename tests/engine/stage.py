"""A worker's child without Celery: a drainer whose steps are plain functions, on a real database.

Owns the runner that calls functions, and reading what became of a run.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg

from orchestrator import saga as sagas
from orchestrator.celery.runner import wants_session
from orchestrator.client import Client
from orchestrator.codec import FunctionCodec
from orchestrator.engine.commit import Identity, Scope
from orchestrator.engine.drain import Drainer
from orchestrator.engine.worker import Invocation, Worker
from orchestrator.machine.journal import AttemptEnded
from orchestrator.machine.policy import RetryPolicy
from orchestrator.machine.turn import Script
from orchestrator.result import SagaResult
from orchestrator.saga import Saga
from orchestrator.settings import Settings
from orchestrator.step import StepContext, current_step
from orchestrator.step import registry as steps
from orchestrator.store import liveness, runs
from orchestrator.store.connection import Connection, TransactionFailed, open_connection
from orchestrator.store.transaction import Transactions
from orchestrator.store.turns import Taken

QUEUE = "celery"
_children = itertools.count(1)


class _RolledBack(Exception):
    """Leaves the transaction of a step that failed, as Celery's runner does."""

    def __init__(self, invocation: Invocation) -> None:
        super().__init__()
        self.invocation = invocation


class Calls:
    """Runs a step by calling its function; keeps what it was asked to run, and may be interrupted before and after."""

    def __init__(self, worker: str, dsn: str) -> None:
        self.worker = worker
        self.calls: list[tuple[str, str, int]] = []
        self.contexts: list[StepContext] = []
        self.before: Callable[[Taken], None] = lambda taken: None
        self.after: Callable[[Taken], None] = lambda taken: None
        self._transactions = Transactions(dsn.replace("postgresql://", "postgresql+psycopg://"))

    def invoke(self, taken: Taken, context: StepContext) -> Invocation:
        return self._call(taken, context)

    def invoke_in_transaction(
        self, taken: Taken, context: StepContext, settle: Callable[[Connection, Invocation], None]
    ) -> Invocation:
        def finish(connection: Connection, invocation: Invocation) -> bool:
            settle(connection, invocation)
            return True

        def work(connection: Any) -> Invocation:
            invocation = self._call(taken, context, connection)
            if invocation.error is not None:
                raise _RolledBack(invocation)
            return invocation

        timeout = timedelta(seconds=taken.call["t"])
        try:
            return self._transactions.run(wants_session(steps.steps[taken.task]), timeout, work, finish)
        except _RolledBack as failed:
            return failed.invocation
        except TransactionFailed as failed:
            return Invocation(error=failed.reason, harmless=True)

    def _call(self, taken: Taken, context: StepContext, *injected: Any) -> Invocation:
        self.calls.append((taken.role, taken.key, taken.attempt))
        self.contexts.append(context)
        declared = steps.steps[taken.task]
        codec: FunctionCodec = declared.codec
        self.before(taken)
        current = current_step.set(context)
        try:
            args, kwargs = codec.decode_call(taken.call["a"])
            result = codec.encode_result(declared.function(*injected, *args, **kwargs))
        except Exception as error:
            return Invocation(error=error)
        finally:
            current_step.reset(current)
            self.after(taken)
        return Invocation(result)

    def is_transactional(self, task: str) -> bool:
        return steps.steps[task].options.transactional

    def non_retryable(self, task: str) -> RetryPolicy | None:
        declared = steps.steps.get(task)  # none is of a function of the saga itself
        return declared.options.retry if declared else None

    def finished(self, taken: Taken, outcome: AttemptEnded) -> None: ...

    def close(self) -> None:
        self._transactions.dispose()


class Child:
    """One child of a worker of its own: an incarnation, a drainer, and what it ran."""

    def __init__(self, database_url: str, *, dsn: str = "", **settings: Any) -> None:
        patient = {"drain_seconds": 60.0, **settings}  # a machine may be so busy that nothing much is done in one
        self.settings = Settings.from_environment({}, database_url=dsn or database_url, **patient)
        self.connection = open_connection(database_url, name="test")
        self.number = next(_children)
        self.targets = [*steps.steps, *(saga.target for saga in sagas.registry.sagas.values())]
        self.incarnation = self._register()
        self.runner = Calls(f"child-{self.number}", dsn or database_url)
        self.rings: list[str] = []
        self.stopping = False
        self.waited_for = True
        self.rung = False
        self.scripts: Callable[[str, int], Script | None] = script_of
        self.drainer = Drainer(
            Worker(
                settings=self.settings,
                scope=Scope([QUEUE], self.targets, lambda: not self.stopping),
                identity=lambda: Identity(self.incarnation, self.number),
                script_of=lambda name, version: self.scripts(name, version),
                runner=self.runner,
                ring=lambda queue, times: self.rings.extend([queue] * times),
                stopping=lambda: self.stopping,
                waited_for=lambda: self.waited_for,
                rung=lambda: self.rung,
            )
        )

    def _register(self) -> int:
        return liveness.register(
            self.connection, node=f"node-{self.number}", host="test", pid=self.number, queues=[QUEUE],
            targets=self.targets, slots=1,
        )  # fmt: skip

    def reborn(self) -> None:
        """Take a new incarnation, as a companion does for a worker that was declared dead while it lived."""
        self.incarnation = self._register()

    def drain(self) -> int:
        """Work until nothing is due."""
        return self.drainer.drain()

    def in_background(self) -> threading.Thread:
        """Drain in a thread of its own."""
        thread = threading.Thread(target=self.drain, daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        self.drainer.close()
        self.runner.close()
        self.connection.close()


def script_of(name: str, version: int) -> Script | None:
    saga = sagas.registry.sagas.get((name, version))
    return saga.script() if saga else None


def start(connection: psycopg.Connection[Any], saga: Saga[Any, Any], *args: Any, run_id: str = "run") -> str:
    """Start a run of `saga`."""
    new = runs.Start(
        id=run_id, saga=saga.name, version=saga.options.version, input=saga.codec.encode_call(args, {}), queue=QUEUE
    )
    assert runs.start(connection, new)
    return run_id


def run(client: Client, child: Child, saga: Saga[Any, Any], *args: Any, run_id: str = "run") -> SagaResult:
    """Start a run as a caller does, and let the child do what is due."""
    result = client.start(saga, args, {}, {"task_id": run_id})
    child.drain()
    return result


def states(connection: psycopg.Connection[Any]) -> dict[str, str]:
    """Return the state of every run."""
    return dict(connection.execute("SELECT id, state FROM orchestrator.runs").fetchall())


def until(child: Child, done: Callable[[], bool]) -> None:
    """Drain until it has come to that: for what waits for the clock."""
    for _ in range(400):
        child.drain()
        if done():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


def entries(connection: psycopg.Connection[Any], run_id: str = "run") -> list[dict[str, Any]]:
    """Return the journal of a run, entry by entry."""
    return [entry for _, _, row in runs.history(connection, run_id) for entry in row]  # type: ignore[misc]


def kinds(connection: psycopg.Connection[Any], run_id: str = "run") -> list[str]:
    return [entry["e"] for entry in entries(connection, run_id)]


def state(connection: psycopg.Connection[Any], run_id: str = "run") -> str:
    found = runs.run(connection, run_id)
    assert found is not None
    return str(found["state"])


def work(connection: psycopg.Connection[Any], run_id: str = "run") -> list[tuple[Any, ...]]:
    """Return what is outstanding of a run: key, role, attempt, whether it is begun."""
    return connection.execute(
        "SELECT key, role, attempt, fence IS NOT NULL FROM orchestrator.work WHERE run_id = %s ORDER BY key", [run_id]
    ).fetchall()
