"""What has to go wrong for the rarer boundaries to be reached: deaths, lost leases, workers without code.

Owns the tricks that a story plays before its runs are simply worked off.  A trick may be cut short anywhere.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from orchestrator import failpoints
from orchestrator.engine.pump import Pump
from orchestrator.machine.journal import Cancel, Operate, encode
from orchestrator.step import registry as steps
from orchestrator.store import liveness, runs
from orchestrator.store.connection import open_connection
from tests.crash.driver import Day, Worker
from tests.crash.workload import in_a_row
from tests.engine.stage import QUEUE, script_of

Trick = Callable[[Day], None]


def die_in_a_step(day: Day, run_id: str, node: str) -> None:
    """Let another process begin a step of a run, and die in it."""
    child = os.fork()
    if child == 0:
        failpoints.arm({})
        day.client.pool.close()
        victim = Worker(day.url, node)
        victim.runner.after = lambda taken: os._exit(9)
        day.start(run_id)
        victim.drain()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9


def buried(day: Day) -> None:
    """The worker before this one on the same node is gone, and so is one of another node; this pump lives to sweep."""
    day.pump = Pump(lambda queue, times: None, lease=timedelta(seconds=0.4), reservation=timedelta(milliseconds=100))
    day.rounds = 60
    die_in_a_step(day, "judged", "elsewhere")
    die_in_a_step(day, "buried", "main")
    day.worker("main")


def overtake(day: Day, slow: Worker, meanwhile: Callable[[], object]) -> None:
    """Let `slow` lose its lease once it has begun a step, and the rest of the world go on before its function runs."""

    def before(taken: Any) -> None:
        slow.runner.before = lambda taken: None
        with open_connection(day.url, name="pump") as pump:
            liveness.declare_dead(pump, slow.incarnation)
            pump.execute("UPDATE orchestrator.work SET deadline_at = orchestrator.now() WHERE fence IS NOT NULL")
            liveness.give_back_dead(pump)
        slow.reborn()
        meanwhile()

    slow.runner.before = before


def overtaken(day: Day) -> None:
    """Attempts succeed that were given to others meanwhile: while their run goes on, and after its end."""
    main, slow = day.worker("main"), day.worker("slow")

    def cancel() -> None:
        day.leave("corrected", Cancel("ann", ""))
        day.tolerant(main.drain)

    for run_id, meanwhile in ("late", main.drain), ("rewritten", main.drain), ("corrected", cancel):
        overtake(day, slow, functools.partial(day.tolerant, meanwhile))
        day.start(run_id)
        day.tolerant(slow.drain)
    slow.runner.before = lambda taken: None


def met(day: Day) -> None:
    """A worker that has the steps of a run and not its saga leaves their outcomes, and passes the run's turns on."""
    main, stranger = day.worker("main"), day.worker("stranger")
    known, stranger.targets[:] = list(stranger.targets), list(steps.steps)
    stranger.scripts = lambda name, version: None

    def meet(taken: Any) -> None:
        main.runner.before = lambda taken: None
        day.tolerant(stranger.drain)

    main.runner.before = meet
    day.start("met")
    day.tolerant(main.drain)
    day.start("passed on")
    day.tolerant(main.drain)
    for parked in runs.outcomes(day.look, ["passed on"])["passed on"].parked:
        day.leave("passed on", Operate("resolve", parked["key"], "ann", "", "it did"))
    day.tolerant(stranger.drain)
    stranger.scripts, stranger.targets[:] = script_of, known


def stopped(day: Day) -> None:
    """A worker is told to stop between reserving turns and taking them; a turn fails, and nobody knows why."""
    main, stopper = day.worker("main"), day.worker("stopper")
    asked = iter([False])
    day.start("stopped")
    stopper.drainer._worker.stopping = lambda: next(asked, True)
    day.tolerant(stopper.drain)
    stopper.drainer._worker.stopping = lambda: False

    def fail(name: str, version: int) -> Any:
        raise RuntimeError("nobody knows why")

    day.tolerant(main.drain)
    main.scripts = fail
    day.start("postponed")
    day.tolerant(main.drain)
    main.scripts = script_of


def hanging(day: Day) -> None:
    """Of steps that used to be short one hangs: what has ended before it and what waits behind it is left to others."""
    main = day.worker("main")
    main.drainer._attempts.recent_s.update(dict.fromkeys(steps.steps, 0.001))

    def hang(taken: Any) -> None:
        hangs = main.runner.contexts[-1].hangs
        if taken.run_id == "hangs" and hangs is not None:
            main.runner.before = lambda taken: None
            hangs()

    main.runner.before = hang
    for run_id in day.planned:
        day.start(run_id)
    day.tolerant(main.drain)


def forgotten(day: Day) -> None:
    """Whoever left something for a run died before he could see to it; a run that has ended hears of a cancel."""
    main = day.worker("main")
    for run_id in ("forgotten", "ignored"):
        day.start(run_id)
    for _ in range(2):
        day.tolerant(main.drain)
    cancel = Cancel("ann", "")
    day.look.execute(
        "INSERT INTO orchestrator.arrivals (run_id, at, arrival) "
        "VALUES ('forgotten', orchestrator.now() - interval '5 s', %s)",
        [json.dumps(encode(cancel))],
    )
    day.ordered.add("forgotten")
    day.leave("ignored", cancel)


def held(day: Day) -> None:
    """A saga and a queue are paused while a run of it is under way and another one is to begin."""
    main = day.worker("main")
    day.start("under way")
    day.tolerant(main.drain)
    for name in ({"saga": "crash.held"}, {"queue": QUEUE}):
        day.stubborn(lambda name=name: day.client.pause(**name, by="ann", reason="the bank is closed"))
        day.start("to come")
        day.tolerant(main.drain)
        day.stubborn(lambda name=name: day.client.resume(**name, by="ann"))
        day.stubborn(lambda: day.client.pause(saga="crash.held", by="ann"))
    day.tolerant(day.pump_once)
    day.stubborn(lambda: day.client.bulk("pause", saga="crash.held", by="ann"))


def broken(day: Day) -> None:
    """The database ends the worker's connection between a step and its outcome."""
    main = day.worker("main")

    def end(taken: Any) -> None:
        main.runner.after = lambda taken: None
        day.look.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name LIKE 'orchestrator child%'"
        )

    main.runner.after = lambda taken: end(taken) if "#1" in taken.key else None
    day.start("broken")
    day.tolerant(main.drain)


def families(day: Day) -> None:
    """A run is told something before it asks for it."""
    day.worker("main")
    day.start("linked")
    day.stubborn(lambda: day.client.signal("linked", "go", "gone", signal_id="one"))


def together(day: Day) -> None:
    """Runs are started with one commit."""
    day.worker("main")
    calls = {run_id: (plan.names,) for run_id, plan in day.planned.items() if not plan.joins}
    day.stubborn(lambda: day.client.start_many(in_a_row, calls.values(), {"task_ids": list(calls), "queue": QUEUE}))


TRICKS: dict[str, Trick] = {
    "ordinary": lambda day: None,
    "brief": together,
    "buried": buried,
    "overtaken": overtaken,
    "met": met,
    "stopped": stopped,
    "hanging": hanging,
    "forgotten": forgotten,
    "held": held,
    "broken": broken,
    "family": families,
    "circle": lambda day: None,
}
