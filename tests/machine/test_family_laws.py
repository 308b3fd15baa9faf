"""Laws that hold for every family of runs, whatever happens to it and whoever meddles.

What may never happen on the way is asserted by the world itself, see `families`.  ``--families 5000`` plays more.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.machine.fold import Fold
from orchestrator.machine.journal import Parked, UndoAsked, decode_entry
from orchestrator.machine.states import Backward, Forward
from orchestrator.testing import replay
from tests.machine.chaos import UNDOABLE
from tests.machine.drawn import Drawn
from tests.machine.families import Family, Member
from tests.machine.test_laws import snapshot, without_tracebacks

GOOD_ENDS = ("completed", "continued")
SETTLED_WITHOUT = (Forward.REJECTED, Forward.FAILED, Forward.WITHDRAWN)


@functools.lru_cache(maxsize=300)
def played(seed: int) -> Family:
    family = Family(Drawn(seed))
    family.play_out()
    return family


@pytest.fixture
def families(pytestconfig: pytest.Config) -> Iterator[Family]:
    return map(played, range(pytestconfig.getoption("--families", 200)))


def _runs(families: Iterator[Family]) -> Iterator[tuple[Family, Member, str]]:
    """Yield each run with its family and how it ended."""
    for family in families:
        for run in family.members.values():
            assert run.fold.ended is not None
            yield family, run, run.fold.ended.state


def test_every_family_comes_to_an_end_and_gives_its_locks_back(families: Iterator[Family]) -> None:
    states: Counter[str] = Counter()
    for family, _, state in _runs(families):
        assert not family.held, f"seed {family.seed}"
        states[state] += 1
    assert len(states) == 6


def test_no_effect_is_there_that_nobody_answers_for(families: Iterator[Family]) -> None:
    for family, run, state in _runs(families):
        for key, step in run.fold.steps.items():
            thing = run.thing(key)
            if run.has_code and thing in family.effects and step.asked.task.rsplit(".", 1)[-1] in UNDOABLE:
                kept = state in GOOD_ENDS and step.forward is Forward.SUCCEEDED and not step.abandoned
                assert kept or thing in family.left, f"seed {family.seed}: {thing} in a run that is {state}"


def test_what_a_run_counts_as_done_is_there(families: Iterator[Family]) -> None:
    for family, run, state in _runs(families):
        for key, step in run.fold.steps.items():
            done = step.asked.kind == "step" and step.forward is Forward.SUCCEEDED and step.backward is Backward.NONE
            if done and run.has_code and state in GOOD_ENDS:
                assert run.thing(key) in family.effects, f"seed {family.seed}: {run.thing(key)} is not there"


def test_what_certainly_had_no_effect_is_never_undone_unless_it_landed_late(families: Iterator[Family]) -> None:
    for family, run, _ in _runs(families):
        late = {entry.key for entry in run.entries if entry.tag == "late"}
        undone = {entry.key for entry in run.entries if isinstance(entry, UndoAsked)}
        for step in (run.fold.steps[key] for key in undone - late):
            assert step.forward not in SETTLED_WITHOUT, f"seed {family.seed}: {run.thing(step.key)}"


def test_a_child_is_kept_or_undone_with_its_parent(families: Iterator[Family]) -> None:
    for family, run, state in _runs(families):
        parent = family.parent_of(run)
        if parent is None or parent.fold.ended is None or parent.fold.ended.state == "terminated":
            continue
        step = parent.fold.steps[run.info.key_in_parent]
        kept = parent.fold.ended.state in GOOD_ENDS and step.forward is Forward.SUCCEEDED
        kept = kept and step.backward is Backward.NONE
        told = f"seed {family.seed}: {run.info.id} is {state}, {parent.info.id} {parent.fold.ended.state}"
        if state == "completed":
            assert kept or step.was_skipped, told
        elif kept:
            assert state == "terminated", told


def test_what_a_child_leaves_its_parent_tells(families: Iterator[Family]) -> None:
    for family, run, state in _runs(families):
        parent = family.parent_of(run)
        if parent is None or state in GOOD_ENDS or parent.fold.ended is None or run.fold.ended is None:
            continue
        if parent.fold.ended.state in ("failed", "compensated", "cancelled"):
            told = {item["key"] for item in parent.fold.ended.left}
            left = {f"{run.info.key_in_parent}/{item['key']}" for item in run.fold.ended.left}
            assert left <= told, f"seed {family.seed}: {run.info.id} leaves what {parent.info.id} does not tell"


def test_a_run_that_is_compensated_leaves_nothing_that_can_be_undone(families: Iterator[Family]) -> None:
    for family, run, state in _runs(families):
        if state == "compensated" and run.fold.ended is not None:
            left = {item["task"].rsplit(".", 1)[-1] for item in run.fold.ended.left}
            assert not left & UNDOABLE, f"seed {family.seed}: {run.info.id} leaves {left}"


def test_going_back_undoes_the_youngest_first(families: Iterator[Family]) -> None:
    for family, run, _ in _runs(families):
        entries = run.entries
        began = next((n for n, entry in enumerate(entries) if entry.tag == "rollback"), len(entries))
        settled = {getattr(entry, "key", "") for entry in entries[:began] if entry.tag == "settled"}
        undone = [e for e in entries[began:] if isinstance(e, UndoAsked) and not e.late and e.key in settled]
        order = [run.fold.steps[entry.key].order for entry in undone]
        assert order == sorted(order, reverse=True), f"seed {family.seed}: {run.info.id}"


def test_no_run_drifts_and_no_prefix_of_a_journal_does(families: Iterator[Family]) -> None:
    for family, run, _ in _runs(families):
        for entry in run.entries:
            if isinstance(entry, Parked) and entry.role in ("drift", "code"):
                assert "continue_as_new() with work outstanding" in entry.why, f"seed {family.seed}: {entry.why}"
        if run.has_code:
            replay(run.saga, run.history())


def test_folding_the_journal_gives_the_live_state(families: Iterator[Family]) -> None:
    for family, run, _ in _runs(families):
        again = Fold(run.info)
        for at, forms in run.rows:
            again.apply_row(at, [decode_entry(form) for form in forms])  # type: ignore[arg-type]
        assert snapshot(again) == snapshot(run.fold), f"seed {family.seed}: {run.info.id}"


def test_a_family_whose_runs_are_replayed_at_each_turn_does_the_same(families: Iterator[Family]) -> None:
    for family in families:
        again = Family(Drawn(family.seed), replays=True)
        again.play_out()
        assert _journals(again) == _journals(family), f"seed {family.seed}"


def _journals(family: Family) -> dict[str, Any]:
    """Return all journals; a lock that is freed by a turn may be so at its end, or as soon as its block is left."""
    return {
        run.info.id: [[at, [f for f in without_tracebacks(forms) if f["e"] != "unlocked"]] for at, forms in run.rows]
        for run in family.members.values()
    }
