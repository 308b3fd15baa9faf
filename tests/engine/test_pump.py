"""The pump: what is due is rung, what the dead held is given back, and nobody is declared dead too early."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from orchestrator.engine import pump as pumping
from orchestrator.engine.lease import begin_life, host_name
from orchestrator.engine.pump import Pump
from orchestrator.store import liveness
from orchestrator.store.connection import Connection
from tests.engine.stage import Child, kinds, start, state, work
from tests.engine.test_drain import DONE, in_a_row

LEASE = timedelta(seconds=2)


class Hand:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Hand:
    hand = Hand()
    monkeypatch.setattr(pumping, "monotonic", hand)
    DONE.clear()
    return hand


@pytest.fixture
def rings() -> list[tuple[str, int]]:
    return []


@pytest.fixture
def pump(rings: list[tuple[str, int]]) -> Pump:
    return Pump(lambda queue, times: rings.append((queue, times)), lease=LEASE, reservation=timedelta(milliseconds=100))


def alive(connection: Connection) -> list[int]:
    return [row[0] for row in liveness.alive(connection)]


def watch(pump: Pump, connection: Connection, clock: Hand, seconds: float) -> int:
    """Let the pump look about every half second for so long; returns how many it declared dead."""
    died = 0
    for _ in range(round(seconds / 0.5)):
        clock.now += 0.5
        died += pump.run_once(connection).died
    return died


def test_it_declares_dead_only_after_a_whole_lease(
    pump: Pump, child: Child, connection: Connection, clock: Hand
) -> None:
    assert pump.run_once(connection).died == 0
    assert watch(pump, connection, clock, 2.0) == 0
    liveness.renew(connection, child.incarnation)
    assert watch(pump, connection, clock, 2.5) == 0
    assert watch(pump, connection, clock, 0.5) == 1
    assert alive(connection) == []
    assert not liveness.renew(connection, child.incarnation), "for ever"


def test_a_new_pump_knows_nothing_of_the_time_before_it(child: Child, connection: Connection, clock: Hand) -> None:
    connection.execute("UPDATE orchestrator.incarnations SET seen_at = seen_at - interval '1 day'")
    pump = Pump(lambda *_: None, lease=LEASE, reservation=timedelta(0))
    assert pump.run_once(connection).died == 0


def test_nobody_is_judged_over_a_connection_that_broke(
    pump: Pump, child: Child, connection: Connection, clock: Hand
) -> None:
    pump.run_once(connection)
    clock.now += 1.5
    pump.connection_broke()
    clock.now += 1.5
    assert pump.run_once(connection).died == 0
    assert watch(pump, connection, clock, 2.0) == 0
    assert watch(pump, connection, clock, 0.5) == 1


def test_a_pump_that_stood_still_itself_judges_nobody(
    pump: Pump, child: Child, connection: Connection, clock: Hand
) -> None:
    """A machine that was suspended finds every lease unrenewed: its own sleep is no evidence against others."""
    pump.run_once(connection)
    clock.now += 60
    assert pump.run_once(connection).died == 0
    assert watch(pump, connection, clock, 2.0) == 0
    assert watch(pump, connection, clock, 0.5) == 1


def test_it_rings_for_what_is_due_as_often_as_it_helps(
    pump: Pump, child: Child, connection: Connection, rings: list[tuple[str, int]]
) -> None:
    for n in range(3):
        start(connection, in_a_row, ["a"], run_id=f"r{n}")
    pump.run_once(connection)
    assert rings == [("celery", 1)], "one slot, one bell"
    liveness.enter(connection, child.incarnation, 7, ["celery"])
    pump.run_once(connection)
    assert len(rings) == 1, "somebody drains already"


def test_the_pumps_of_many_workers_ring_together_for_the_slots_that_idle(
    connection: Connection, rings: list[tuple[str, int]]
) -> None:
    """Each for all of them, it would be the square of the workers."""
    for slots in (1, 2, 3):
        begin_life(connection, node=f"w{slots}", pid=slots, queues=["celery"], targets=[], slots=slots)
    for n in range(30):
        start(connection, in_a_row, ["a"], run_id=f"r{n}")
    for slots in (1, 2, 3):
        pump = Pump(
            lambda queue, times: rings.append((queue, times)), lease=LEASE, reservation=timedelta(0), slots=slots
        )
        pump.run_once(connection)
    assert rings == [("celery", 1), ("celery", 2), ("celery", 3)]


def test_what_a_dead_worker_had_begun_is_in_doubt_and_tried_again(
    pump: Pump, new_child: Callable[..., Child], connection: Connection, clock: Hand
) -> None:
    dead, heir = new_child(), new_child()

    class Crash(BaseException):
        pass

    def crash(taken: Any) -> None:
        raise Crash

    dead.runner.before = crash
    start(connection, in_a_row, ["a"])
    with pytest.raises(Crash):
        dead.drain()
    (key, _, attempt, begun) = work(connection)[0]
    assert (attempt, begun) == (1, True)
    pump.run_once(connection)
    for _ in range(6):
        liveness.renew(connection, heir.incarnation)
        watch(pump, connection, clock, 0.5)
    assert alive(connection) == [heir.incarnation]
    heir.drain()
    assert kinds(connection) == ["asked", "attempted", "settled", "returned", "ended"]
    assert (state(connection), DONE) == ("completed", ["do a"])
    assert heir.runner.calls == [("do", key, 2)]


def test_a_thousand_arrivals_of_runs_that_are_gone_keep_no_forgotten_run_waiting(
    pump: Pump, child: Child, connection: Connection
) -> None:
    """A success may come so late that its run was pruned meanwhile; nobody will ever take it in."""
    start(connection, in_a_row, ["a"])
    child.drain()
    connection.execute("UPDATE orchestrator.runs SET state = 'running', finished_at = NULL")
    connection.execute(
        """INSERT INTO orchestrator.arrivals (run_id, at, arrival)
        SELECT 'gone-' || n, orchestrator.now() - interval '1 h', '{"e": "cancel"}'::json
        FROM generate_series(1, 1000) AS n
        UNION ALL SELECT id, orchestrator.now() - interval '5 s', '{"e": "cancel"}'::json FROM orchestrator.runs"""
    )
    assert work(connection) == []
    for _ in range(3):
        pump.run_once(connection)
    assert [row[0] for row in work(connection)] == [""], "its turn is due"


@pytest.mark.parametrize(
    ("expires", "told"), [(timedelta(seconds=-1), "missed its heartbeat"), (timedelta(minutes=1), "is gone")]
)
def test_a_child_that_was_ended_because_it_hung_is_not_called_lost(
    child: Child, connection: Connection, expires: timedelta, told: str
) -> None:
    start(connection, in_a_row, ["a"], run_id="r")
    connection.execute(
        "INSERT INTO orchestrator.work (run_id, lane, key, role, target, queue, task, due_at, attempt, call, fence, "
        "incarnation, child, begun_at, deadline_at, expires_at) VALUES ('r', 1, 'k', 'do', 't', 'celery', 't', now(), "
        "1, '{\"a\": {}, \"t\": 300}', 1, %s, 100, now(), now() + interval '5 min', orchestrator.now() + %s)",
        [child.incarnation, expires],
    )
    liveness.give_back_child(connection, child.incarnation, 100)
    (arrival,) = connection.execute("SELECT arrival FROM orchestrator.arrivals").fetchone()  # type: ignore[misc]
    assert told in arrival["error"]["message"] and not arrival["quiet"]


def test_a_child_that_died_is_given_back_at_once_and_the_others_are_not(
    new_child: Callable[..., Child], connection: Connection
) -> None:
    child = new_child()
    for n in range(2):
        start(connection, in_a_row, ["a"], run_id=f"r{n}")
    connection.execute(
        "INSERT INTO orchestrator.work (run_id, lane, key, role, target, queue, task, due_at, attempt, call, fence, "
        "incarnation, child, begun_at, deadline_at) SELECT 'r' || n, 1, 'k', 'do', 't', 'celery', 't', now(), 1, "
        "'{\"a\": {}, \"t\": 300}', n, %s, 100 + n, now(), now() + interval '5 min' FROM generate_series(0, 1) n",
        [child.incarnation],
    )
    liveness.enter(connection, child.incarnation, 100, ["celery"])
    assert liveness.give_back_child(connection, child.incarnation, 100) == ["celery"]
    assert [row[0] for row in work(connection, "r0")] == [""]
    assert [row[0] for row in work(connection, "r1")] == ["", "k"]
    (arrival,) = connection.execute("SELECT arrival FROM orchestrator.arrivals").fetchone()  # type: ignore[misc]
    assert arrival["verdict"] == "doubt" and not arrival.get("quiet"), "its process is known to be gone"
    assert liveness.children(connection, child.incarnation) == [101]


def test_a_starting_worker_buries_its_forerunner_at_once(connection: Connection) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    common: dict[str, Any] = {"host": host_name(), "queues": ["celery"], "targets": [], "slots": 1}
    forerunner = liveness.register(connection, node="me", pid=gone.pid, **common)
    elsewhere = liveness.register(connection, node="me", pid=gone.pid, **{**common, "host": "another"})
    living = liveness.register(connection, node="me", pid=1, **common)
    neighbour = liveness.register(connection, node="you", pid=gone.pid, **common)
    mine, _ = begin_life(connection, node="me", pid=99, queues=["celery"], targets=[], slots=1)
    assert forerunner not in alive(connection)
    assert {elsewhere, living, neighbour, mine} == set(alive(connection))


def test_it_sweeps_marks_and_incarnations_of_the_dead_that_hold_nothing(connection: Connection, child: Child) -> None:
    liveness.enter(connection, child.incarnation, 5, ["celery"])
    liveness.declare_dead(connection, child.incarnation)
    connection.execute("UPDATE orchestrator.incarnations SET dead_at = dead_at - interval '2 hours'")
    connection.execute(
        "INSERT INTO orchestrator.work (run_id, lane, key, role, target, queue, due_at, fence, incarnation) "
        "VALUES ('r', 1, 'k', 'do', 't', 'celery', now(), 1, %s)",
        [child.incarnation],
    )
    liveness.sweep(connection)
    count = "SELECT (SELECT count(*) FROM orchestrator.drainers), (SELECT count(*) FROM orchestrator.incarnations)"
    assert connection.execute(count).fetchone() == (0, 1)
    connection.execute("DELETE FROM orchestrator.work")
    liveness.sweep(connection)
    assert connection.execute(count).fetchone() == (0, 0)
