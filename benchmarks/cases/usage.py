"""What a step costs besides time: CPU, write-ahead log, rows and bytes that stay, and a worker's memory."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import psycopg

from benchmarks.cases.throughput import warm
from benchmarks.report import Row
from benchmarks.scale import Scale
from benchmarks.stack import Side, Stack, cpu_seconds, memory_mb

_SIZES = """
SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float,
  (SELECT sum(pg_total_relation_size(c.oid))::float FROM pg_class c
    WHERE c.relnamespace = 'orchestrator'::regnamespace AND c.relkind = 'r'),
  (SELECT count(*) FROM orchestrator.runs) + (SELECT count(*) FROM orchestrator.journal)
    + (SELECT count(*) FROM orchestrator.work) + (SELECT count(*) FROM orchestrator.arrivals)
"""


@dataclass(frozen=True, slots=True)
class Meter:
    """What has been used so far."""

    client: float
    workers: float
    postgres: float
    valkey: float
    wal: float
    size: float
    rows: float

    @classmethod
    def read(cls, stack: Stack, side: Side) -> Meter:
        sizes = (0.0, 0.0, 0.0)
        if side.database_url:
            with psycopg.connect(side.database_url) as connection:
                sizes = connection.execute(_SIZES).fetchone() or sizes
        workers = sum(cpu_seconds(worker.pid) for worker in side.workers)
        postgres = cpu_seconds(stack.servers.postgres_pid) if side.database_url else 0.0
        return cls(
            cpu_seconds(side.client.pid), workers, postgres, cpu_seconds(stack.servers.valkey_pid), *map(float, sizes)
        )

    def since(self, earlier: Meter, steps: int) -> Meter:
        """Return what was used for each step."""
        return Meter(*((now - then) / steps for now, then in zip(astuple(self), astuple(earlier), strict=True)))

    @property
    def cpu_ms(self) -> float:
        return (self.client + self.workers + self.postgres + self.valkey) * 1000


def usage(stack: Stack, scale: Scale) -> list[Row]:
    """Per step: of runs of three steps from one client, of a hundred long ones, of one alone.

    A run's start and end are in all of them, as a third of each step, a hundredth and a thousandth.
    """
    with stack.engine() as engine, stack.raw() as raw:
        for side in (engine, raw):
            warm(side, "three", scale)
        steps, many = scale.of(1000), scale.of(100)
        alone = [_used(stack, engine, "sequence", steps, steps=steps) for _ in scale.each_round()]
        long = [_used(stack, engine, "long", many * many, runs=many, steps=many) for _ in scale.each_round()]
        ours = [_used(stack, engine, "three", scale.runs * 3, runs=scale.runs) for _ in scale.each_round()]
        bulks = [_used(stack, engine, "in_bulk", scale.runs * 3, runs=scale.runs) for _ in scale.each_round()]
        theirs = [_used(stack, raw, "three", scale.runs * 3, runs=scale.runs) for _ in scale.each_round()]
    parts = [(name, [getattr(used, name) * 1000 for used in ours], [getattr(used, name) * 1000 for used in theirs])
             for name in ("client", "workers", "postgres", "valkey")]  # fmt: skip
    cpu = Row("a step's CPU", "ms", [used.cpu_ms for used in ours], "raw chain", [used.cpu_ms for used in theirs],
              most=0.6, of_value=True)  # fmt: skip
    return [
        cpu,
        *(Row("a step's CPU", f"ms, {name}", mine, "raw chain", raws) for name, mine, raws in parts),
        Row("a step's CPU, started in bulk", "ms", [used.cpu_ms for used in bulks]),
        Row(f"of {many} runs with {many} steps", "ms", [used.cpu_ms for used in long], most=0.6),
        Row("of one run alone", "ms", [used.cpu_ms for used in alone]),
        Row(f"a step's WAL, {many} runs with {many} steps", "bytes", [used.wal for used in long], most=700),
        Row("of one run alone", "bytes", [used.wal for used in alone], most=700),
        Row("of runs with 3 steps", "bytes", [used.wal for used in ours]),
        Row("left by a step", "rows", [used.rows for used in ours]),
        Row("left by a step", "bytes", [used.size for used in ours]),
    ]


def _used(stack: Stack, side: Side, load: str, many: int, **options: int) -> Meter:
    """Return what each of `many` steps of a load used."""
    before = Meter.read(stack, side)
    side.client.ask(load, **options)
    return Meter.read(stack, side).since(before, many)


def memory(stack: Stack, scale: Scale) -> list[Row]:
    """A worker's memory (main, companion and children) when it is warm, after 30,000 runs, and after all."""
    runs, warmed = scale.of(100_000), scale.of(30_000)
    with stack.engine() as engine:
        warm(engine, "three", scale)
        _in_portions(engine, warmed)
        early = memory_mb(engine.workers[0].pid)
        _in_portions(engine, runs - warmed)
        late = memory_mb(engine.workers[0].pid)
    return [Row(f"worker's memory, {runs:,} runs", "MB", [late], f"after {warmed:,}", [early], most=1.05)]


def _in_portions(side: Side, runs: int) -> None:
    while runs > 0:
        side.client.ask("three", runs=min(runs, 1000))
        runs -= 1000
