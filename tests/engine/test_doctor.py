"""The doctor's judgement: each finding from the facts that call for it, and none from healthy ones."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from orchestrator.engine.doctor import EXIT_CODE, Broker, Facts, Level, Queue, judge, lost_doorbells
from orchestrator.engine.schedules import SENT
from orchestrator.store.doctor import Living, Old, Server, Size, Stuck, Waiting
from orchestrator.store.pauses import Pause

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SECOND, HOUR = timedelta(seconds=1), timedelta(hours=1)
ON = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on", "autovacuum": "on", "track_counts": "on"}
SERVER = Server("17.2", NOW, False, ON, 10, 100)
BROKER = Broker(url="redis://here", queues={"q": Queue(0)})
WORKER = Living("w@here", ["q"], 4, SECOND)
HEALTHY = Facts(
    server=SERVER, host_clock=NOW, living=[WORKER], stuck=Stuck(0, 0, 0, None, 0, 0), broker=BROKER,
    named_queues=frozenset({"q"}), schedules=[("nightly", None)], leader_unseen=SECOND,
    sizes=[Size("work", 10, 100, 1 << 20)], oldest=Old(SECOND, 1, "app", "active"),
)  # fmt: skip


def but(**changes: Any) -> Facts:
    return dataclasses.replace(HEALTHY, **changes)


def server(**changes: Any) -> Facts:
    return but(server=dataclasses.replace(SERVER, **changes))


def broker(**changes: Any) -> Facts:
    return but(broker=dataclasses.replace(BROKER, **changes))


def due(oldest: timedelta = HOUR, *, queue: bool = True, target: bool = True) -> list[Waiting]:
    return [Waiting("q", "saga@1", 3, oldest, queue, target)]


def stuck(*values: Any) -> Facts:
    return but(stuck=Stuck(*values))


def test_nothing_is_found_where_all_is_well() -> None:
    assert judge(HEALTHY) == []
    assert judge(but(waiting=due(SECOND))) == [] and lost_doorbells(but(waiting=due(SECOND))) == []


@pytest.mark.parametrize(
    ("code", "level", "facts"),
    [
        ("postgres-version", Level.BROKEN, server(version="13.9")),
        ("postgres-version", Level.ADVICE, server(version="19beta1")),
        ("postgres-version", Level.ADVICE, server(version="19rc1")),
        ("postgres-version", Level.ADVICE, server(version="20devel")),
        ("standby", Level.BROKEN, server(in_recovery=True)),
        ("fsync", Level.BROKEN, server(settings={**ON, "fsync": "off"})),
        ("full-page-writes", Level.BROKEN, server(settings={**ON, "full_page_writes": "off"})),
        ("synchronous-commit", Level.BROKEN, server(settings={**ON, "synchronous_commit": "off"})),
        ("autovacuum", Level.WARNING, server(settings={**ON, "autovacuum": "off"})),
        ("track-counts", Level.WARNING, server(settings={**ON, "track_counts": "off"})),
        ("connections", Level.WARNING, server(connections=95)),
        ("clocks", Level.WARNING, but(host_clock=NOW - timedelta(seconds=8))),
        ("old-transaction", Level.WARNING, but(oldest=Old(HOUR, 7, "", "idle in transaction"))),
        ("bloat-work", Level.WARNING, but(sizes=[Size("work", 10, 60_000, 1 << 30)])),
        ("no-worker", Level.WARNING, but(living=[])),
        ("schedule-ahead", Level.WARNING, but(ahead=[("nightly", NOW + HOUR)])),
        ("expired-lease", Level.WARNING, but(living=[WORKER, Living("dead@here", ["q"], 4, HOUR)])),
        ("idle-queue", Level.ADVICE, but(named_queues=frozenset({"q", "other"}))),
        ("unserved-queue", Level.WARNING, but(waiting=due(queue=False, target=False))),
        ("unknown-target", Level.WARNING, but(waiting=due(target=False))),
        ("unclaimed", Level.WARNING, but(waiting=due())),
        ("expired-attempts", Level.WARNING, stuck(2, 0, 0, None, 0, 0)),
        ("unread", Level.WARNING, stuck(0, 2, 0, None, 0, 0)),
        ("parked", Level.WARNING, stuck(0, 0, 2, HOUR, 0, 0)),
        ("paused", Level.ADVICE, stuck(0, 0, 0, None, 2, 0)),
        ("paused-saga", Level.ADVICE, but(pauses=[Pause("saga", "checkout", "ann", "a bad deploy", NOW, False)])),
        ("paused-queue", Level.ADVICE, but(pauses=[Pause("queue", "q", "ann", "", NOW, False)])),
        ("unsent", Level.WARNING, stuck(0, 0, 0, None, 0, 2)),
        ("broker", Level.BROKEN, broker(error="refused")),
        ("eviction", Level.WARNING, broker(evicts="allkeys-lru")),
        ("visibility-timeout", Level.ADVICE, broker(visibility_timeout_s=30.0)),
        ("prefetch", Level.ADVICE, broker(prefetch=4)),
        ("result-backend", Level.ADVICE, broker(result_backend="redis")),
        ("no-beat", Level.WARNING, but(leader_unseen=None)),
        ("no-beat", Level.WARNING, but(leader_unseen=HOUR)),
        ("schedule", Level.WARNING, but(schedules=[("nightly", "there is no time zone")])),
        ("schedule", Level.ADVICE, but(schedules=[("nightly", f"task x is not registered here; {SENT}")])),
    ],
)
def test_each_fault_is_found_alone_and_says_what_it_means_and_what_to_do(code: str, level: Level, facts: Facts) -> None:
    (found,) = judge(facts)
    assert (found.code, found.level) == (code, level)
    assert found.what and found.means and found.do


def test_what_cannot_move_at_all_is_worse_and_the_worst_comes_first() -> None:
    found = judge(
        but(living=[], waiting=due(queue=False, target=False), broker=dataclasses.replace(BROKER, prefetch=4))
    )
    assert [each.code for each in found] == ["no-worker", "unserved-queue", "prefetch"]
    assert [EXIT_CODE[each.level] for each in found] == [2, 1, 0]


def test_only_work_that_a_living_worker_could_take_is_rung_for() -> None:
    assert lost_doorbells(but(waiting=due())) == ["q"]
    assert lost_doorbells(but(waiting=due(target=False))) == []


def test_one_piece_of_work_that_any_worker_may_take_is_told_as_that() -> None:
    """It was "1 pieces of work on queue q for *"."""
    (found,) = judge(but(waiting=[dataclasses.replace(each, target="*", rows=1) for each in due()]))
    assert found.what.startswith("due: 1 piece of work on queue q for a worker with whatever code, ")


def test_what_a_queue_holds_is_told_with_the_work_that_lies() -> None:
    (found,) = judge(but(waiting=due(), broker=dataclasses.replace(BROKER, queues={"q": Queue(17)})))
    assert "holds 17 messages" in found.means


def test_of_one_thing_it_speaks_in_the_singular() -> None:
    facts = but(
        living=[], waiting=[Waiting("q", "saga@1", 1, HOUR, False, False)], stuck=Stuck(1, 1, 1, HOUR, 1, 1),
        leader_unseen=None,
    )  # fmt: skip
    told = {each.code: f"{each.what}; {each.means}" for each in judge(facts)}
    assert "1 piece of work is due" in told["no-worker"] and "due: 1 piece of work on queue q" in told["unserved-queue"]
    assert told["parked"].startswith("1 run is parked") and told["paused"].startswith("1 run is paused")
    assert told["expired-attempts"].startswith("1 attempt is") and told["unread"].startswith("1 arrival is")
    assert told["unsent"].startswith("1 message of a schedule is") and "there is 1 schedule and" in told["no-beat"]
