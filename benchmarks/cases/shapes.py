"""One run at a time: three steps, a long sequence, a wide fan."""

from __future__ import annotations

from statistics import quantiles

import psycopg

from benchmarks.report import Row
from benchmarks.scale import Scale
from benchmarks.stack import Side, Stack

_INSTANTS = "SELECT extract(epoch FROM at)::float FROM orchestrator.journal WHERE run_id = %s ORDER BY seq"


def latency(stack: Stack, scale: Scale) -> list[Row]:
    """From the start of a run of three steps to its result, one at a time."""
    with stack.engine() as engine, stack.raw() as raw:
        measured: dict[Side, list[tuple[float, float]]] = {engine: [], raw: []}
        for side in measured:
            side.client.ask("one_at_a_time", runs=scale.of(30) + 2)
        for _ in scale.each_round():
            for side, found in measured.items():
                found.append(_p50_p99(side.client.ask("one_at_a_time", runs=scale.of(200) + 2)["each"]))
        ours, theirs = measured.values()
    case = "start to result"
    return [
        Row(case, "ms, p50", [p50 for p50, _ in ours], "raw chain", [p50 for p50, _ in theirs], most=1.0),
        Row(case, "ms, p99", [p99 for _, p99 in ours], "raw chain", [p99 for _, p99 in theirs], most=1.0),
    ]


def _p50_p99(seconds: list[float]) -> tuple[float, float]:
    cuts = quantiles(seconds, n=100, method="inclusive")
    return cuts[49] * 1000, cuts[98] * 1000


def sequence(stack: Stack, scale: Scale) -> list[Row]:
    """One run of many steps: how long it takes, and whether a step costs more the longer the run is."""
    ours, raws, growth = [], [], []
    steps = scale.runs
    with stack.engine() as engine, stack.raw() as raw:
        for side in (engine, raw):
            side.client.ask("sequence", steps=scale.of(100) + 1)
        for _ in scale.each_round():
            answer = engine.client.ask("sequence", steps=steps)
            ours.append(answer["seconds"])
            growth.append(_growth(engine.database_url, answer["run"]))
            raws.append(raw.client.ask("sequence", steps=steps)["seconds"])
    case = f"1 run of {steps:,} steps"
    return [
        Row(case, "s", ours, "raw chain", raws, most=0.116),  # 1 s where the raw chain needs 8.6
        Row(case, "last tenth by first", growth, most=1.2),
    ]


def _growth(url: str, run: str) -> float:
    with psycopg.connect(url) as connection:
        instants = [row[0] for row in connection.execute(_INSTANTS, [run])]
    tenth = max(1, len(instants) // 10)
    return float((instants[-1] - instants[-1 - tenth]) / max(instants[tenth] - instants[0], 1e-6))


def parallel(stack: Stack, scale: Scale) -> list[Row]:
    """One run of many steps at once, next to a group with a chord."""
    ours, raws = [], []
    with stack.engine() as engine, stack.raw() as raw:
        for side in (engine, raw):
            side.client.ask("parallel", steps=scale.of(100) + 2)
        for _ in scale.each_round():
            ours.append(engine.client.ask("parallel", steps=scale.runs)["seconds"])
            raws.append(raw.client.ask("parallel", steps=scale.runs)["seconds"])
    return [Row(f"1 run, {scale.runs:,} parallel steps", "s", ours, "group + chord", raws, most=0.33)]
