"""A process that plays a story on a real database, and dies where a failpoint says so; another one finishes it.

    python -m tests.crash.driver

forks a process for every request that it reads (a line of JSON on standard input, see `Request`) and answers with its
exit code: a fork costs milliseconds, so that every failpoint can have processes of its own.  Owns the loop of such a
process: a worker's child, its pump and its lease, and a caller who starts runs and gives orders and, if he is not told
that it went well, does so again.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg

from orchestrator import failpoints, saga
from orchestrator.client import Client
from orchestrator.engine.lease import begin_life
from orchestrator.engine.pump import Pump
from orchestrator.errors import StoreUnavailableError, UsageError
from orchestrator.machine.journal import Arrival, encode
from orchestrator.machine.states import TERMINAL
from orchestrator.settings import Settings
from orchestrator.store import arrivals, liveness, pauses, runs
from orchestrator.store.connection import open_connection
from tests.crash.workload import STORIES, Planned
from tests.engine.stage import QUEUE, Child
from tests.proof import effects

LEASE = timedelta(seconds=2)
EXPECTED = (StoreUnavailableError, psycopg.OperationalError, psycopg.InterfaceError, ConnectionError)
_GIVE_UP_S = 40.0
# Half a minute passes for the run whose turn has failed.
_HURRY = "UPDATE orchestrator.work SET due_at = orchestrator.now() WHERE run_id = 'postponed' AND fence IS NULL"


@dataclass(frozen=True)
class Request:
    """A process to be forked: the story, where, and what is armed; `finish` plays no tricks of the story."""

    story: str
    database_url: str
    folder: str
    points: str = ""
    finish: bool = False
    count: bool = False


class Worker(Child):
    """A worker's child with the life of this process; its companion is the loop in `Day`."""

    def __init__(self, database_url: str, node: str, **settings: Any) -> None:
        self.node = node
        super().__init__(database_url, **settings)

    def _register(self) -> int:
        return begin_life(
            self.connection, node=self.node, pid=os.getpid(), queues=[QUEUE], targets=self.targets, slots=1
        )[0]

    def renew(self) -> None:
        """Renew the lease, or take a new incarnation, as a companion does."""
        if self.connection.closed:
            self.connection = open_connection(self.settings.dsn, name="companion")
        if not liveness.renew(self.connection, self.incarnation):
            self.reborn()


