"""prune, as people and beat call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.machine.states import TERMINAL, RunState
from tests.cli.conftest import Terminal


def test_prune_says_what_goes_and_beat_has_it_as_a_task(worked: Terminal, tmp_path: Path) -> None:
    for run_id in ("prune-1", "prune-2", "prune-3"):
        worked.start("checkout", run_id, "--id", run_id)
        worked.until(run_id, "completed")
    would = worked.json("prune", "--older-than", "0s", "--saga", "checkout", "--limit", "1", "--dry-run")
    assert (would["total"], would["dry_run"]) == (1, True)
    told = worked.json("prune", "--older-than", "0s", "--limit", "1", "--archive", str(tmp_path))
    assert told["total"] >= 1 and Path(told["archive"]).read_text().count("\n") == told["total"]
    assert " gone." in worked.ok("prune", "--older-than", "0s", "--limit", "1")
    assert "0 runs would go." in worked.ok("prune", "--older-than", "900d", "--dry-run")
    assert worked.shop.app.tasks["orchestrator.prune"]("0s")["total"] >= 1
    again = worked.run("start", "checkout", json.dumps([{"id": "x"}]), "--id", "prune-1")
    assert again.exit_code == 1 and "was pruned" in again.output


@pytest.mark.parametrize("state", sorted(state.value for state in RunState if state in TERMINAL))
def test_a_state_is_named_as_everywhere(terminal: Terminal, state: str) -> None:
    assert "0 runs would go." in terminal.ok("prune", "--older-than", "1d", "--state", state, "--dry-run")


def test_an_age_that_no_run_can_have_finds_none(terminal: Terminal) -> None:
    assert "0 runs would go." in terminal.ok("prune", "--older-than", "999999999d", "--dry-run")


def test_prune_says_what_is_wrong_with_its_arguments(terminal: Terminal) -> None:
    for arguments, word in ((["--older-than", "soon"], "is no age"), ([], "--older-than")):
        result = terminal.run("prune", *arguments)
        assert result.exit_code == 2 and word in result.output
