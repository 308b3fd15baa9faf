"""One worker in the test's own process: the engine's drainer, whose steps are stubbed, called, or made to fail.

Owns carrying out faults, and what others do for a worker that died: its memory is gone, what it had begun is given
back, and a fresh one takes over.  Must never decide anything about a run: the engine does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from celery import current_app

from orchestrator.celery.app import script_of
from orchestrator.celery.runner import wants_session
from orchestrator.engine.commit import Identity, Scope
from orchestrator.engine.drain import Drainer
from orchestrator.engine.worker import Invocation, Worker
from orchestrator.errors import Rejected
from orchestrator.machine.journal import AttemptEnded
from orchestrator.machine.policy import RetryPolicy
from orchestrator.saga import registry as sagas
from orchestrator.settings import Settings
from orchestrator.step import StepContext
from orchestrator.step import registry as steps
from orchestrator.store import liveness
from orchestrator.store.connection import CommitUnknown, Connection, TransactionFailed
from orchestrator.store.transaction import Transactions
from orchestrator.store.turns import Taken
from orchestrator.testing.faults import Fault, Kind, of
from orchestrator.testing.stubs import Call, Cast

NODE: Final = "testing"


class Died(BaseException):
    """The process of the worker ends here; nothing may catch it but who starts the next one."""


class AnswerLost(ConnectionError):
    """Stands for an answer that never came: whether the step took effect, its caller cannot know."""


class _RolledBack(Exception):
    def __init__(self, invocation: Invocation) -> None:
        super().__init__()
        self.invocation = invocation


class Targets:
    """What is registered in this process at this moment: steps, sagas, and the tasks of the current Celery app."""

    def __iter__(self) -> Iterator[str]:
        yield from steps.steps
        yield from (saga.target for saga in sagas.sagas.values())
        yield from (task for task in current_app.tasks if task not in steps.steps and not task.startswith("celery."))

    def __contains__(self, target: object) -> bool:
        return target in steps.steps or target in set(self)

    def __len__(self) -> int:
        return len(set(self))


@dataclass(slots=True)
class Script:
    """What is to be played: stubs, faults, and who is told.

    `cancel` and `meanwhile` are called for the faults of these kinds.
    """

    cast: Cast = field(default_factory=lambda: Cast({}))
    faults: list[Fault] = field(default_factory=list)
    calls: list[tuple[str, Call]] = field(default_factory=list)
    seen: list[Taken] = field(default_factory=list)
    cancel: Callable[[str], None] = lambda run_id: None
    meanwhile: Callable[[], object] = lambda: None
    skip: Callable[[timedelta], None] = lambda length: None
    late: list[Callable[[], object]] = field(default_factory=list)

    def clear(self) -> None:
        """Forget stubs, faults, and what was done."""
        self.cast = Cast({})
        for each in (self.faults, self.calls, self.seen, self.late):
            each.clear()


class Player:
    """Runs the code of steps; see `orchestrator.engine.worker.StepRunner`."""

    worker = NODE

    def __init__(self, script: Script, transactions: Transactions) -> None:
        self._script = script
        self._transactions = transactions
        self._fault: dict[int, Fault] = {}  # by fence, until the outcome is committed

    # -- one attempt ---------------------------------------------------------------------------------------------------
    def invoke(self, taken: Taken, context: StepContext) -> Invocation:
        """Play an attempt, with the fault that is meant for it."""
        fault = self._begin(taken)
        if fault == Kind.REJECTED:
            return Invocation(error=Rejected(f"{taken.task} is made to reject in this test"))
        if fault == Kind.LATE:
            self._script.late.append(lambda: self._play(taken, context))
        if fault in (Kind.SILENT, Kind.LATE):
            return Invocation(error=AnswerLost(f"{taken.task} is made to fail in this test, without effect"))
        invocation = self._play(taken, context)
        if fault == Kind.DIED_AFTER:
            raise Died
        if fault == Kind.LOST and invocation.error is None:
            return Invocation(error=AnswerLost(f"{taken.task} took effect, and its answer is lost in this test"))
        return invocation

    def invoke_in_transaction(
        self, taken: Taken, context: StepContext, settle: Callable[[Connection, Invocation], None]
    ) -> Invocation:
        """Play an attempt whose rows commit with its outcome."""
        fault = self._begin(taken)

        def work(connection: Any) -> Invocation:
            if fault == Kind.REJECTED:
                raise _RolledBack(Invocation(error=Rejected(f"{taken.task} is made to reject in this test")))
            context.connection = connection
            invocation = self._play(taken, context)
            if fault == Kind.DIED_AFTER:
                raise Died
            if fault == Kind.SILENT:
                raise CommitUnknown(f"the connection of {taken.task} is lost before its commit in this test")
            if invocation.error is not None:
                raise _RolledBack(invocation)
            return invocation

        def finish(connection: Connection, invocation: Invocation) -> bool:
            settle(connection, invocation)
            return True

        timeout = timedelta(seconds=taken.call.get("t", 300.0))
        try:
            invocation = self._transactions.run(wants_session(steps.steps[taken.task]), timeout, work, finish)
        except _RolledBack as failed:
            return failed.invocation
        except TransactionFailed as failed:
            return Invocation(error=failed.reason, harmless=True)
        if fault == Kind.LOST:
            raise CommitUnknown(f"the connection of {taken.task} is lost at its commit in this test, which happened")
        return invocation

    def _begin(self, taken: Taken) -> Kind | None:
        """Return the kind of fault for this attempt, having done what comes before its code."""
        self._script.seen.append(taken)
        fault = of(self._script.faults, taken)
        if fault is None:
            return None
        self._fault[taken.fence or 0] = fault
        if fault.kind == Kind.DIED_BEFORE:
            raise Died
        if fault.kind == Kind.CANCELLED:
            self._script.cancel(taken.run_id)
        if fault.kind == Kind.MEANWHILE:
            self._script.meanwhile()
        return fault.kind

    def _play(self, taken: Taken, context: StepContext) -> Invocation:
        attempt = self._script.cast.play(taken, context, None)
        self._script.calls.append((taken.run_id, attempt.call))
        if attempt.duration:
            self._script.skip(attempt.duration)
        return Invocation(attempt.result, attempt.call.error)

    # -- what the drainer asks -----------------------------------------------------------------------------------------
    def is_transactional(self, task: str) -> bool:
        """Tell whether a task is declared as a transactional step."""
        declared = steps.steps.get(task)
        return declared is not None and declared.options.transactional

    def non_retryable(self, task: str) -> RetryPolicy | None:
        """Return the declared policy of a task, for its non-retryable errors."""
        declared = steps.steps.get(task)
        return declared.options.retry if declared else None

    def finished(self, taken: Taken, outcome: AttemptEnded) -> None:
        """The outcome is committed: a process that is to die now dies."""
        if taken.role == "once":
            self._begin(taken)
        fault = self._fault.pop(taken.fence or 0, None)
        if fault is not None and fault.kind == Kind.DIED_COMMITTED:
            raise Died


class Child:
    """A child of the worker: drains until nothing is due, and is replaced when it dies."""

    _numbers = itertools.count(1)

    def __init__(
        self,
        settings: Settings,
        connection: Connection,
        script: Script,
        transactions: Transactions,
        skipped: Callable[[], timedelta],
    ) -> None:
        self.targets = Targets()
        self._settings = settings
        self._connection = connection
        self._script = script
        self._transactions = transactions
        self._skipped = skipped
        self._queues: frozenset[str] = frozenset()
        self._incarnation = 0
        self._child = 0
        self._drainer: Drainer | None = None

    def drain(self, queues: frozenset[str]) -> bool:
        """Work until nothing is due; false if the process died over it, and somebody else is to go on."""
        if self._drainer is None or not queues <= self._queues:
            self._start(queues | self._queues)
        assert self._drainer is not None
        try:
            self._drainer.drain()
        except Died:
            self._bury()
            return False
        return True

    def _start(self, queues: frozenset[str]) -> None:
        self.close()
        self._queues = queues
        self._child = next(self._numbers)
        self._incarnation = self._incarnation or liveness.register(
            self._connection, node=NODE, host=NODE, pid=0, queues=sorted(queues), targets=list(self.targets), slots=1
        )
        self._drainer = Drainer(
            Worker(
                settings=self._settings,
                scope=Scope(queues, self.targets),
                identity=lambda: Identity(self._incarnation, self._child),
                script_of=script_of,
                runner=Player(self._script, self._transactions),
                ring=lambda queue, times: None,  # nobody sleeps: the environment looks until nothing is due
                stopping=lambda: False,
                linger=(),
                seconds=lambda: time.monotonic() + self._skipped().total_seconds(),
            )
        )

    def _bury(self) -> None:
        """Do what a companion does when one of its children is gone."""
        self.close()
        liveness.give_back_child(self._connection, self._incarnation, self._child)

    def close(self) -> None:
        """Drop the coroutines and the connection."""
        if self._drainer is not None:
            self._drainer.close()
            self._drainer = None
