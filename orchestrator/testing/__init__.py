"""Test sagas: alone in a unit test, or with the real engine on a real Postgres; no worker, no broker, no waiting.

    result = testing.run(checkout, order, stubs={charge: Rejected("card declined")})
    assert result.state == "failed"

`run` rehearses a saga without any service. `Environment` runs it on Postgres, and `explore` lets everything fail
there. Time is skipped in all of them. This package must never be imported by the others but the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.testing.history import replay
from orchestrator.testing.result import TestRun, run
from orchestrator.testing.stubs import After, Call

if TYPE_CHECKING:
    from orchestrator.testing.environment import Environment
    from orchestrator.testing.explorer import explore
    from orchestrator.testing.handle import EnvironmentRun
    from orchestrator.testing.report import Exploration, InvariantBroken

__all__ = [
    "After", "Call", "Environment", "EnvironmentRun", "Exploration", "InvariantBroken", "TestRun", "explore", "replay",
    "run",
]  # fmt: skip
_NEED_POSTGRES = {
    "Environment": "environment", "EnvironmentRun": "handle", "Exploration": "report", "InvariantBroken": "report",
    "explore": "explorer",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the database and Celery only when they are asked for: a unit test of a saga needs neither."""
    if name not in _NEED_POSTGRES:
        raise AttributeError(f"module 'orchestrator.testing' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"orchestrator.testing.{_NEED_POSTGRES[name]}"), name)