class Day:
    """The loop of one process, from the first start to the end of the last run."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.url = request.database_url
        self.folder = Path(request.folder)
        self.planned: Mapping[str, Planned] = STORIES[request.story]
        self.workers: list[Worker] = []
        self.pump = Pump(lambda queue, times: None, lease=LEASE, reservation=timedelta(milliseconds=100))
        self.rounds = 0
        settings = Settings.from_environment({}, database_url=self.url)
        self.client = Client(settings, lambda queue, times: None, lambda: QUEUE)
        self.look = open_connection(self.url, name="test")
        self.ordered: set[str] = set()

    # -- what may break ------------------------------------------------------------------------------------------------
    def stubborn(self, action: Callable[[], Any]) -> Any:
        """Do it again if a connection breaks: a failpoint breaks one only once."""
        for _ in range(3):
            try:
                return action()
            except EXPECTED:
                continue
        return action()

    def tolerant(self, action: Callable[[], Any]) -> Any:
        """Go on as a Celery worker does whose drain has failed; what nobody foresaw is put on record."""
        try:
            return action()
        except EXPECTED:
            return None
        except Exception:
            with (self.folder / "unforeseen").open("a") as file:
                file.write(traceback.format_exc())
            return None

    # -- the caller ----------------------------------------------------------------------------------------------------
    def start(self, run_id: str) -> None:
        """Start a planned run; it is written down as acknowledged once the start has returned."""
        plan = self.planned[run_id]
        options = {"task_id": run_id, "queue": QUEUE}

        def begin() -> None:
            if not plan.joins:
                self.client.start(plan.saga, (plan.names,), {}, options)
                return
            with psycopg.connect(self.url) as transaction:
                self.client.start(plan.saga, (plan.names,), {}, {**options, "transaction": transaction})

        self.stubborn(begin)
        with (self.folder / "acknowledged").open("a") as file:
            file.write(f"{run_id}\n")

    def give_orders(self) -> None:
        """Cancel, terminate and settle what is waiting for it, resume what is paused."""
        for pause in pauses.listed(self.look):
            if not pause.lifted:
                self.stubborn(lambda pause=pause: self.client.resume(**{pause.kind: pause.name}))
        self.stubborn(lambda: self.client.bulk("resume", states=["paused"]))
        for run_id, plan in self.planned.items():
            if run_id in self.ordered:
                continue
            run = runs.run(self.look, run_id)
            sleeps = run is not None and run["state"] == "running" and run["position"] >= 2
            if plan.ends == "cancelled" and sleeps:
                self._order(run_id, lambda id=run_id: self.client.cancel(id, by="ann", reason="changed her mind"))
            elif plan.ends == "terminated" and sleeps:
                self._order(run_id, lambda id=run_id: self.client.terminate(id, by="ann"))
            elif run is not None and run["parked"]:
                self._order(run_id, lambda id=run_id, parked=run["parked"][0]: self.settle(id, parked))

    def settle(self, run_id: str, parked: dict[str, str]) -> None:
        """Skip an undo that failed, and say that a step took effect of which nobody knows."""
        action, value = ("skip", None) if parked["role"] == "undo" else ("resolve", "it did")
        self.client.operate(run_id, action, parked["key"], by="ann", value=value)

    def _order(self, run_id: str, give: Callable[[], Any]) -> None:
        self.ordered.add(run_id)
        with suppress(UsageError):  # it was given before the crash, and the run has ended
            self.stubborn(give)

    def leave(self, run_id: str, arrival: Arrival) -> None:
        """Leave an order as another process does that has nothing to do with this one."""
        self.ordered.add(run_id)
        with self.look.transaction():
            arrivals.leave(self.look, run_id, encode(arrival), anyone=True)

    # -- the worker ----------------------------------------------------------------------------------------------------
    def worker(self, node: str, **settings: Any) -> Worker:
        """Begin the life of a worker of this process."""
        made: Worker = self.stubborn(lambda: Worker(self.url, node, **settings))
        self.workers.append(made)
        return made

    def play(self) -> None:
        """Play the story's tricks, then work until every run has ended."""
        from tests.crash.stories import TRICKS

        if not self.request.finish:
            TRICKS[self.request.story](self)
        if not self.workers:
            self.worker("main")
        for run_id in self.planned:
            self.start(run_id)
        until = time.monotonic() + _GIVE_UP_S
        while not self.is_over():
            if time.monotonic() > until:
                states = self.look.execute("SELECT id, state FROM orchestrator.runs ORDER BY id").fetchall()
                raise SystemExit(f"the runs have not ended: {states}")
            self.turn()
        for _ in range(self.rounds):
            self.tolerant(self.pump_once)

    def turn(self) -> None:
        """Do once what worker, companion and caller do for ever."""
        for worker in self.workers:
            self.tolerant(worker.renew)
        self.tolerant(self.pump_once)
        done = [self.tolerant(worker.drain) for worker in self.workers]
        self.give_orders()
        self.look.execute(_HURRY)
        if not any(done):
            time.sleep(0.005)

    def pump_once(self) -> None:
        try:
            self.pump.run_once(self.pump_connection())
        except EXPECTED:
            self.pump.connection_broke()
            raise

    def pump_connection(self) -> Any:
        if self.workers[0].connection.closed:
            self.workers[0].connection = open_connection(self.url, name="pump")
        return self.workers[0].connection

    def is_over(self) -> bool:
        states = {row[0]: row[1] for row in self.look.execute("SELECT id, state FROM orchestrator.runs").fetchall()}
        ended = all(state in TERMINAL for state in states.values()) and set(states) >= set(self.planned)
        owed = self.look.execute("SELECT EXISTS (SELECT FROM orchestrator.arrivals)").fetchone()
        return ended and owed == (False,)


def play(request: Request) -> None:
    """Be the process that was asked for."""
    folder = Path(request.folder)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.INFO, format="%(process)d %(levelname)s %(name)s: %(message)s", force=True)
    (folder / "effects").touch()  # a story may be over without an effect
    os.environ[effects.VARIABLE] = str(folder / "effects")
    failpoints.arm({failpoints.VARIABLE: request.points, failpoints.FIRED: str(folder / "fired")})
    Day(request).play()
    if request.count:
        hits = {name: next(order.hits) - 1 for name, order in failpoints._orders.items()}
        (folder / "hits").write_text(json.dumps(hits))


def main() -> None:
    """Fork a process for every request, one after the other."""
    assert saga
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                play(Request(**json.loads(line)))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Drivers:
    """The process that forks the others."""

    def __init__(self) -> None:
        import subprocess

        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.driver"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip

    def run(self, request: Request) -> int:
        """Let a process do what is asked and return its exit code."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(request)) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


if __name__ == "__main__":
    main()
