"""The explorer: sound sagas pass, and each kind of wrong one is found, with a report that names the fault."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from orchestrator import testing
from orchestrator.testing import Environment, EnvironmentRun, Exploration, InvariantBroken
from orchestrator.testing.explorer import _Explorer
from orchestrator.testing.faults import Fault, Kind
from orchestrator.testing.report import Schedule
from tests.testing.shop import (
    approval,
    charge,
    checkout,
    debit,
    family,
    fickle,
    forgetful,
    generous,
    mail,
    pay,
    racy,
    world,
)

pytestmark = pytest.mark.timeout(600)  # many schedules, on a machine that may be busy


def explore(env: Environment, saga: Any, args: Any = "o1", **options: Any) -> Exploration:
    options = {"invariant": honest, "setup": world.reset, "check": False, **options}
    return testing.explore(saga, args, environment=env, **options)


def honest(run: EnvironmentRun) -> bool:
    """The customer has paid if and only if the run completed."""
    return world.money["ann"] == (90 if run.state == "completed" else 100)


def kept_or_given_back(run: EnvironmentRun) -> bool:
    return world.money["ann"] == (40 if run.state == "completed" else 100)


def nothing_or_both(run: EnvironmentRun) -> bool:
    return world.money["ann"] == (80 if run.state == "completed" else 100)


def report_of(found: Exploration) -> str:
    """Return a report, with its lines joined."""
    assert not found.ok
    return " ".join(str(found).split())


# -- sound sagas -------------------------------------------------------------------------------------------------------
def test_a_sound_saga_passes_every_schedule(saga_environment: Environment) -> None:
    found = explore(saga_environment, checkout, pairs=10)
    assert found.ok, str(found)
    assert found.tried > 30 and not found.exhausted
    assert set(found.kinds) == {str(kind) for kind in Kind if kind not in (Kind.MEANWHILE, Kind.LATE)}
    assert {"completed", "compensated", "cancelled", "failed"} <= found.ends.keys()
    points = {(key.rpartition(".")[2], role) for _, key, role in found.points}
    assert points == {("charge#0", "do"), ("mail#0", "do"), ("charge#0", "undo")}


def test_the_same_seed_draws_the_same_pairs() -> None:
    singles = [Schedule((Fault(Kind.REJECTED, "task", 1, key),)) for key in "abcdef"]
    first, again, other = (_Explorer._pairs(singles, 5, Random(seed)) for seed in (3, 3, 4))
    assert first == again != other
    assert len(set(map(str, first))) == 5
    assert all(len({fault.key for fault in pair.faults}) == 2 for pair in first)


def test_no_more_schedules_are_tried_than_are_asked_for(saga_environment: Environment) -> None:
    found = explore(saga_environment, checkout, max_schedules=7)
    assert (found.tried, found.exhausted) == (7, True)
    assert "raise max_schedules" in str(found)


def test_a_saga_that_waits_is_sent_what_it_waits_for(saga_environment: Environment) -> None:
    found = explore(saga_environment, approval, pairs=0, waiting=lambda run: run.signal("approved", "ann"))
    assert found.ok, str(found)
    assert found.ends["completed"], "the signal came before its timeout"
    late = explore(saga_environment, approval, pairs=0)
    assert late.ok and not late.ends["completed"], str(late)


def test_an_undo_that_remembers_itself_refuses_what_comes_late(saga_environment: Environment) -> None:
    found = explore(saga_environment, checkout, pairs=0, late=True)
    assert found.ok, str(found)
    assert found.kinds[Kind.LATE] == 1


def test_a_child_that_parks_is_mended_though_its_parent_only_waits(saga_environment: Environment) -> None:
    """With waiting= the parent was sent what it did not wait for, again and again, and the child was never retried."""
    found = explore(
        saga_environment, family, "c1", pairs=0, invariant=nothing_or_both, waiting=lambda run: None, max_schedules=120
    )
    assert found.ok, str(found)


def test_children_are_explored_with_their_parent(saga_environment: Environment) -> None:
    found = explore(saga_environment, family, invariant=nothing_or_both, pairs=0, max_schedules=30)
    assert found.ok, str(found)
    assert {run.rpartition("/")[2] for run, _, _ in found.points} >= {"kit.parcel#0", "kit.parcel#1"}


# -- wrong sagas -------------------------------------------------------------------------------------------------------
def test_an_undo_forgotten_for_a_step_that_timed_out_is_found(saga_environment: Environment) -> None:
    found = explore(saga_environment, forgetful, may_leave=[pay])
    said = report_of(found)
    assert (
        "tests.testing.shop.pay (every attempt, tests.testing.shop.pay#0) took effect, and its answer was lost" in said
    )
    assert "the invariant honest is broken: it returned False" in said
    assert "attempt 5 failed" in said  # the journal of that run
    assert 'env.fail("tests.testing.shop.pay", "unknown"' in said


def test_the_report_shows_how_to_see_it_again(saga_environment: Environment) -> None:
    [line] = explore(saga_environment, forgetful, may_leave=[pay]).failures[0].schedule.code()
    saga_environment.reset()
    world.reset()
    exec(line, {"env": saga_environment})
    run = saga_environment.run(forgetful, "o1")
    assert not honest(run)


def test_an_effect_that_is_left_needs_no_invariant_to_be_found(saga_environment: Environment) -> None:
    said = report_of(explore(saga_environment, forgetful, invariant=None))
    assert "left tests.testing.shop.pay#0" in said and "may_leave=" in said


def test_a_refund_that_is_not_idempotent_is_found(saga_environment: Environment) -> None:
    found = explore(saga_environment, generous)
    said = report_of(found)
    assert "tests.testing.shop.give_again" in said
    shortest = found.failures[0].schedule
    assert [fault.role for fault in shortest.faults][-1] in ("do", "undo")
    assert len(shortest.faults) == min(len(other.schedule.faults) for other in found.failures)


def test_an_undo_that_forgets_itself_is_found_by_an_effect_that_comes_late(saga_environment: Environment) -> None:
    found = explore(saga_environment, racy, late=True, pairs=0, invariant=kept_or_given_back)
    assert "took effect after its run had ended" in report_of(found)
    assert len(found.failures) == 1


def test_a_look_before_a_debit_is_found_by_what_happens_meanwhile(saga_environment: Environment) -> None:
    def solvent() -> None:
        assert world.money["ann"] >= 0, "ann is overdrawn"

    assert explore(saga_environment, racy, invariant=solvent, pairs=0).ok
    found = explore(saga_environment, racy, invariant=solvent, meanwhile=lambda env: env.run(racy, "other"))
    said = report_of(found)
    assert (
        "tests.testing.shop.debit (attempt 1, tests.testing.shop.debit#0) was about to run when something else" in said
    )
    assert "the invariant solvent is broken: AssertionError: ann is overdrawn" in said
    assert found.failures[0].schedule.faults[0].task == debit.name


def test_a_run_that_waits_for_ever_is_found(saga_environment: Environment) -> None:
    found = explore(saga_environment, fickle, invariant=None)
    assert "no retry will help before its code is mended" in report_of(found)


def test_a_broken_invariant_is_an_assertion_with_the_report(saga_environment: Environment) -> None:
    with pytest.raises(AssertionError, match=r"kit\.generous breaks in \d+ of the schedules") as raised:
        explore(saga_environment, generous, check=True)
    assert isinstance(raised.value, InvariantBroken)
    assert str(raised.value) == str(raised.value.exploration)


def test_a_run_that_fails_by_itself_is_reported_first(saga_environment: Environment) -> None:
    found = explore(saga_environment, checkout, invariant=lambda: False)
    assert found.tried == 1
    assert "nothing; it fails by itself" in report_of(found)


def test_stubs_stand_in_for_what_cannot_be_called(saga_environment: Environment) -> None:
    found = explore(saga_environment, checkout, invariant=None, stubs={charge: "c1", mail: None}, max_schedules=10)
    assert found.ok
    assert world.charges == {}


def test_functions_may_be_async(saga_environment: Environment) -> None:
    ready: list[str] = []

    async def setup() -> None:
        world.reset()
        ready.append("set up")

    async def broken() -> bool:
        return False

    found = explore(saga_environment, checkout, setup=setup, invariant=broken, max_schedules=1)
    assert ready == ["set up"]
    assert "the invariant broken is broken: it returned False" in report_of(found)


def test_functions_get_what_they_ask_for(saga_environment: Environment) -> None:
    seen: list[Any] = []

    def setup(environment: Environment) -> None:
        seen.append(environment)

    def invariant(environment: Environment, run: EnvironmentRun) -> None:
        seen.append((environment, run.id))

    assert explore(saga_environment, checkout, invariant=invariant, setup=setup, max_schedules=1).ok
    assert explore(saga_environment, checkout, invariant=seen.append, setup=seen.append, max_schedules=1).ok
    assert seen[:3] == [saga_environment, (saga_environment, "explored"), saga_environment]
    assert isinstance(seen[3], EnvironmentRun)
