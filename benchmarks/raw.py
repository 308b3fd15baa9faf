"""The other side: the same work as chains, groups and chords of plain Celery tasks, with a result backend."""

from __future__ import annotations

import os
import time
import uuid

from celery import Celery, chain, chord, exceptions, group
from celery.result import AsyncResult

from benchmarks.client import clocked, effect, waited

app = Celery("benchmarks.raw", broker=os.environ["BENCH_BROKER_URL"], backend=os.environ["BENCH_RESULT_URL"])
app.conf.task_acks_late = bool(os.environ.get("BENCH_ACKS_LATE"))
app.conf.task_reject_on_worker_lost = app.conf.task_acks_late
PATIENCE_S = 60.0
STUCK_S = 10.0  # a killed worker is back after about two


@app.task
def noop() -> None: ...


@app.task(queue="one")
def first() -> None: ...


@app.task(queue="two")
def second() -> None: ...


@app.task(queue="three")
def third() -> None: ...


@app.task
def undo() -> None: ...


@app.task
def refuse() -> None:
    raise ValueError("no")


@app.task
def slow(run: int, number: int) -> None:
    time.sleep(0.05)
    effect(run, number)


def three(runs: int) -> dict[str, float]:
    with clocked() as clock:
        for result in [chain(noop.si(), noop.si(), noop.si()).delay() for _ in range(runs)]:
            _get(result)
    return clock


def queues(runs: int) -> dict[str, float]:
    with clocked() as clock:
        for result in [chain(first.si(), second.si(), third.si()).delay() for _ in range(runs)]:
            _get(result)
    return clock


def one_at_a_time(runs: int) -> dict[str, list[float]]:
    def one() -> None:
        _get(chain(noop.si(), noop.si(), noop.si()).delay())

    return {"each": [waited(one) for _ in range(runs)]}


def sequence(steps: int) -> dict[str, float]:
    with clocked() as clock:
        _get(chain(*(noop.si() for _ in range(steps))).delay())
    return clock


def parallel(steps: int) -> dict[str, float]:
    with clocked() as clock:
        _get(chord(group(noop.si() for _ in range(steps)), noop.si()).delay())
    return clock


def rollbacks(runs: int) -> dict[str, float]:
    """What comes nearest: an error callback that undoes two steps; a crash would lose it."""
    with clocked() as clock:
        for undone in [_start_rollback() for _ in range(runs)]:
            _get(app.AsyncResult(undone))
    return clock


def _start_rollback() -> str:
    undone = str(uuid.uuid4())
    undoing = chain(undo.si(), undo.si().set(task_id=undone))
    chain(noop.si(), noop.si(), refuse.si().on_error(undoing)).delay()
    return undone


def crash(runs: int) -> dict[str, float]:
    """Wait until all are done, or until nothing has moved for so long that nothing will."""
    began = moved = time.monotonic()
    waiting = [chain(*(slow.si(run, number) for number in range(3))).delay() for run in range(runs)]
    while waiting and time.monotonic() - moved < STUCK_S:
        open_still = [result for result in waiting if not result.ready()]
        if len(open_still) < len(waiting):
            waiting, moved = open_still, time.monotonic()
        time.sleep(0.1)
    return {"seconds": moved - began, "lost": len(waiting)}


def _get(result: AsyncResult) -> None:
    """Wait for a result; ask again every 5 s, since one `get` has been seen to wait in vain (why is not known)."""
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        try:
            result.get(timeout=5.0)
            return
        except exceptions.TimeoutError:
            if time.monotonic() > give_up_at:
                raise


LOADS = {load.__name__: load for load in (three, queues, one_at_a_time, sequence, parallel, rollbacks, crash)}
