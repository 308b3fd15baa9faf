"""Many short runs at once: three steps on one queue, on three queues, and rolled back."""

from __future__ import annotations

from benchmarks import floor
from benchmarks.report import Row
from benchmarks.scale import Scale
from benchmarks.stack import Side, Stack


def rate(side: Side, load: str, runs: int) -> float:
    """Return runs per second, from the first start to the last result in the client's hands."""
    return runs / float(side.client.ask(load, runs=runs)["seconds"])


def warm(side: Side, load: str, scale: Scale) -> None:
    """Wait until all workers take part, with caches and connections in place."""
    side.client.ask(load, runs=1)
    side.client.ask(load, runs=scale.of(300) + 2)


def three(stack: Stack, scale: Scale) -> list[Row]:
    """Runs of three steps from one client, next to a raw chain and to the bare database."""
    url, runs = stack.servers.database_url, scale.runs
    ours, bulks, raws, ones, eights = [], [], [], [], []
    with stack.engine() as engine, stack.raw() as raw:
        warm(engine, "three", scale)
        warm(raw, "three", scale)
        for _ in scale.each_round():
            ours.append(rate(engine, "three", runs))
            bulks.append(rate(engine, "in_bulk", runs))
            raws.append(rate(raw, "three", runs))
            ones.append(floor.sagas_per_second(url, runs, 1))
            eights.append(floor.sagas_per_second(url, runs, 8))
    case = f"{runs:,} runs of 3 steps"
    return [
        Row(case, "runs/s", ours, "raw chain", raws, least=4.0),
        Row(case, "runs/s", ours, "floor, 1 connection", ones),
        Row(case, "runs/s", ours, "floor, 8 connections", eights, least=0.3),
        Row("started in bulk", "runs/s", bulks, "raw chain", raws),
        Row("started in bulk", "runs/s", bulks, "floor, 8 connections", eights),
    ]


def one_worker(stack: Stack, scale: Scale) -> list[Row]:
    """Each step on a queue of its own, one worker for all queues."""
    return _queues(stack, scale, "on 3 queues, one worker", ["one,two,three"], 3.5)


def three_workers(stack: Stack, scale: Scale) -> list[Row]:
    """Each step on a queue of its own, each queue with a worker of its own."""
    return _queues(stack, scale, "on 3 queues, a worker each", ["one", "two", "three"], 1.5)


def _queues(stack: Stack, scale: Scale, case: str, workers: list[str], least: float) -> list[Row]:
    ours, raws = [], []
    with stack.engine(*workers) as engine, stack.raw(*workers) as raw:
        warm(engine, "queues", scale)
        warm(raw, "queues", scale)
        for _ in scale.each_round():
            ours.append(rate(engine, "queues", scale.runs))
            raws.append(rate(raw, "queues", scale.runs))
    return [Row(case, "runs/s", ours, "raw chain", raws, least=least)]


def rollbacks(stack: Stack, scale: Scale) -> list[Row]:
    """The third step is rejected and the first two are undone."""
    ours, forward, raws = [], [], []
    with stack.engine() as engine, stack.raw() as raw:
        warm(engine, "rollbacks", scale)
        warm(engine, "three", scale)
        warm(raw, "rollbacks", scale)
        for _ in scale.each_round():
            ours.append(rate(engine, "rollbacks", scale.runs))
            forward.append(rate(engine, "three", scale.runs))
            raws.append(rate(raw, "rollbacks", scale.runs))
    case = f"{scale.runs:,} rollbacks"
    return [
        Row(case, "runs/s", ours, "3 steps, engine", forward, least=0.6),
        Row(case, "runs/s", ours, "raw chain, errback", raws),
    ]
