"""The transition tables: every move that is listed works, every other one raises and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.machine.states import (
    BACKWARD_TRANSITIONS,
    FORWARD_TRANSITIONS,
    RUN_TRANSITIONS,
    SETTLED,
    TERMINAL,
    Backward,
    Forward,
    IllegalTransition,
    RunState,
    move_backward,
    move_forward,
    move_run,
)

Table = dict[Any, dict[str, Any]]
Move = Callable[[Any, str], Any]

TABLES: list[tuple[type, Table, Move]] = [
    (RunState, RUN_TRANSITIONS, move_run),
    (Forward, FORWARD_TRANSITIONS, move_forward),
    (Backward, BACKWARD_TRANSITIONS, move_backward),
]
LISTED = [
    (move, state, event, target)
    for _, table, move in TABLES
    for state, row in table.items()
    for event, target in row.items()
]
UNLISTED = [
    (move, state, event)
    for states, table, move in TABLES
    for state in states  # type: ignore[attr-defined]
    for event in sorted({e for row in table.values() for e in row} | {"nonsense"})
    if event not in table[state]
]


@pytest.mark.parametrize(("move", "state", "event", "target"), LISTED)
def test_every_listed_move_leads_where_the_table_says(move: Move, state: Any, event: str, target: Any) -> None:
    assert move(state, event) is target


@pytest.mark.parametrize(("move", "state", "event"), UNLISTED)
def test_every_other_move_raises_and_names_state_and_event(move: Move, state: Any, event: str) -> None:
    with pytest.raises(IllegalTransition, match=f"{state}.*{event}"):
        move(state, event)


@pytest.mark.parametrize(("states", "table", "move"), TABLES)
def test_every_state_has_its_row_and_is_reached_or_initial(states: Any, table: Table, move: Move) -> None:
    reached = {target for row in table.values() for target in row.values()}
    initial = next(iter(states))
    unreachable = set(states) - reached - {initial}
    assert set(table) == set(states)
    assert unreachable <= {RunState.PENDING, Forward.ASKED, Backward.NONE}


def test_a_run_that_has_ended_never_moves_again() -> None:
    assert {str(state) for state, row in RUN_TRANSITIONS.items() if not row} == TERMINAL


def test_a_settled_step_never_changes_its_outcome() -> None:
    assert {str(state) for state, row in FORWARD_TRANSITIONS.items() if not row} == SETTLED


def test_no_move_leads_from_an_undo_back_to_doing() -> None:
    assert set(FORWARD_TRANSITIONS[Forward.UNDOING].values()) == {Forward.UNKNOWN}


def test_a_run_that_compensates_can_neither_complete_nor_go_on() -> None:
    reachable = {RunState.COMPENSATING}
    for _ in RunState:
        reachable |= {t for s in reachable - {RunState.PARKED} for t in RUN_TRANSITIONS[s].values()}
    assert RunState.COMPLETED not in reachable
    assert RunState.RUNNING not in reachable
