"""Runs on a fresh database, played by a worker's child; and no checks and hooks but a test's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator import reconcile
from tests.engine.conftest import child, connection, new_child

__all__ = ["child", "connection", "new_child"]


@pytest.fixture(autouse=True)
def only_mine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(reconcile, "checks", {})
    monkeypatch.setattr("orchestrator.engine.reconcile.checks", reconcile.checks)
    monkeypatch.setattr(reconcile, "hooks", [])
    monkeypatch.setattr("orchestrator.engine.reconcile.hooks", reconcile.hooks)
    yield
