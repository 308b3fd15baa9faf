"""What a worker imports before it serves: after a crash of all of them, runs wait for these seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

_STARTS = """
from orchestrator import saga, step
@step
def charge() -> None: ...
@saga.define
async def checkout() -> None: ...
{what}.delay()
"""
_ASKS = "import sys; import {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"


@pytest.mark.parametrize("module", ["orchestrator.celery.app", "orchestrator.celery.companion", "orchestrator.cli"])
def test_neither_a_worker_nor_its_companion_imports_sqlalchemy_or_alembic(module: str) -> None:
    asked = subprocess.run(
        [sys.executable, "-c", _ASKS.format(module=module)], capture_output=True, text=True, check=True
    )
    assert not {"sqlalchemy", "alembic", "flower", "rich"} & set(asked.stdout.split())


@pytest.mark.parametrize("what", ["charge", "checkout"])
def test_who_imports_a_saga_and_not_its_app_is_told_to_import_that(what: str) -> None:
    """It said "create `Orchestrator(app)` first", to those who have one in another module."""
    asked = subprocess.run(
        [sys.executable, "-c", _STARTS.format(what=what)], capture_output=True, text=True, check=False
    )
    assert "belongs to no Celery app yet; import the module that makes `Orchestrator(app)` first" in asked.stderr
