"""How cost and latency go with the load, and what more workers bring: the engine alone, for docs/scale.md."""

from __future__ import annotations

from statistics import median

import psycopg

from benchmarks.cases.throughput import warm
from benchmarks.report import Row
from benchmarks.scale import Scale
from benchmarks.stack import Side, Stack, cpu_seconds

RATES = (5, 25, 50, 100, 200)
WORKERS = (1, 2, 3, 4)
_SECONDS = """
SELECT extract(epoch FROM finished_at - started_at)::float FROM orchestrator.runs WHERE id = ANY(%s) ORDER BY 1
"""


def load(stack: Stack, scale: Scale) -> list[Row]:
    """Runs of three steps at a steady rate: what a step costs, and how long a run takes by the database's clock."""
    rows: list[Row] = []
    with stack.engine() as engine:
        warm(engine, "three", scale)
        for rate in RATES:
            cpu: list[float] = []
            middle: list[float] = []
            late: list[float] = []
            for _ in scale.each_round():
                before = _cpu(stack, engine)
                runs = engine.client.ask("steadily", runs=scale.of(rate * 4), rate=rate)["runs"]
                cpu.append((_cpu(stack, engine) - before) / (3 * len(runs)) * 1000)
                took = _took(engine, runs)
                middle.append(median(took) * 1000)
                late.append(took[(len(took) - 1) * 99 // 100] * 1000)
            case = f"{rate} runs/s, steadily"
            rows += [Row(case, "CPU ms a step", cpu), Row(case, "ms, p50", middle), Row(case, "ms, p99", late)]
    return rows


def workers(stack: Stack, scale: Scale) -> list[Row]:
    """Runs of three steps that are started in bulk, for one to four workers of two children on one machine."""
    rows: list[Row] = []
    for count in WORKERS:
        with stack.engine(*["celery"] * count) as engine:
            warm(engine, "three", scale)
            rates: list[float] = []
            cpu: list[float] = []
            for _ in scale.each_round():
                before = _cpu(stack, engine)
                rates.append(scale.runs / float(engine.client.ask("in_bulk", runs=scale.runs)["seconds"]))
                cpu.append((_cpu(stack, engine) - before) / (3 * scale.runs) * 1000)
        case = f"{count} worker{'s' if count > 1 else ''}, started in bulk"
        rows += [Row(case, "runs/s", rates), Row(case, "CPU ms a step", cpu)]
    return rows


def _cpu(stack: Stack, side: Side) -> float:
    pids = (*side.pids(), stack.servers.postgres_pid, stack.servers.valkey_pid)
    return sum(cpu_seconds(pid) for pid in pids)


def _took(side: Side, runs: list[str]) -> list[float]:
    with psycopg.connect(side.database_url) as connection:
        return [seconds for (seconds,) in connection.execute(_SECONDS, [runs])]
