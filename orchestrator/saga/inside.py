"""Where the running saga is found.

Owns the way from a call in saga code to the execution that it belongs to.
"""

from __future__ import annotations

import asyncio
from typing import cast

from orchestrator.errors import UsageError
from orchestrator.machine.code import SagaCode
from orchestrator.machine.loop import SagaLoop


def code_of(call: str) -> SagaCode:
    """Return the running saga's code.  Raises: UsageError outside of a saga function."""
    loop = asyncio._get_running_loop()
    if not isinstance(loop, SagaLoop):
        raise UsageError(f"saga.{call}() works inside a saga function only; outside, start a saga with .delay(...)")
    return cast(SagaCode, loop.code)  # type: ignore[attr-defined]
