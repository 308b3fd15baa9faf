"""Canvases in this process: rehearsed, without services."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from orchestrator import Orchestrator
from orchestrator.canvas.starting import run_canvas
from orchestrator.saga import registry as sagas
from orchestrator.step import registry as steps
from tests.canvas.tasks import SAID


@pytest.fixture(scope="session")
def orchestrator() -> Iterator[Orchestrator]:
    """An app that knows the tasks, and reaches neither database nor broker; whatever else is bound stays bound."""
    starters = {saga: saga.starter for saga in sagas.sagas.values()}
    bound = {step: step.bound for step in steps.steps.values()}
    with Celery("canvas", broker="memory://", set_as_current=False) as app:
        orchestrator = Orchestrator(app, database_url="postgresql://nowhere.invalid/db")
        for saga, starter in starters.items():
            saga.starter = starter
        for step, task in bound.items():
            step.bound = task
        yield orchestrator


@pytest.fixture(autouse=True)
def own_app(orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bind the built-in saga and the steps of these tests to that app."""
    monkeypatch.setattr(run_canvas, "starter", orchestrator)
    for name, step in steps.steps.items():
        if name.startswith("canvas."):
            monkeypatch.setattr(step, "bound", orchestrator.app.tasks[name])


@pytest.fixture
def said() -> list[Any]:
    """What the tasks are told during this test."""
    SAID.clear()
    return SAID
