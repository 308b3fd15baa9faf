"""Each rule is taken out of the real engine, and the checker says what breaks; with all of them in, nothing does.

So neither is a rule of the protocol superfluous, nor does the checker pass what must not pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import Effect
from orchestrator.engine import advance, attempts, commit, drain
from orchestrator.engine.advance import Advancer
from orchestrator.machine.decide import Decisions
from orchestrator.machine.fold import Fold
from orchestrator.machine.journal import Settled
from orchestrator.machine.record import Step
from orchestrator.machine.states import Backward, Forward
from orchestrator.store import arrivals, liveness, turns
from orchestrator.store.connection import Connection, open_connection
from orchestrator.store.turns import Commit, Committed, Taken
from tests.proof.company import Company
from tests.proof.stories import (
    STORIES,
    Story,
    a_doorbell_is_lost,
    a_run_goes_back,
    a_step_hangs,
    a_step_kills_each_worker,
    a_step_stays_in_doubt,
    a_transaction_is_late,
    a_worker_dies_after_the_effect,
    a_worker_dies_at_an_outcome,
    a_worker_dies_in_a_step,
    a_worker_is_late,
    a_worker_is_late_in_the_middle,
    a_workers_clock_is_ahead,
    a_workers_clock_is_behind,
    an_effect_comes_after_the_end,
    an_effect_comes_while_it_is_undone,
    the_author_of_an_arrival_dies,
    two_outcomes_meet,
)


@pytest.fixture
def company(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Company]:
    with open_connection(database_url, name="test") as connection:
        company = Company(database_url, connection, tmp_path / "effects", monkeypatch)
        yield company
        company.close()


@pytest.mark.parametrize("story", STORIES)
def test_with_every_rule_the_story_ends_well(company: Company, story: Story, caplog: pytest.LogCaptureFixture) -> None:
    story(company)
    report = company.check(caplog.text)
    assert report.ok, str(report)
    assert report.seen["runs"] > 0 and report.seen["effects"] > 0


# -- mutations: one rule less ------------------------------------------------------------------------------------------
NOT_ENDED = "a run has not ended"
STALE = "an attempt wrote after the one that followed it"
Mutation = Callable[[Company, pytest.MonkeyPatch], None]
MUTATIONS: list[tuple[Mutation, Story, str]] = []


def breaks(story: Story, promise: str) -> Callable[[Mutation], Mutation]:
    """Register a mutation with a story that shows it, and the promise that is broken then."""

    def register(mutation: Mutation) -> Mutation:
        MUTATIONS.append((mutation, story, promise))
        return mutation

    return register


@breaks(a_worker_dies_at_an_outcome, NOT_ENDED)
def rule_1_an_outcome_is_committed_before_its_turn(company: Company, patch: pytest.MonkeyPatch) -> None:
    commit_turn = turns.commit_turn

    def commit(connection: Connection, commit: Commit, *args: Any) -> Committed:
        for lane, fence in commit.done:
            gone = "DELETE FROM orchestrator.work WHERE run_id = %s AND lane = %s AND fence = %s"
            assert connection.execute(gone, [commit.run_id, lane, fence]).rowcount == 1
        return commit_turn(connection, replace(commit, done=()), *args)

    patch.setattr(turns, "commit_turn", commit)


@breaks(two_outcomes_meet, NOT_ENDED)
def rule_1_a_turn_is_written_wherever_its_run_stands(company: Company, patch: pytest.MonkeyPatch) -> None:
    commit_turn = turns.commit_turn

    def commit(connection: Connection, commit: Commit, *args: Any) -> Committed:
        run = turns.run_row(connection, commit.run_id)
        assert run is not None
        return commit_turn(connection, replace(commit, position=run.position), *args)

    patch.setattr(turns, "commit_turn", commit)


@breaks(a_doorbell_is_lost, NOT_ENDED)
def rule_2_the_pump_does_not_ring(company: Company, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(liveness, "due", lambda *args, **kwargs: {})


@breaks(the_author_of_an_arrival_dies, NOT_ENDED)
def rule_2_the_pump_wakes_no_forgotten_run(company: Company, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(liveness, "wake_forgotten", lambda *args, **kwargs: [])


_UNCOUNTED = """
CREATE FUNCTION uncounted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.attempt := OLD.attempt;
    RETURN NEW;
END $$;
CREATE TRIGGER uncounted BEFORE UPDATE ON orchestrator.work FOR EACH ROW
    WHEN (OLD.fence IS NULL AND NEW.fence IS NOT NULL) EXECUTE FUNCTION uncounted()
