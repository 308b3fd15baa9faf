"""What the children of a worker share of who takes all that comes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from orchestrator.celery import worker
from orchestrator.engine import lead


def test_the_promise_of_one_child_is_seen_by_another_through_their_workers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each maps the file by itself, as spawned children do."""
    monkeypatch.setattr(worker, "_said", worker._said)
    monkeypatch.setattr(lead, "_LONGEST_S", 1000.0)

    def promise() -> None:
        worker._share(tmp_path)
        worker.lead_here().promise(500.0)

    promised = threading.Thread(target=promise)
    worker._share(tmp_path)
    here = worker.lead_here()
    promised.start()
    promised.join(60.0)
    assert 0.0 < here.others_s() <= 500.0
    assert not worker.stopping() and worker.waited_for() and not worker.rung()
