"""reconcile, as people and beat call it: exit codes, the report, the task."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import psycopg
import pytest

from orchestrator import reconcile
from tests.cli.conftest import Terminal


@pytest.fixture(autouse=True)
def only_mine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "checks", {})
    monkeypatch.setattr("orchestrator.engine.reconcile.checks", reconcile.checks)


def test_the_exit_code_says_clean_breaks_or_not_checked(terminal: Terminal, tmp_path: Path) -> None:
    terminal.start("checkout", "1", "--id", "one")
    where = ("--directory", str(tmp_path))
    assert "0 breaks in 5 checks" in terminal.ok("reconcile", *where)
    assert len(list(tmp_path.glob("reconciliation-*.html"))) == len(list(tmp_path.glob("*.json"))) == 1
    with psycopg.connect(terminal.database_url, autocommit=True) as connection:
        connection.execute("DELETE FROM orchestrator.work")
    result = terminal.run("reconcile", "engine: runs", *where)
    assert result.exit_code == 1 and "engine: runs\n    one: it is pending, and no rule" in result.output
    told = terminal.run("reconcile", "--json", *where)
    assert (told.exit_code, json.loads(told.stdout)["breaks"]) == (1, 1)
    reconcile.check("broken", sql="SELECT")
    result = terminal.run("reconcile", *where)
    assert result.exit_code == 2 and "1 check could not be completed" in result.output
    assert "0, not completed" in result.output
    assert terminal.run("reconcile", "nothing").exit_code == 1


def test_beat_has_it_as_a_task_whose_log_says_what_it_came_to(
    terminal: Terminal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = terminal.shop.app.tasks["orchestrator.reconcile"](directory=str(tmp_path))
    assert (told["breaks"], told["exit_code"]) == (0, 0)
    assert (tmp_path / f"reconciliation-{told['report']}.json").exists()
    reconcile.check("broken", sql="SELECT")
    (tmp_path / "file").touch()
    caplog.set_level(logging.INFO)
    terminal.shop.app.tasks["orchestrator.reconcile"](directory=str(tmp_path / "file"))
    said = [record.getMessage() for record in caplog.records if record.name == "orchestrator.celery.nightly"]
    assert any("check 'broken' could not be completed: " in each for each in said)
    assert any("could not be written" in each for each in said) and "0 breaks in 6 checks" in said[-1]
