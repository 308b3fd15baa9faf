"""The training passes the explorer: whatever fails or crashes, at every boundary, what serves was trained to the end.

The other reference sagas are explored in tests/testing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import testing
from orchestrator.testing import Environment, EnvironmentRun
from sagas.training import training
from tasks import models
from tasks.database import create_tables, ledger_engine, metadata
from tasks.models import TrainingJob
from tasks.outside.server import Server

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def fresh(
    saga_environment: Environment, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[], None]:
    """Make the world what it is at first: no model serves, and there are no files."""
    monkeypatch.setenv("LEDGER_DATABASE_URL", saga_environment.database_url)
    create_tables(ledger_engine())
    numbers = itertools.count(1)

    def fresh() -> None:
        with ledger_engine().begin() as conn:
            for table in reversed(metadata.sorted_tables):
                conn.execute(table.delete())
        monkeypatch.setenv("MODELS_DIR", str(tmp_path / f"models-{next(numbers)}"))

    return fresh


def test_what_serves_is_a_model_that_was_trained_to_the_end(
    saga_environment: Environment, fresh: Callable[[], None]
) -> None:
    job = TrainingJob(id="j1", account="labelled-300", epochs=2, gate=0.2)

    def served(run: EnvironmentRun) -> None:
        with ledger_engine().connect() as conn:
            weights = models.serving(conn, job.alias)
        assert (weights is not None and weights.epoch == 2) == (run.state == "completed")

    found = testing.explore(training, job, invariant=served, setup=fresh, pairs=1, environment=saga_environment)
    assert found.ends.keys() >= {"completed", "compensated", "cancelled"} and not found.exhausted
