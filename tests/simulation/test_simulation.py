"""The promise under seeded trouble: whatever goes wrong, in whatever order, everything ends, and as it should."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from tests.acceptance.running import ROOT
from tests.simulation.faults import MUST_HAPPEN
from tests.simulation.kept import KEPT, PutBack
from tests.simulation.verdict import Verdict

Play = Callable[..., Verdict]
MUST_BE_REACHED = {"completed", "failed", "compensated", "cancelled", "terminated", "continued"}
ENOUGH = 200


@pytest.mark.timeout(1800)
def test_after_the_last_fault_everything_ends_and_every_promise_was_kept(play: Play, seeds: list[int]) -> None:
    happened: Counter[str] = Counter()
    states: Counter[str] = Counter()
    broken: list[str] = []
    for seed in seeds:
        verdict = play(seed)
        happened += verdict.happened
        states += verdict.states
        if verdict.broken:
            broken.append(in_words(verdict))
    assert not broken, "\n".join(broken)
    if len(seeds) >= ENOUGH:
        assert MUST_HAPPEN - set(happened) == set(), "a kind of trouble that this test is meant to see was not there"
        assert MUST_BE_REACHED - set(states) == set()


@pytest.mark.parametrize(("fault", "seed", "focus"), KEPT, ids=[fault.__name__ for fault, *_ in KEPT])
def test_a_fault_that_was_mended_is_found_again_when_it_is_put_back(
    play: Play, fault: PutBack, seed: int, focus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = play(seed, focus)
    assert not verdict.broken, in_words(verdict)
    fault(monkeypatch)
    assert play(seed, focus).broken, f"seed {seed} is over: python -m tests.simulation --fault {fault.__name__}"


@pytest.mark.parametrize("hashes", ["0", "2"])
def test_the_same_seed_is_the_same_story_in_every_process(play: Play, hashes: str) -> None:
    """Which hashes its strings in a way of its own, so that a set has another order there."""
    again = [sys.executable, "-m", "tests.simulation", "--seed", "14"]
    environment = {**os.environ, "PYTHONHASHSEED": hashes, "PYTHONPATH": str(ROOT)}
    told = subprocess.run(again, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert f"schedule {play(14).schedule}" in told.stdout


def in_words(verdict: Verdict) -> str:
    """Return what was broken, and how to see it again."""
    again = f"pytest tests/simulation --seed {verdict.seed}"
    schedule = f"python -m tests.simulation --seed {verdict.seed} --verbose"
    return "\n    ".join([f"seed {verdict.seed} (again: {again}; its schedule: {schedule})", *verdict.broken])
