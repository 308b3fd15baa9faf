"""Laws that hold for every saga, every outcome and every timing."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.machine.fold import Fold
from orchestrator.machine.journal import Abandoned, Attempted, Operated, RollbackBegan, Unlocked, decode_entry, encode
from orchestrator.machine.states import Backward, Forward
from orchestrator.testing import replay
from tests.machine.chaos import UNDOABLE, Program, World, cancel_at, chaos, programs

runs = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
moments = st.none() | st.integers(0, 60)
seeds = st.integers(0, 10_000)


def _played(program: Program, seed: int, cancel: int | None, deadline: int | None, replays: bool = True) -> World:
    world = World(program, seed, replays=replays, deadline_s=deadline)
    cancel_at(world, cancel)
    world.play_out()
    return world


def _name(world: World, key: str) -> str:
    return world.fold.steps[key].asked.task.rsplit(".", 1)[-1]


@runs
@given(programs, seeds, moments, moments)
def test_when_a_run_has_ended_no_effect_is_there_that_nobody_answers_for(
    program: Program, seed: int, cancel: int | None, deadline: int | None
) -> None:
    world = _played(program, seed, cancel, deadline)
    ended = world.fold.ended
    assert ended is not None
    left = {item["key"] for item in ended.left}
    for key in world.effects:
        if _name(world, key) not in UNDOABLE or key in left or key in world.corrections:
            continue
        step = world.fold.steps[key]
        kept = ended.state == "completed" and step.forward is Forward.SUCCEEDED and not step.abandoned
        assert kept, f"{key} is {step.forward}, its undo {step.backward}, in a run that is {ended.state}"


@runs
@given(programs, seeds, moments, moments)
def test_what_the_saga_counts_as_done_is_really_there(
    program: Program, seed: int, cancel: int | None, deadline: int | None
) -> None:
    world = _played(program, seed, cancel, deadline)
    for key, step in world.fold.steps.items():
        if step.asked.kind == "step" and step.forward is Forward.SUCCEEDED and step.backward is Backward.NONE:
            assert key in world.effects


@runs
@given(programs, seeds, moments, moments)
@example(["sequence", [["step", "settle", 0], ["wait_for", 1, ["step", "charge", 0]], ["sleep", 12]]], 5, None, None)
def test_what_certainly_had_no_effect_is_never_undone_unless_it_lands_late(
    program: Program, seed: int, cancel: int | None, deadline: int | None
) -> None:
    world = _played(program, seed, cancel, deadline)
    late = {entry.key for entry in world.entries if entry.tag == "late"}
    in_doubt = {entry.key for entry in world.entries if isinstance(entry, Attempted) and entry.doubt}
    for key in world.undone:
        forward = world.fold.steps[key].forward
        assert forward is Forward.SUCCEEDED or (forward is Forward.UNKNOWN and key in in_doubt) or key in late


@runs
@given(programs, seeds, moments, moments)
def test_what_was_given_up_is_not_tried_again_unless_a_person_says_so(
    program: Program, seed: int, cancel: int | None, deadline: int | None
) -> None:
    given_up: set[str] = set()
    goes_back = False
    for turn in _played(program, seed, cancel, deadline).turns:
        given_up |= {entry.key for entry in turn.entries if isinstance(entry, Abandoned)}
        goes_back = goes_back or any(isinstance(entry, RollbackBegan) for entry in turn.entries)
        again = {work.key for work in turn.work if work.role in ("do", "once") and (goes_back or work.key in given_up)}
        assert again <= {entry.key for entry in turn.entries if isinstance(entry, Operated)}


@runs
@given(programs, seeds, moments, moments)
def test_after_the_point_of_no_return_nothing_is_rolled_back(
    program: Program, seed: int, cancel: int | None, deadline: int | None
) -> None:
    world = _played(program, seed, cancel, deadline)
    tags = [(entry.tag, getattr(entry, "key", "")) for entry in world.entries]
    settled = [
        index
        for index, entry in enumerate(world.entries)
        if entry.tag == "settled"
        and getattr(entry, "outcome", "") == "succeeded"
        and world.fold.steps[getattr(entry, "key", "")].is_pivot
    ]
    if settled and "rollback" in [tag for tag, _ in tags]:
        assert [tag for tag, _ in tags].index("rollback") < settled[0]


@runs
@given(programs, seeds, moments, moments)
def test_rolling_back_undoes_the_youngest_first(
    program: Program, seed: int, cancel: int | None, deadline: int | None
) -> None:
    world = _played(program, seed, cancel, deadline)
    entries = world.entries
    began = next((i for i, entry in enumerate(entries) if entry.tag == "rollback"), len(entries))
    undone = [e for e in entries[began:] if e.tag == "undoing" and not getattr(e, "late", 0)]
    in_doubt = {e.key for e in undone if _before_settled(entries, e)}  # type: ignore[union-attr]
    order = [world.fold.steps[e.key].order for e in undone if e.key not in in_doubt]  # type: ignore[union-attr]
    assert order == sorted(order, reverse=True)


def _before_settled(entries: list[Any], undo: Any) -> bool:
    position = next(i for i, entry in enumerate(entries) if entry is undo)
    return not any(e.tag == "settled" and e.key == undo.key for e in entries[:position])


@runs
@given(programs, seeds, moments, moments)
def test_no_lock_is_given_back_while_something_that_was_given_up_under_it_is_under_way(
    program: Program, seed: int, cancel: int | None, deadline: int | None
) -> None:
    world = _played(program, seed, cancel, deadline)
    fold = Fold(world.info)
    for entry in world.entries:
        fold.apply(entry)
        lock = fold.steps[entry.key] if isinstance(entry, Unlocked) else None
        if lock is not None and lock.forward is Forward.SUCCEEDED and not lock.abandoned:
            since = (step for step in fold.steps.values() if step.abandoned and step.order > lock.order)
            assert not any(step.in_flight or step.owes_undo for step in since)


@runs
@given(programs, seeds, moments, moments)
def test_when_a_run_has_ended_every_lock_is_given_back_once(
    program: Program, seed: int, cancel: int | None, deadline: int | None
) -> None:
    world = _played(program, seed, cancel, deadline)
    asked = [world.info.lock(step.key) for turn in world.turns for step in turn.locks]
    assert sorted(asked) == sorted(handle for turn in world.turns for handle in turn.unlocks)


@runs
@given(programs, seeds, moments, moments)
def test_replaying_any_prefix_of_any_journal_asks_for_nothing_twice(
    program: Program, seed: int, cancel: int | None, deadline: int | None
) -> None:
    replay(chaos, _played(program, seed, cancel, deadline).history())


@runs
@example(["gather", [("locked", "b", 0, ("fickle", "mail", 0, 3)), ("step", "capture", 0)]], 417, None, None)
@given(programs, seeds, moments, moments)
def test_catching_up_equals_replaying(program: Program, seed: int, cancel: int | None, deadline: int | None) -> None:
    replayed = _played(program, seed, cancel, deadline)
    live = _played(program, seed, cancel, deadline, replays=False)
    assert without_tracebacks(live.rows) == without_tracebacks(replayed.rows)
    assert live.calls == replayed.calls


@runs
@given(programs, seeds, moments, moments)
def test_folding_the_journal_gives_the_live_state(
    program: Program, seed: int, cancel: int | None, deadline: int | None
) -> None:
    world = _played(program, seed, cancel, deadline, replays=False)
    again = Fold(world.info)
    for at, forms in world.rows:
        again.apply_row(at, [decode_entry(form) for form in forms])  # type: ignore[arg-type]
    assert snapshot(again) == snapshot(world.fold)


@runs
@given(programs, seeds, moments, moments)
def test_nothing_is_scheduled_and_taken_back_in_one_turn(
    program: Program, seed: int, cancel: int | None, deadline: int | None
) -> None:
    for turn in _played(program, seed, cancel, deadline).turns:
        assert not {work.key for work in turn.work} & set(turn.withdraw)


@runs
@given(programs, seeds, moments, moments)
def test_no_attempt_is_made_twice_and_no_key_has_two_pieces_of_work(
    program: Program, seed: int, cancel: int | None, deadline: int | None
) -> None:
    world = _played(program, seed, cancel, deadline)
    attempts = [(call.key, call.role, call.attempt) for call in world.calls]
    assert len(attempts) == len(set(attempts))


@runs
@given(programs, seeds, moments)
@example(["sequence", [["sleep", 1]]], 0, None)
def test_the_journal_never_goes_back_in_time(program: Program, seed: int, cancel: int | None) -> None:
    instants: list[datetime] = [at for at, _ in _played(program, seed, cancel, None).rows]
    assert instants == sorted(instants)


@runs
@given(programs, seeds, moments, moments)
def test_every_entry_survives_its_json_form(
    program: Program, seed: int, cancel: int | None, deadline: int | None
) -> None:
    for _, forms in _played(program, seed, cancel, deadline).rows:
        again = [encode(decode_entry(form)) for form in forms]  # type: ignore[arg-type]
        assert json.loads(json.dumps(again)) == forms


def without_tracebacks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_tracebacks(item) for key, item in value.items() if key != "traceback"}
    if isinstance(value, list | tuple):
        return [without_tracebacks(item) for item in value]
    return value


def snapshot(fold: Fold) -> dict[str, Any]:
    state = {name: value for name, value in vars(fold).items() if not name.startswith("_")}
    state["steps"] = {key: {name: getattr(step, name) for name in step.__slots__} for key, step in fold.steps.items()}
    state |= {name: list(getattr(fold, name)) for name in ("abandoned_effects", "waiting", "given_up")}
    state["children"] = [step.key for step in fold.children]
    return without_tracebacks(state)  # type: ignore[no-any-return]
