"""Journals recorded on every supported Python replay on this one, and this one would record the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import saga, testing
from orchestrator.machine.journal import decode_entry
from tests.histories.record import CASES, DIRECTORY, without_tracebacks

HISTORIES = sorted(DIRECTORY.glob("*.json"))


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
def test_a_recorded_history_replays_at_every_prefix(path: Path) -> None:
    history = json.loads(path.read_text())
    testing.replay(saga.registry.sagas[history["saga"], history["version"]], history)


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
def test_this_python_records_the_same_history(path: Path) -> None:
    name, _, _ = path.stem.rpartition("-")
    recorded = json.loads(json.dumps(without_tracebacks(CASES[name]())))
    assert read(recorded) == read(json.loads(path.read_text()))


def read(history: dict[str, Any]) -> dict[str, Any]:
    """Return a history as this release reads it; the form of its entries was longer in releases before."""
    return {**history, "journal": [(at, [decode_entry(form) for form in forms]) for at, forms in history["journal"]]}


def test_every_case_is_recorded_on_every_supported_python() -> None:
    assert {path.stem for path in HISTORIES} == {
        f"{name}-{python}" for name in CASES for python in ("3.11", "3.12", "3.13")
    }
