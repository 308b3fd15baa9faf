"""The cases, by name. A case takes the stack and a scale, and returns rows."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import crash, growth, large, shapes, throughput, usage
from benchmarks.report import Row
from benchmarks.scale import Scale
from benchmarks.stack import Stack

Case = Callable[[Stack, Scale], list[Row]]

CASES: dict[str, Case] = {
    "three": throughput.three,
    "one-worker": throughput.one_worker,
    "three-workers": throughput.three_workers,
    "latency": shapes.latency,
    "sequence": shapes.sequence,
    "parallel": shapes.parallel,
    "rollbacks": throughput.rollbacks,
    "crash": crash.crash,
    "usage": usage.usage,
    "full": large.full,
    "timers": large.timers,
    "map": large.mapped,
    "memory": usage.memory,
    "load": growth.load,
    "workers": growth.workers,
}
