"""The protocol is safe and comes to an end in every schedule of a small world; without any one rule it is not.

Nothing here is sampled: within the bounds every order of every move is looked at.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.model.explore import Explored, explore
from tests.model.protocol import Bounds, Rules

STALE = "a stale worker's write changed something"
UNINTENDED = "an effect before its intent"
NEVER = "nothing will ever happen again, and the run has not ended"
HALF_DONE = "the run is failed, and an effect of it was neither kept nor undone"


def assert_needed(rules: Rules, bounds: Bounds, wrong: str, *passing_over: str) -> Explored:
    """Assert that without a rule it goes wrong in this way; the message tells the shortest way there."""
    found = explore(rules, bounds, passing_over)
    assert wrong in found.wrong and found.wrong, str(found)
    return found


# -- with every rule ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("bounds", "ends"),
    [
        (Bounds("transactional", faults=2, cancels=0), {"completed", "compensated", "failed", "parked"}),
        (Bounds("rejected", faults=1, cancels=0), {"compensated", "failed", "parked"}),
        (
            Bounds("transactional", faults=1, cancels=1),
            {"completed", "compensated", "failed", "cancelled", "parked"},
        ),
    ],
    ids=["two faults", "a fault and a rejected step", "a fault and a cancel"],
)
def test_every_schedule_is_safe_and_comes_to_an_end(bounds: Bounds, ends: set[str]) -> None:
    found = explore(Rules(), bounds)
    assert not found.wrong, str(found)
    assert found.ends == ends, "and all of them are reached"
    assert found.states > 5_000


# -- without one of them -----------------------------------------------------------------------------------------------
def test_without_ringing_again_a_lost_doorbell_is_the_end_of_it() -> None:
    found = assert_needed(Rules(ring_again=False), Bounds(faults=1, cancels=0), NEVER)
    assert found.trace == ("a doorbell is lost",)


def test_a_pump_that_rings_for_nothing_goes_round_for_ever() -> None:
    """Nothing is lost by it; it shows that a world that turns without an end is noticed."""
    assert_needed(Rules(ring_for_due=False), Bounds(faults=0, cancels=0), "round for ever")


def test_without_counting_first_a_step_that_kills_its_worker_is_tried_for_ever() -> None:
    assert_needed(Rules(count_first=False), Bounds(faults=1, cancels=0), "more attempts than the policy allows")


def test_without_the_fence_a_stale_worker_writes() -> None:
    assert_needed(Rules(fence=False), Bounds(faults=1, cancels=0), STALE)


def test_without_the_fence_a_transactional_step_takes_effect_twice() -> None:
    bounds = Bounds(faults=1, cancels=0)
    assert_needed(Rules(fence=False), bounds, "a transactional effect happened twice", STALE)


def test_without_the_intent_first_an_effect_is_on_no_record() -> None:
    assert_needed(Rules(intent_first=False), Bounds(faults=0, cancels=0), UNINTENDED)


def test_without_the_intent_first_an_effect_is_left_behind() -> None:
    assert_needed(Rules(intent_first=False), Bounds(faults=0, cancels=0), HALF_DONE, UNINTENDED)


def test_without_giving_back_what_the_dead_had_begun_a_run_waits_for_ever() -> None:
    assert_needed(Rules(give_back=False), Bounds(faults=1, cancels=0), NEVER)


def test_without_the_undo_of_unknown_steps_an_effect_is_left_behind() -> None:
    assert_needed(Rules(undo_unknown=False), Bounds(faults=0, cancels=0), HALF_DONE)


# -- what is asked of others -------------------------------------------------------------------------------------------
FORGETFUL = Bounds(faults=1, cancels=0, crashes_after_effect=False, in_doubt=False)
"""A provider that does not remember an undo; a worker that is late, but lives to report its success."""


def test_a_late_success_that_is_noted_is_undone_though_the_provider_forgets() -> None:
    found = explore(Rules(provider_remembers=False), FORGETFUL)
    assert not found.wrong, str(found)


def test_a_late_success_that_is_not_noted_is_left_behind_if_the_provider_forgets() -> None:
    assert_needed(Rules(provider_remembers=False, note_late=False), FORGETFUL, "neither kept nor undone")


def test_a_late_worker_that_reports_no_success_is_what_is_not_promised_either() -> None:
    assert_needed(Rules(provider_remembers=False), replace(FORGETFUL, in_doubt=True), "neither kept nor undone")


DEADLINES = Bounds(faults=2, cancels=0, deadlines=True)
"""Workers that are late and die; but whatever an attempt does, it does before its deadline."""


def test_an_undo_that_waits_for_the_deadline_is_not_overtaken_though_the_provider_forgets() -> None:
    found = explore(Rules(provider_remembers=False), DEADLINES)
    assert not found.wrong, str(found)


def test_an_undo_that_does_not_wait_is_overtaken_if_the_provider_forgets() -> None:
    rules = Rules(provider_remembers=False, wait_until_quiet=False)
    assert_needed(rules, DEADLINES, "neither kept nor undone")


def test_a_provider_that_forgets_and_a_late_worker_that_dies_is_what_is_not_promised() -> None:
    """Therefore the contract of a compensation: it remembers that it ran, and refuses a "do" that comes after it."""
    bounds = Bounds(faults=2, cancels=0, in_doubt=False)
    assert_needed(Rules(provider_remembers=False), bounds, "neither kept nor undone")
    assert not explore(Rules(), bounds).wrong
