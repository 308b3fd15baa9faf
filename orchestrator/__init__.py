"""Durable sagas on the Celery workers and the Postgres that you already run.

A saga is an async Python function whose steps are Celery tasks; Postgres remembers every step and how to undo it;
whatever dies, the saga ends completed or undone, never in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator import saga
from orchestrator.canvas import durable
from orchestrator.errors import (
    ChildFailed,
    ConfigurationError,
    ConflictError,
    DeadlockError,
    DefinitionError,
    DriftError,
    MapFailed,
    OrchestratorError,
    PayloadError,
    Rejected,
    SagaCancelled,
    SagaFailed,
    SchemaError,
    StepFailed,
    StoreUnavailableError,
    UnknownRunError,
    UnknownSagaError,
    UsageError,
)
from orchestrator.machine.policy import Effect, RetryPolicy
from orchestrator.step import StepStopped, step

if TYPE_CHECKING:
    from orchestrator.celery.app import Orchestrator
    from orchestrator.result import SagaResult

__version__ = "0.1.0"
__all__ = [
    "ChildFailed",
    "ConfigurationError",
    "ConflictError",
    "DeadlockError",
    "DefinitionError",
    "DriftError",
    "Effect",
    "MapFailed",
    "Orchestrator",
    "OrchestratorError",
    "PayloadError",
    "Rejected",
    "RetryPolicy",
    "SagaCancelled",
    "SagaFailed",
    "SagaResult",
    "SchemaError",
    "StepFailed",
    "StepStopped",
    "StoreUnavailableError",
    "UnknownRunError",
    "UnknownSagaError",
    "UsageError",
    "durable",
    "saga",
    "step",
]


def __getattr__(name: str) -> Any:
    """Import Celery and the database only when they are asked for: a unit test of a step needs neither."""
    if name == "Orchestrator":
        from orchestrator.celery.app import Orchestrator

        return Orchestrator
    if name == "SagaResult":
        from orchestrator.result import SagaResult

        return SagaResult
    raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
