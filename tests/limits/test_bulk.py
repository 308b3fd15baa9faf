"""One order for many runs: who is found, what is said first, what is done, who is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from orchestrator import Effect, RetryPolicy, bulk, saga, step
from orchestrator.client import Client
from orchestrator.errors import PayloadError, UsageError
from tests.engine.stage import QUEUE, Child, entries, state

ONCE = RetryPolicy(initial_interval=timedelta(0), maximum_attempts=1)
broken = True


@step(retry=ONCE)
def refund(n: int, result: str | None) -> None:
    if broken:
        raise ConnectionError("the provider is down")


@step(compensate=refund, retry=ONCE)
def charge(n: int) -> str:
    return "c"


@step(effect=Effect.PIVOT, retry=ONCE)
def settle(n: int) -> None: ...


@saga.define(name="bulk.fails")
async def fails(n: int) -> None:
    await saga.step(charge, n)
    raise ValueError("no")


@saga.define(name="bulk.sleeps")
async def sleeps(n: int) -> None:
    await saga.step(charge, n)
    await asyncio.sleep(3600)


@saga.define(name="bulk.settled")
async def settled(n: int) -> None:
    await saga.step(settle, n)
    await asyncio.sleep(3600)


@saga.define(name="bulk.child")
async def child_of_one(n: int) -> None:
    await saga.step(charge, n)


@saga.define(name="bulk.parent")
async def parent(n: int) -> None:
    await saga.child(child_of_one, n)
    await asyncio.sleep(3600)


@pytest.fixture(autouse=True)
def provider_is_down() -> Iterator[None]:
    global broken
    broken = True
    yield
    broken = True


@pytest.fixture
def many(child: Child, client: Client) -> None:
    """Three runs that are parked, two that sleep, one past its pivot, one that has not begun."""
    for number in range(3):
        client.start(fails, (number,), {}, {"task_id": f"fails-{number}", "queue": QUEUE, "tags": {"batch": number}})
    for number in range(2):
        client.start(sleeps, (number,), {}, {"task_id": f"sleeps-{number}", "queue": QUEUE, "tags": {"who": "ann"}})
    client.start(settled, (1,), {}, {"task_id": "settled", "queue": QUEUE})
    client.start(sleeps, (1,), {}, {"task_id": "later", "queue": QUEUE, "countdown": 3600})
    while child.drain():
        pass


def test_a_dry_run_says_what_would_be_done_and_does_nothing(many: None, client: Client, connection: Any) -> None:
    before = connection.execute("SELECT id, state, position FROM orchestrator.runs ORDER BY id").fetchall()
    effects = client.bulk("cancel", everything=True, dry_run=True)
    assert effects.found == {
        ("bulk.fails", "parked"): 3,
        ("bulk.sleeps", "running"): 2,
        ("bulk.sleeps", "pending"): 1,
        ("bulk.settled", "running"): 1,
    }
    assert (effects.total, effects.told, effects.refused) == (7, 6, {"past its point of no return": 1})
    assert effects.examples == ["fails-0", "fails-1", "fails-2", "sleeps-0", "sleeps-1"]
    assert connection.execute("SELECT id, state, position FROM orchestrator.runs ORDER BY id").fetchall() == before
    assert connection.execute("SELECT count(*) FROM orchestrator.arrivals").fetchone() == (0,)


def test_a_step_is_found_by_itself_by_its_name_and_by_the_last_part_of_it(many: None, client: Client) -> None:
    told = [client.bulk("retry", step=meant, dry_run=True).told for meant in (charge, charge.name, "charge")]
    assert told == [3, 3, 3]


def test_all_parked_undos_of_a_step_are_tried_again(many: None, child: Child, client: Client, connection: Any) -> None:
    global broken
    broken = False
    effects = client.bulk("retry", saga=fails, step="charge", by="ann", reason="the provider is back")
    assert (effects.told, effects.refused) == (3, {})
    while child.drain():
        pass
    assert {state(connection, f"fails-{number}") for number in range(3)} == {"compensated"}
    [told] = [entry for entry in entries(connection, "fails-1") if entry["e"] == "operator"]
    assert (told["action"], told["by"], told["reason"]) == ("retry", "ann", "the provider is back")
    assert client.bulk("retry", saga=fails).total == 0


def test_pages_are_bounded_and_all_of_them_are_told(
    many: None, child: Child, client: Client, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "_PAGE", 2)
    rings: list[int] = []
    monkeypatch.setattr(Client, "ring_for", lambda self, connection, queue, rows: rings.append(rows))
    assert client.bulk("terminate", everything=True).told == 7
    assert rings == [2, 2, 2, 1]
    while child.drain():
        pass
    assert connection.execute("SELECT DISTINCT state FROM orchestrator.runs").fetchall() == [("terminated",)]


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ({"saga": "bulk.sleeps"}, ["sleeps-0", "sleeps-1", "later"]),
        ({"states": ["parked"]}, ["fails-0", "fails-1", "fails-2"]),
        ({"states": ["pending", "parked"], "limit": 2}, ["fails-0", "fails-1"]),
        ({"tags": {"who": "ann"}}, ["sleeps-0", "sleeps-1"]),
        ({"tags": {"batch": 1}}, ["fails-1"]),
        ({"tags": {"batch": "1", "who": "ann"}}, []),
        ({"step": charge.name}, ["fails-0", "fails-1", "fails-2"]),
        ({"step": "harge"}, []),
        ({"step": "charge", "limit": 1}, ["fails-0"]),
    ],
)
def test_a_filter_finds_what_it_says(many: None, client: Client, chosen: dict[str, Any], found: list[str]) -> None:
    effects = client.bulk("terminate", dry_run=True, **chosen)
    assert effects.examples == found


def test_instants_bound_the_start(many: None, client: Client, connection: Any) -> None:
    (start,) = connection.execute("SELECT started_at FROM orchestrator.runs WHERE id = 'sleeps-1'").fetchone()
    before = client.bulk("terminate", dry_run=True, saga=sleeps, started_before=start)
    after = client.bulk("terminate", dry_run=True, saga=sleeps, started_after=start)
    assert (before.examples, after.examples) == (["sleeps-0"], ["sleeps-1", "later"])


def test_many_are_paused_and_resumed(many: None, child: Child, client: Client, connection: Any) -> None:
    assert client.bulk("pause", saga=sleeps).told == 3
    child.drain()
    assert {state(connection, run_id) for run_id in ("sleeps-0", "sleeps-1", "later")} == {"paused"}
    assert client.bulk("resume", saga=sleeps, states=["paused"]).told == 3
    child.drain()
    assert [state(connection, run_id) for run_id in ("sleeps-0", "sleeps-1", "later")] == ["running"] * 2 + ["pending"]
    assert client.bulk("resume", saga=sleeps).refused == {"not paused": 3}


def test_a_run_whose_undoing_is_parked_is_not_said_to_be_paused(many: None, client: Client, connection: Any) -> None:
    with pytest.raises(UsageError, match="is being undone"):
        client.operate("fails-0", "pause")
    effects = client.bulk("pause", saga=fails)
    assert (effects.told, effects.refused) == (0, {"being undone": 3})


@pytest.mark.parametrize("action", ["cancel", "pause"])
def test_a_child_that_is_done_is_not_said_to_be_told(
    child: Child, client: Client, connection: Any, action: bulk.Action
) -> None:
    client.start(parent, (1,), {}, {"task_id": "above", "queue": QUEUE})
    child.drain()
    effects = client.bulk(action, saga="bulk.child")
    assert (effects.total, effects.told) == (1, 0)
    assert dict(effects.refused) == {"done, and completed or undone with the run above only": 1}
    assert client.bulk(action, saga="bulk.parent").told == 1


def test_runs_that_are_paused_with_their_saga_are_not_said_to_go_on(
    many: None, child: Child, client: Client, connection: Any
) -> None:
    client.pause(saga=sleeps)
    child.drain()
    assert state(connection, "sleeps-0") == "paused"
    effects = client.bulk("resume", states=["paused"])
    assert (effects.told, effects.refused) == (0, {"paused with its saga: resume that": 2})
    client.resume(saga=sleeps)
    child.drain()
    assert state(connection, "sleeps-0") == "running"


def test_what_is_parked_is_skipped(many: None, child: Child, client: Client, connection: Any) -> None:
    effects = client.bulk("skip", everything=True)
    assert (effects.told, effects.refused) == (3, {"not parked": 4})
    child.drain()
    assert state(connection, "fails-0") == "failed"


@pytest.mark.parametrize(
    ("action", "chosen", "said"),
    [
        ("cancel", {}, "would take every run"),
        ("resolve", {"saga": "x"}, "cannot be ordered for many"),
        ("cancel", {"colour": "red"}, "colour"),
        ("cancel", {"states": "parked"}, "states= lists some of .*parked"),
        ("cancel", {"states": ["completed"]}, "states= lists some of .*parked"),
        ("cancel", {"started_after": "yesterday"}, "started_after must be an aware datetime"),
    ],
)
def test_what_cannot_be_meant_is_refused(client: Client, action: str, chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        client.bulk(action, **chosen)


def test_a_reason_that_cannot_be_stored_is_refused(client: Client) -> None:
    with pytest.raises(PayloadError):
        client.bulk("cancel", saga="x", reason="\0")
