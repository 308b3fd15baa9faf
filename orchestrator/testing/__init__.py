"""Run sagas in a unit test: no services, no Celery, no waiting.

    result = testing.run(checkout, order, stubs={charge: Rejected("card declined")})
    assert result.state == "failed"

The machine is the one that production runs; only steps can be stubbed, and time is skipped. This package must
never be imported by the others.
"""

from __future__ import annotations

from orchestrator.testing.history import replay
from orchestrator.testing.result import TestRun, run
from orchestrator.testing.stubs import After, Call

__all__ = ["After", "Call", "TestRun", "replay", "run"]
