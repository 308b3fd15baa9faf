"""What the engine needs of the worker that it is part of, and what it hands to whoever runs the code of steps.

Owns that contract.  Must never import Celery: the Celery layer and the testing kit each implement it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.codec import Json
from orchestrator.engine.commit import Identity, Scope
from orchestrator.engine.lead import SIZE, Lead
from orchestrator.machine.journal import AttemptEnded
from orchestrator.machine.policy import RetryPolicy
from orchestrator.machine.turn import Script
from orchestrator.settings import Settings
from orchestrator.step import StepContext
from orchestrator.store.connection import Connection
from orchestrator.store.permits import Permits
from orchestrator.store.turns import Taken

LINGER_S = (*[0.0005] * 4, *[0.001] * 10)  # after work, the waits before each look for more of it


@dataclass(slots=True)
class Invocation:
    """What came of running a step's code: a result already encoded, or the error.

    `trace` is the text of its traceback, if that is known; `pause` (seconds) is what Celery's own retry asked for;
    `harmless` says that no code ran, or that all it did was rolled back.
    """

    result: Json = None
    error: BaseException | None = None
    pause: float | None = None
    harmless: bool = False
    trace: str = ""


class StepRunner(Protocol):
    """Runs the code of steps."""

    worker: str

    def invoke(self, taken: Taken, context: StepContext) -> Invocation:
        """Run a step, undo or probe and encode its result."""
        ...

    def invoke_in_transaction(
        self, taken: Taken, context: StepContext, settle: Callable[[Connection, Invocation], None]
    ) -> Invocation:
        """Run a transactional step; `settle` is called with the open transaction before it is committed."""
        ...

    def is_transactional(self, task: str) -> bool: ...
    def non_retryable(self, task: str) -> RetryPolicy | None: ...
    def finished(self, taken: Taken, outcome: AttemptEnded) -> None: ...


@dataclass(slots=True)
class Worker:
    """What a drainer needs to know about the worker that it is part of."""

    settings: Settings
    scope: Scope
    identity: Callable[[], Identity]
    script_of: Callable[[str, int], Script | None]
    runner: StepRunner
    ring: Callable[[str, int], None]
    stopping: Callable[[], bool]
    waited_for: Callable[[], bool] = lambda: True  # whether other tasks wait, or may, for one of its children
    rung: Callable[[], bool] = lambda: False  # whether a doorbell waits for one of its children
    interrupted: Callable[[], bool] = lambda: False  # whether a signal has raised SystemExit here, whoever kept it
    lead: Lead = field(default_factory=lambda: Lead(bytearray(SIZE), 1))  # which of its children takes all that comes
    permits: Permits | None = None  # none: this worker has fewer children than it may have connections
    linger: Sequence[float] = LINGER_S
    watch_code: AbstractContextManager[object] = field(default_factory=nullcontext)  # raises BlockedError in saga code
    seconds: Callable[[], float] | None = None  # a monotonic clock, should the database's be moved along with it
