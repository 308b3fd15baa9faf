"""All workers killed in the middle, and started again at once."""

from __future__ import annotations

from collections import Counter

from benchmarks.report import Row
from benchmarks.scale import Scale
from benchmarks.stack import Side, Stack, until


def crash(stack: Stack, scale: Scale) -> list[Row]:
    """What a kill costs: time, runs, and finished steps done again. One round: it takes its time."""
    runs = scale.of(200)
    with stack.engine() as engine:
        ours = _disturbed(engine, runs)
    with stack.raw() as raw:
        theirs = _disturbed(raw, runs)
    with stack.raw(acks_late=True) as late:
        latest = _disturbed(late, runs)
    case = f"SIGKILL, {runs:,} runs of 50 ms steps"
    return [
        Row(case, "s over undisturbed", [ours["over"]], "raw chain", [theirs["over"]], most=3.0, of_value=True),
        Row(case, "runs lost", [ours["lost"]], "raw chain", [theirs["lost"]], most=0, of_value=True),
        Row(case, "runs lost", [ours["lost"]], "raw, late ack", [latest["lost"]], most=0, of_value=True),
        Row(case, "finished steps repeated", [ours["again"]], "raw chain", [theirs["again"]], most=0, of_value=True),
    ]


def _disturbed(side: Side, runs: int) -> dict[str, float]:
    side.client.ask("crash", runs=2)
    undisturbed = side.client.ask("crash", runs=runs)["seconds"]
    side.effects.unlink()
    side.client.send("crash", runs=runs)
    until(lambda: len(side.marks()) >= runs * 3 // 2, "half of the steps are done", 120.0)
    for worker in side.workers:
        worker.kill()
    for worker in side.workers:
        worker.start()
    answer = side.client.receive()
    again = sum(times - 1 for times in Counter(side.marks()).values())
    return {"over": answer["seconds"] - undisturbed, "lost": answer["lost"], "again": again}