"""


@breaks(a_step_kills_each_worker, NOT_ENDED)
def rule_3_attempts_are_not_counted_before_they_run(company: Company, patch: pytest.MonkeyPatch) -> None:
    company.connection.execute(_UNCOUNTED)
    patch.setattr(advance, "begin_next", lambda *args, **kwargs: None)


@breaks(a_worker_is_late_in_the_middle, STALE)
@breaks(a_transaction_is_late, STALE)
def rule_4_every_attempt_has_the_same_fence(company: Company, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commit, "_new_lane", lambda turn, number: 1)
    for module in (attempts, commit, drain):
        patch.setattr(module, "new_fence", lambda: 7)


@breaks(a_transaction_is_late, "a transactional effect happened twice")
def rule_4_a_stale_transaction_is_not_rolled_back(company: Company, patch: pytest.MonkeyPatch) -> None:
    record_within = Advancer.record_within

    def record(self: Advancer, *args: Any) -> Any:
        return record_within(self, *args) or (lambda connection: [])

    patch.setattr(Advancer, "record_within", record)


@breaks(a_worker_is_late, "a late success was dropped")
def a_late_success_is_not_noted(company: Company, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(arrivals, "leave", lambda *args, **kwargs: None)


@breaks(an_effect_comes_while_it_is_undone, "a late effect was not undone")
def a_late_effect_is_not_undone_again(company: Company, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Decisions, "_undo_late_effects", lambda self: None)


@breaks(an_effect_comes_after_the_end, "a late effect was not undone")
def a_late_effect_has_no_correcting_run(company: Company, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Advancer, "_correct", lambda *args: None)


@breaks(a_worker_dies_after_the_effect, "a step settled as without effect has one")
def rule_5_the_begin_is_committed_with_the_outcome(company: Company, patch: pytest.MonkeyPatch) -> None:
    take, record = turns.take, Advancer.record

    def take_in_a_transaction(connection: Connection, **values: Any) -> list[Taken]:
        connection.execute("BEGIN")
        taken = take(connection, **values)
        if not taken or taken[0].role == "turn":
            connection.execute("COMMIT")
        return taken

    def record_and_commit(self: Advancer, connection: Connection, *args: Any, **kwargs: Any) -> list[Taken]:
        begun = record(self, connection, *args, **kwargs)
        connection.execute("COMMIT")
        return begun

    patch.setattr(turns, "take", take_in_a_transaction)
    patch.setattr(Advancer, "record", record_and_commit)
    patch.setattr(advance, "begin_next", lambda *args, **kwargs: None)


@breaks(a_worker_dies_in_a_step, NOT_ENDED)
def rule_6_nobody_is_declared_dead(company: Company, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(liveness, "declare_dead", lambda *args, **kwargs: False)


@breaks(a_worker_dies_in_a_step, NOT_ENDED)
def rule_6_what_the_dead_held_is_not_given_back(company: Company, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(liveness, "give_back_dead", lambda *args, **kwargs: [])


@breaks(a_step_hangs, NOT_ENDED)
def rule_6_what_hangs_is_not_given_back(company: Company, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(liveness, "give_back_expired", lambda *args, **kwargs: [])


_BY_THE_WALL = """
CREATE OR REPLACE FUNCTION orchestrator.now() RETURNS timestamptz LANGUAGE sql STABLE AS $$
    SELECT statement_timestamp() + ahead + coalesce((
        SELECT w.ahead FROM public.wall_clocks w WHERE current_setting('application_name') LIKE w.session), '0')
    FROM public.orchestrator_clock $$
"""


@breaks(a_workers_clock_is_ahead, "journal time is ahead of the database's clock")
@breaks(a_workers_clock_is_behind, NOT_ENDED)
def rule_7_everybody_goes_by_a_clock_of_their_own(company: Company, patch: pytest.MonkeyPatch) -> None:
    company.connection.execute(_BY_THE_WALL)


@breaks(a_step_stays_in_doubt, "an effect was neither kept nor undone")
def what_is_unknown_is_not_undone(company: Company, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Decisions, "begin_undo", lambda self, step: self._settle_by(step, "unknown"))


@breaks(a_step_stays_in_doubt, "a step settled as without effect has one")
def what_is_in_doubt_is_taken_for_rejected(company: Company, patch: pytest.MonkeyPatch) -> None:
    def settle(self: Decisions, step: Step) -> None:
        self.record(Settled(step.key, "rejected", step.attempts, None, step.error))

    patch.setattr(Decisions, "settle_unknown", settle)


@breaks(a_run_goes_back, "undos were not begun in reverse order")
def undos_go_in_the_order_of_the_requests(company: Company, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Fold, "next_undo", lambda self: next((s for s in self.steps.values() if s.owes_undo), None))


@breaks(a_run_goes_back, "an effect was neither kept nor undone")
def the_oldest_effect_is_forgotten(company: Company, patch: pytest.MonkeyPatch) -> None:
    def owes(self: Step) -> bool:
        succeeded = self.forward is Forward.SUCCEEDED and self.asked.effect != Effect.NONE
        return succeeded and self.asked.undo is not None and self.backward is Backward.NONE and self.order > 1

    patch.setattr(Step, "owes_undo", property(owes))


@pytest.mark.parametrize(
    ("mutation", "story", "promise"), MUTATIONS, ids=[f"{m.__name__}-{s.__name__}" for m, s, _ in MUTATIONS]
)
def test_without_a_rule_the_checker_says_what_breaks(
    company: Company,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mutation: Mutation,
    story: Story,
    promise: str,
) -> None:
    mutation(company, monkeypatch)
    story(company)
    report = company.check(caplog.text)
    assert promise in report.names, str(report)


def test_every_rule_is_taken_out_once() -> None:
    numbers = {found[1] for mutation, _, _ in MUTATIONS if (found := re.match(r"rule_(\d)", mutation.__name__))}
    assert numbers == set("1234567")
    assert {story for _, story, _ in MUTATIONS} == set(STORIES)
