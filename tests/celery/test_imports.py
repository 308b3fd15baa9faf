"""What a worker imports before it serves: after a crash of all of them, runs wait for these seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

_ASKS = "import sys; import {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"


@pytest.mark.parametrize("module", ["orchestrator.celery.app", "orchestrator.celery.companion", "orchestrator.cli"])
def test_neither_a_worker_nor_its_companion_imports_sqlalchemy_or_alembic(module: str) -> None:
    asked = subprocess.run(
        [sys.executable, "-c", _ASKS.format(module=module)], capture_output=True, text=True, check=True
    )
    assert not {"sqlalchemy", "alembic", "flower", "rich"} & set(asked.stdout.split())
