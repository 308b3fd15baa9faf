"""Pausing and continuing as the journal tells them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.machine.fold import Fold, RunInfo
from orchestrator.machine.journal import (
    Continued,
    Ended,
    Entry,
    Operated,
    Parked,
    RollbackBegan,
    decode_entry,
    encode,
)
from orchestrator.machine.states import IllegalTransition, RunState

START = datetime(2026, 1, 1, tzinfo=UTC)


def folded(*rows: list[Entry]) -> Fold:
    fold = Fold(RunInfo("run", "tests.saga", 1, {}, START, "celery"))
    for number, row in enumerate(rows):
        fold.apply_row(START + timedelta(seconds=number), [decode_entry(encode(entry)) for entry in row])
    return fold


def test_a_paused_run_resumes_no_code_until_it_is_resumed() -> None:
    paused = folded([], [Operated("pause", by="ann")])
    assert (paused.state, paused.wants_code) == (RunState.PAUSED, False)
    resumed = folded([], [Operated("pause", by="ann")], [Operated("resume", by="ann")])
    assert (resumed.state, resumed.wants_code) == (RunState.RUNNING, True)


def test_a_paused_run_can_be_rolled_back_and_parked() -> None:
    assert folded([], [Operated("pause")], [RollbackBegan("cancel")]).state is RunState.COMPENSATING
    assert folded([], [Operated("pause")], [Parked("", "code", "why")]).state is RunState.PARKED
    assert folded([], [Operated("pause")], [Parked("", "code", "why")], [Operated("retry")]).state is RunState.PAUSED


def test_a_run_that_is_continued_has_ended() -> None:
    fold = folded([], [Continued({"page": 2}), Ended(RunState.CONTINUED)])
    assert (fold.state, fold.continued) == (RunState.CONTINUED, Continued({"page": 2}))
    with pytest.raises(IllegalTransition):
        fold.apply(Ended(RunState.COMPLETED))
