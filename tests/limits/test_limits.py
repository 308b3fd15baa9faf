"""Limits over real workers: two of them with two children each, and one that is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from orchestrator.client import Client
from orchestrator.saga import Saga
from tests.acceptance.running import Worker, until
from tests.limits.steps import Moment, calls, mapped, moments, most_at_once, pings, single


def end(client: Client, saga: Any, *args: Any) -> None:
    """Let a run come to its end."""
    client.start(saga, args, {}, {}).get(timeout=60)


def worker_of(pid: int, workers: list[Worker]) -> int:
    """Return the number of the worker whose child a process is."""
    mains = [worker.process.pid for worker in workers if worker.process is not None]
    return mains.index(psutil.Process(pid).ppid())


def by_name(found: list[Moment]) -> dict[str, list[Moment]]:
    """Return what the steps did, for each key of their limit."""
    names = {moment.name.partition("-")[0] for moment in found}
    return {name: [moment for moment in found if moment.name.partition("-")[0] == name] for name in names}


def test_never_more_than_that_many_run_at_once_for_each_key(
    client: Client, new_worker: Callable[[], Worker], tmp_path: Path
) -> None:
    for _ in range(2):
        new_worker()
    end(client, calls, ["a"] * 12 + ["b"] * 4, 0.15)
    found = moments(tmp_path)
    assert len({moment.pid for moment in found}) > 1, "several processes took part"
    assert {name: most_at_once(of_it) for name, of_it in by_name(found).items()} == {"a": 2, "b": 2}
    assert most_at_once(found) > 2, "one key does not wait for the other"


@pytest.mark.parametrize("saga", [pings, mapped], ids=["of a step", "of a map"])
def test_a_rate_over_two_workers_is_neither_exceeded_nor_wasted(
    client: Client, new_worker: Callable[[], Worker], tmp_path: Path, saga: Saga[Any, Any]
) -> None:
    workers = [new_worker() for _ in range(2)]
    end(client, saga, 80)
    found = moments(tmp_path)
    begun = [moment.at for moment in found]
    assert sorted(int(moment.name) for moment in found) == list(range(80)), "each began once"
    assert {worker_of(moment.pid, workers) for moment in found} == set(range(2)), "both workers took part"
    took = begun[-1] - begun[0]
    assert took > 79 / 20 - 0.5, "not faster than twenty a second"
    assert took < 5 * 79 / 20, "and not much slower, on a machine that does other things as well"
    # Over any time; up to two seconds' worth may have waited for a machine that stood still.
    counts = [sum(1 for at in begun if since <= at < since + 1.0) for since in begun]
    assert max(counts) <= 20 * (1 + 2), counts
    assert sorted(later - earlier for earlier, later in pairwise(begun))[len(begun) // 2] > 0.02


def test_who_is_killed_while_it_holds_the_only_slot_leaves_it_to_the_next(
    client: Client, new_worker: Callable[[], Worker], tmp_path: Path, sql_of: psycopg.Connection[Any]
) -> None:
    new_worker()
    first = client.start(single, ("x-stuck",), {}, {})
    victim = until(lambda: next(iter(moments(tmp_path)), None), "it has begun")
    second = client.start(single, ("x-next",), {}, {})
    until(
        lambda: sql_of.execute("SELECT count(*) FROM orchestrator.work WHERE gate IS NOT NULL").fetchone() == (2,),
        "the next one stands in line",
    )
    os.kill(victim.pid, signal.SIGKILL)
    second.get(timeout=30)
    first.get(timeout=30)
    told = [(moment.what, moment.name, moment.attempt) for moment in moments(tmp_path)]
    assert told[:3] == [("begin", "x-stuck", 1), ("begin", "x-next", 1), ("end", "x-next", 1)]
    assert told[3:] == [("begin", "x-stuck", 2), ("end", "x-stuck", 2)]
