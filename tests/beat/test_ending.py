"""A beat that is told to end in the middle of a turn."""

from __future__ import annotations

import contextlib

import pytest
from celery import Celery

from orchestrator import Orchestrator
from orchestrator.celery.beat import Scheduler


def test_it_ends_after_its_turn_though_somebody_has_kept_the_exit_that_the_signal_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Celery("ending", set_as_current=False) as app:
        Orchestrator(app, database_url="postgresql://unused")
        scheduler = Scheduler(app)

    def turn() -> float:
        with contextlib.suppress(SystemExit):
            scheduler.close()  # as Celery's handler of SIGTERM does
            raise SystemExit
        return 1.0

    monkeypatch.setattr(scheduler, "_turn", turn)
    with pytest.raises(SystemExit):
        scheduler.tick()
