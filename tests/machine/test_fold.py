"""Entries of what comes later are folded from the start: signals, scopes, pages, pauses, continuing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.machine.fold import Fold, RunInfo
from orchestrator.machine.journal import (
    Asked,
    Continued,
    Ended,
    Entry,
    Operated,
    PageMapped,
    Parked,
    RollbackBegan,
    ScopeClosed,
    Settled,
    Signalled,
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


def test_a_signal_that_comes_twice_is_kept_once_and_early_ones_are_kept() -> None:
    fold = folded([Signalled("approved", "1", {"by": "ann"})], [Signalled("approved", "1"), Signalled("approved", "2")])
    assert [signal.id for signal in fold.signals["approved"]] == ["1", "2"]
    assert fold.state is RunState.RUNNING


@pytest.mark.parametrize("kind", ["child", "signal", "lock", "map"])
def test_what_is_asked_for_beside_steps_is_in_flight_until_it_is_settled(kind: str) -> None:
    asked = Asked("k", "some.thing", {}, kind=kind)
    assert folded([asked]).in_flight == 1
    fold = folded([asked], [Settled("k", "succeeded", result=1)])
    assert (fold.in_flight, fold.unsettled, fold.steps["k"].result) == (0, 0, 1)


def test_the_last_page_of_a_fan_out_and_the_end_of_a_scope_are_known() -> None:
    fold = folded([PageMapped("map#0", 1, done=10)], [PageMapped("map#0", 2, done=20, failed=1, cursor="c")],
                  [ScopeClosed("scope#0", undo=True)])  # fmt: skip
    assert (fold.pages["map#0"].page, fold.pages["map#0"].failed) == (2, 1)
    assert fold.scopes == {"scope#0": True}


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
