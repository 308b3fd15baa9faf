"""Everything at once: children and pumps side by side, limits, and people who pause, resume and cancel."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from orchestrator import Effect, RetryPolicy, saga, step
from orchestrator.client import Client
from orchestrator.engine.pump import Pump
from orchestrator.machine.states import TERMINAL
from orchestrator.store import pauses
from orchestrator.store.connection import open_connection
from tests.acceptance.running import until
from tests.engine.stage import QUEUE, Child

AT_ONCE = RetryPolicy(initial_interval=timedelta(0), maximum_attempts=5)
GATES = 3
under_way: Counter[int] = Counter()
most: Counter[int] = Counter()
done: Counter[tuple[str, str]] = Counter()
lock = threading.Lock()


@step(concurrency=2, key=lambda n: n % GATES, rate_limit="500/s", retry=AT_ONCE, effect=Effect.NONE)
def limited(n: int) -> int:
    with lock:
        under_way[n % GATES] += 1
        most[n % GATES] = max(most[n % GATES], under_way[n % GATES])
    try:
        time.sleep(0.002)
        if n % 7 == 0 and step.current().attempt == 1:
            raise ConnectionError("no answer")
        with lock:
            done[step.current().run_id, step.current().key] += 1
    finally:
        with lock:
            under_way[n % GATES] -= 1
    return n


@saga.define(name="storm.a")
async def stormy(n: int) -> int:
    first = await saga.step(limited, n)
    await asyncio.sleep(0.01)
    await asyncio.gather(saga.step(limited, n + 1), saga.step(limited, n + 2))
    return first


@saga.define(name="storm.b")
async def calmer(n: int) -> int:
    return await saga.step(limited, n)


def test_all_of_it_ends_and_no_limit_is_exceeded(
    new_child: Callable[..., Child], client: Client, connection: Any, database_url: str
) -> None:
    over = threading.Event()
    failures: list[BaseException] = []

    def keep(doing: Callable[[], object]) -> threading.Thread:
        def loop() -> None:
            while not over.is_set():
                try:
                    if not doing():
                        over.wait(0.002)
                except BaseException as error:
                    failures.append(error)
                    return

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        return thread

    lines = [open_connection(database_url, name="pump") for _ in range(2)]
    threads = [keep(new_child().drain) for _ in range(3)]
    for line in lines:
        pump = Pump(lambda *_: None, lease=timedelta(hours=1), reservation=timedelta(milliseconds=100))
        threads.append(keep(lambda pump=pump, line=line: pump.run_once(line) and None))  # type: ignore[misc]
    chance = random.Random(7)
    ids = [client.start([stormy, calmer][n % 2], (n,), {}, {"task_id": f"r{n}", "queue": QUEUE}).id for n in range(60)]
    for _ in range(25):
        named: dict[str, Any] = chance.choice([{"saga": stormy}, {"saga": calmer}, {"queue": QUEUE}])
        chance.choice([client.pause, client.resume])(**named, by="ann")
        client.bulk(chance.choice(["pause", "resume"]), states=["running", "paused"], limit=5)
        over.wait(chance.random() * 0.1)
    client.bulk("cancel", saga=stormy, limit=3)
    for pause in pauses.listed(connection):
        client.resume(**{pause.kind: pause.name})

    def ended() -> bool:
        client.bulk("resume", states=["paused"])
        states = connection.execute("SELECT state FROM orchestrator.runs").fetchall()
        return bool(failures) or all(state in TERMINAL for (state,) in states)

    try:
        until(ended, "all runs have ended", 90.0)
    finally:
        over.set()
        for thread in threads:
            thread.join(30)
        for line in lines:
            line.close()
    assert failures == []
    states = Counter(client.outcome(run_id).state for run_id in ids)
    assert states["completed"] + states["cancelled"] == len(ids)
    assert set(done.values()) == {1}, "a step that succeeded is not done again"
    assert max(most.values()) <= 2
    assert connection.execute("SELECT count(*) FROM orchestrator.work").fetchone() == (0,)
    assert pauses.listed(connection) == []
