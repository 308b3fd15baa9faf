"""Whoever looks after a restore dies at every boundary; another one goes on, and every run hears of it exactly once."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

import pytest

from orchestrator import RetryPolicy, saga, step
from orchestrator.engine import restore
from orchestrator.errors import UsageError
from orchestrator.failpoints import EXIT_CODE
from orchestrator.machine.journal import Operate, encode
from orchestrator.store import arrivals, liveness, restores
from orchestrator.store.connection import Connection, open_connection
from tests.crash.forked import CUT, in_a_process
from tests.crash.points import RESTORE
from tests.engine.stage import Child, entries, start, states

RUNS = [f"run-{number}" for number in range(5)]
LATER = "run-9"  # has not had its first turn when the database is restored
tried: Counter[str] = Counter()


@step
def take_back() -> None: ...


@step(compensate=take_back, retry=RetryPolicy(initial_interval=timedelta(hours=1), maximum_interval=timedelta(hours=1)))
def effect() -> str:
    tried[step.current().run_id] += 1
    if tried[step.current().run_id] == 1:
        raise TimeoutError("nobody knows")
    return "done"


@saga.define
async def one_effect() -> str:
    return await saga.step(effect)


@pytest.fixture
def connection(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Connection:
    """A database with runs whose step is in flight, and one that has not begun; a page holds two runs."""
    monkeypatch.setattr(restore, "_PAGE", 2)
    tried.clear()
    child = Child(database_url)
    for run_id in RUNS:
        start(child.connection, one_effect, run_id=run_id)
    child.drain()
    start(child.connection, one_effect, run_id=LATER)
    child.close()
    return open_connection(database_url, name="test")


def look_after(database_url: str, points: str = "") -> int:
    """Look after a restore in a process of its own; returns its exit code."""
    return in_a_process(
        database_url, lambda connection: restore.look_after(connection, "ann", always=True, watch_s=0.1), points
    )


@pytest.mark.parametrize("action", ["exit", "raise"])
@pytest.mark.parametrize("name", sorted(RESTORE))
def test_whatever_happens_at(name: str, action: str, database_url: str, connection: Connection) -> None:
    with connection:
        assert look_after(database_url, f"{name}={action}") == (EXIT_CODE if action == "exit" else CUT)
        aftermath = restore.look_after(connection, "ann", always=name == "restore.buried", watch_s=0.1)
        ended = name == "restore.ended"
        assert aftermath.needed is not ended
        assert ended or aftermath.found["runs"] == 6
        assert ended or aftermath.found["steps"] == {effect.name: {"parked": 5}}
        told = connection.execute("SELECT run_id FROM orchestrator.arrivals ORDER BY run_id").fetchall()
        assert [run_id for (run_id,) in told] == [*RUNS, LATER]
        assert connection.execute("SELECT DISTINCT role FROM orchestrator.work").fetchall() == [("turn",)]
        assert restores.open_sweep(connection) is None


def test_nothing_is_done_again_before_a_person_says_so(database_url: str, connection: Connection) -> None:
    with connection:
        restore.look_after(connection, "ann", always=True, watch_s=0.1)
        child = Child(database_url)
        child.drain()
        assert set(states(connection).values()) == {"parked"}
        assert tried == Counter(RUNS), "the run that had not begun asks for its step, which may have been done too"
        for run_id in (*RUNS, LATER):
            tried[run_id] = 1
            retry = Operate("retry", f"{effect.name}#0", "ann", "they know the key")
            with connection.transaction():
                arrivals.leave(connection, run_id, encode(retry), anyone=True)
        child.drain()
        assert set(states(connection).values()) == {"completed"}
        assert [entry["e"] for entry in entries(connection, LATER)][:3] == ["restored", "asked", "parked"]
        child.close()


def test_a_first_turn_that_was_passed_on_hears_of_it_first(database_url: str, connection: Connection) -> None:
    """Who takes the turn of a run that has not begun may not have its code."""
    with connection:
        restore.look_after(connection, "ann", always=True, watch_s=0.1)
        stranger = Child(database_url)
        stranger.scripts, stranger.targets[:] = lambda name, version: None, []
        stranger.drain()
        stranger.close()
        assert states(connection)[LATER] == "pending", "nobody could take it"
        child = Child(database_url)
        child.drain()
        child.close()
        assert (states(connection)[LATER], tried[LATER]) == ("parked", 0)


def test_it_refuses_while_a_worker_lives(
    database_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connection:
        child = Child(database_url)
        monkeypatch.setattr(restore, "sleep", lambda seconds: liveness.renew(child.connection, child.incarnation))
        with pytest.raises(UsageError, match=f"workers run on this database: node-{child.number}"):
            restore.look_after(connection, "ann", always=True)
        assert restores.open_sweep(connection) is None
        child.close()
