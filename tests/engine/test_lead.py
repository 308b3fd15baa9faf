"""One child takes all that comes in short waves, and the others of its worker stand by as long as it keeps up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchestrator import Effect, saga, step
from orchestrator.engine import drain, lead
from orchestrator.engine.advance import _Left
from orchestrator.engine.lead import SIZE, Lead
from orchestrator.store.connection import Connection
from tests.engine.stage import Child, start, states

OTHER = 1_000_000  # a child that is not there


@step(effect=Effect.NONE)
def short(thing: str) -> str:
    return thing


@saga.define
async def quick(thing: str) -> None:
    await saga.step(short, thing)
    await saga.step(short, thing)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> bytearray:
    """What the children of a worker share; a promise is as good as for ever, for a machine may be busy.

    Four runs at once are many here.
    """
    monkeypatch.setattr(lead, "_LONGEST_S", 1000.0)
    monkeypatch.setattr(drain, "_LEAD_S", 1000.0)
    monkeypatch.setattr(drain, "_LEADS_FROM", 4)
    return bytearray(SIZE)


@pytest.fixture
def other(shared: bytearray) -> Lead:
    return Lead(shared, OTHER)


@pytest.fixture
def child(new_child: Callable[..., Child], shared: bytearray) -> Child:
    child = new_child()
    child.waited_for = False
    child.drainer._worker.lead = Lead(shared, child.number)
    child.drainer._attempts.recent_s[short.name] = 0.001
    return child


def promises(child: Child, other: Lead) -> list[bool]:
    """Whether the child has promised to look again, at each step that it runs."""
    seen: list[bool] = []
    child.runner.before = lambda taken: seen.append(other.others_s() > 0.0)
    return seen


def start_many(connection: Connection, number: int) -> None:
    for n in range(number):
        start(connection, quick, "a", run_id=f"{n}")


def test_who_took_several_at_once_and_all_that_there_were_promises_to_look_again(
    child: Child, other: Lead, connection: Connection
) -> None:
    seen = promises(child, other)
    start_many(connection, 4)
    child.drain()
    assert seen == [True] * 8


@pytest.mark.parametrize("number", [1, 3])
def test_who_took_few_promises_nothing(child: Child, other: Lead, connection: Connection, number: int) -> None:
    """Another child that looks finds what comes sooner."""
    seen = promises(child, other)
    start_many(connection, number)
    child.drain()
    assert not any(seen)


def test_who_cannot_keep_up_promises_nothing(
    new_child: Callable[..., Child], shared: bytearray, other: Lead, connection: Connection
) -> None:
    child = new_child(drain_steps=4)  # others wait for it
    child.drainer._worker.lead = Lead(shared, child.number)
    child.drainer._attempts.recent_s[short.name] = 0.001
    seen = promises(child, other)
    start_many(connection, 5)
    child.drain()
    assert seen and not any(seen)


def test_who_has_more_in_hand_than_takes_a_moment_promises_nothing(
    child: Child, other: Lead, connection: Connection
) -> None:
    child.drainer._attempts.recent_s[short.name] = 0.009
    child.drainer._attempts._last_s[short.name] = 0.009
    seen = promises(child, other)
    start_many(connection, 4)
    child.drain()
    assert not seen[0]


def test_who_goes_on_with_its_runs_for_long_promises_nothing_more(
    child: Child, other: Lead, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks for nothing meanwhile."""
    seen: list[bool] = []

    def let_time_pass(taken: Any) -> None:
        seen.append(other.others_s() > 0.0)
        monkeypatch.setattr(drain, "_LEAD_S", 0.0)

    child.runner.before = let_time_pass
    start_many(connection, 4)
    child.drain()
    assert seen == [True] * 4 + [False] * 4


def test_a_child_stands_by_while_another_one_takes_all_that_comes(
    child: Child, other: Lead, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    def pause(seconds: float) -> None:
        row = connection.execute("SELECT count(*) FROM orchestrator.work WHERE reserved_at IS NOT NULL").fetchone()
        begun.append(row[0] if row else -1)
        if len(begun) == 3:
            other.release()

    monkeypatch.setattr("orchestrator.engine.drain.time.sleep", pause)
    other.promise(500.0)
    start_many(connection, 1)
    child.drain()
    assert begun[:3] == [0, 0, 0]
    assert states(connection) == {"0": "completed"}


def test_a_child_does_not_stand_by_for_a_promise_that_is_over(
    child: Child, other: Lead, connection: Connection
) -> None:
    other.promise(-1.0)
    start_many(connection, 1)
    assert child.drain() == 2


def test_a_child_that_stands_by_ends_with_its_worker(
    child: Child, other: Lead, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(seconds: float) -> None:
        child.stopping = True

    monkeypatch.setattr("orchestrator.engine.drain.time.sleep", stop)
    other.promise(500.0)
    start_many(connection, 1)
    assert child.drain() == 0


def test_a_child_that_stands_by_makes_room_for_another_task_at_once(
    child: Child, other: Lead, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[float] = []

    def let_one_wait(seconds: float) -> None:
        paused.append(seconds)
        child.waited_for = True

    monkeypatch.setattr("orchestrator.engine.drain.time.sleep", let_one_wait)
    other.promise(500.0)
    child.drain()
    assert len(paused) == 1


def test_who_has_left_an_outcome_for_the_process_that_drives_its_run_sees_to_that_instead_of_standing_by(
    child: Child, other: Lead, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(connection, quick, "a")
    child.drain()
    advancer = child.drainer._session.advancer
    assert advancer is not None
    advancer._elsewhere["run"] = _Left(since=0.0)
    paused: list[float] = []
    monkeypatch.setattr(
        "orchestrator.engine.drain.time.sleep", lambda seconds: (paused.append(seconds), other.release())
    )
    other.promise(500.0)
    child.drain()
    assert not advancer.has_left
    assert drain._STAND_BY_S not in paused


def test_nobody_stands_by_for_himself_or_for_what_makes_no_sense(shared: bytearray) -> None:
    one, two = Lead(shared, 1), Lead(shared, 2)
    assert (one.others_s(), two.others_s()) == (0.0, 0.0)
    one.promise(500.0)
    assert one.others_s() == 0.0 < two.others_s() <= 500.0
    two.release()
    assert two.others_s() > 0.0, "it is not his"
    one.promise(5000.0)
    assert two.others_s() == 0.0, "longer than anybody promises: it was read while it was written"
