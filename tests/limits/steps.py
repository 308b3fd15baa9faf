"""Steps with limits, that write down when they begin and end; and the sagas that ask for them."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from orchestrator import Effect, RetryPolicy, saga, step

AT_ONCE = RetryPolicy(initial_interval=timedelta(0), maximum_attempts=5)


@dataclass(frozen=True)
class Moment:
    """Something that a step did, by the clock of the machine on which all of these processes run."""

    what: str
    name: str
    at: float
    pid: int
    attempt: int


def note(what: str, name: str) -> None:
    line = {"what": what, "name": name, "at": time.time(), "pid": os.getpid(), "attempt": step.current().attempt}
    with (Path(os.environ["LIMITS_FOLDER"]) / "moments").open("a") as file:
        file.write(json.dumps(line) + "\n")


def moments(folder: Path) -> list[Moment]:
    """Return what the steps wrote down, in order of time."""
    path = folder / "moments"
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((Moment(**json.loads(line)) for line in lines), key=lambda moment: moment.at)


def most_at_once(found: list[Moment]) -> int:
    """Return how many steps were under way at once, at the most."""
    under_way = most = 0
    for moment in found:
        under_way += {"begin": 1, "end": -1}[moment.what]
        most = max(most, under_way)
    return most


@step(effect=Effect.NONE, concurrency=2, key="provider", retry=AT_ONCE)
def call(provider: str, seconds: float) -> None:
    note("begin", provider)
    time.sleep(seconds)
    note("end", provider)


@step(effect=Effect.NONE, concurrency=1, key=lambda name: name.partition("-")[0], retry=AT_ONCE)
def alone(name: str) -> None:
    note("begin", name)
    folder = Path(os.environ["LIMITS_FOLDER"])
    while "stuck" in name and step.current().attempt == 1 and not (folder / "go on").exists():
        time.sleep(0.01)
    note("end", name)


@step(effect=Effect.NONE, rate_limit="20/s", retry=AT_ONCE)
def ping(name: str) -> None:
    note("begin", name)


@step(effect=Effect.NONE, retry=AT_ONCE)
def tick(n: int) -> None:
    note("begin", f"{n}")


@saga.define(name="limits.calls")
async def calls(providers: list[str], seconds: float) -> None:
    await asyncio.gather(*(saga.step(call, provider, seconds) for provider in providers))


@saga.define(name="limits.single")
async def single(name: str) -> None:
    await saga.step(alone, name)


@saga.define(name="limits.pings")
async def pings(number: int) -> None:
    await asyncio.gather(*(saga.step(ping, f"{n}") for n in range(number)))


@saga.define(name="limits.mapped")
async def mapped(number: int) -> None:
    """Tick for each of so many items, twenty a second over all workers, in pages of thirty."""
    await saga.map(tick, range(number), concurrency=number, rate="20/s", page=30)
