"""Faults that the simulation has found, each with a seed that finds it again.

Owns how each fault is put back into the engine.  What a seed plays changes with the simulation and with the engine, so
that a seed alone is worth nothing after a while: a test plays each with its fault put back, and it must be found.  If
it no longer is, ``python -m tests.simulation --fault NAME --focus WORDS`` hunts for another seed.  The test that pins a
mended fault down is beside the code that was mended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.engine.advance import Advancer
from orchestrator.store import turns
from orchestrator.store.connection import Connection, TransactionFailed
from orchestrator.store.transaction import Transactions
from orchestrator.store.turns import Taken

PutBack = Callable[[pytest.MonkeyPatch], None]
KEPT: list[tuple[PutBack, int, str]] = []


def kept(seed: int, focus: str = "") -> Callable[[PutBack], PutBack]:
    """Register a fault with a seed that finds it, and with the statement that is in danger in that seed."""

    def register(fault: PutBack) -> PutBack:
        KEPT.append((fault, seed, focus))
        return fault

    return register


@kept(16, "set_config")
def a_connection_that_breaks_in_a_transaction_ends_the_drain(patch: pytest.MonkeyPatch) -> None:
    """And puts all that was begun with it in doubt."""
    begun = Transactions._begun

    def unforeseen(self: Transactions, *args: Any) -> Any:
        try:
            return begun(self, *args)
        except TransactionFailed as failed:
            raise failed.reason from None

    patch.setattr(Transactions, "_begun", unforeseen)


@kept(88, "SELECT coalesce")
def arrivals_are_read_before_the_position(patch: pytest.MonkeyPatch) -> None:
    """One that another turn takes in between is taken twice."""
    load = turns.load

    def the_other_way_round(connection: Connection, known: Any, now: Any = None) -> Any:
        early = connection.execute(turns._LOAD_ARRIVALS, {"ids": list(known)}).fetchall()
        found = load(connection, known, now)
        for run_id, loaded in found.items():
            loaded.arrivals[:] = [(id, arrival) for its_run, id, arrival in early if its_run == run_id]
        return found

    patch.setattr(turns, "load", the_other_way_round)


@kept(62)
def a_run_that_is_cancelled_before_its_first_turn_needs_its_code(patch: pytest.MonkeyPatch) -> None:
    """A worker without it puts the turn off for 30 s."""

    def is_first_turn(self: Advancer, taken: Taken) -> bool:
        run = taken.run
        return run is not None and run.position == 0 and taken.run_id not in self._runs and taken.now >= run.started_at

    patch.setattr(Advancer, "_is_first_turn", is_first_turn)
