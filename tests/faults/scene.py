"""One test's world: a database, a broker, workers, a load, and the checker at the end.

Owns the processes that it starts.  Every fault goes through `fault`, so that it is counted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import kombu
import psutil
import psycopg
import redis
from amqp.exceptions import ChannelError

from tests.acceptance.running import Worker, until
from tests.engine.proxy import Proxy
from tests.faults import rabbitmq, steps
from tests.faults.load import QUEUE, Load, Office
from tests.faults.sagas import CANARY
from tests.faults.servers import kill_all
from tests.faults.steps import ACCOUNTS, BALANCE, Stop
from tests.faults.tally import TALLY
from tests.proof import effects
from tests.proof.checker import (
    ALLOWANCE,
    Baseline,
    Demand,
    Levels,
    Report,
    Seen,
    check,
    refused_in,
    wait_until_settled,
)
from tests.proof.levels import measure
from tests.proof.secrecy import Place

LOADED = Demand(faults=1, redeliveries=0, fenced=0, redispatches=0)
"""What every test with a load must have seen: a fault, and runs that ended in each way."""
BARE = replace(LOADED, states=frozenset())
"""What a test must have seen that has a few runs of its own instead of a load."""
WITHIN_S = 240.0
BEATS = 500
"""Dead tuples that come of leases which idle workers renew while it is looked."""
WARM_BYTES = 32 << 20
"""What a process of a worker keeps once it has done something: modules, statements, runs that go on."""


class Scene:
    """A fresh database and a fresh broker; workers and the client speak to both past the proxies unless told."""

    def __init__(self, database_url: str, broker_url: str, folder: Path) -> None:
        self.database_url = database_url
        self.broker_url = broker_url
        self.folder = folder
        self.database, self.broker = Proxy(database_url), Proxy(broker_url)
        self.effect_log = folder / "effects"
        self.effect_log.touch()
        self.faults: Counter[str] = Counter()
        self.redeliveries = 0
        self.workers: list[Worker] = []
        self.office = Office(database_url, broker_url, folder / "acknowledged")
        self._offices = [self.office]
        self.warm_bytes = WARM_BYTES
        self.messages: list[Any] = []
        """What somebody has seen of the broker's messages: they must hold no secret, as all else that is outside."""
        self._resident: dict[int, int] = {}
        with psycopg.connect(database_url) as connection:
            connection.execute(steps.LEDGER)
            connection.execute(effects.TABLE)

    # -- what runs -----------------------------------------------------------------------------------------------------
    def environment(self, *, proxied: bool) -> dict[str, str]:
        return {
            "ORCHESTRATOR_DATABASE_URL": self.database.url if proxied else self.database_url,
            "CELERY_BROKER_URL": self.broker.url if proxied else self.broker_url,
            "ORCHESTRATOR_PUMP_INTERVAL": "0.2",
            steps.FOLDER: str(self.folder),
            effects.VARIABLE: str(self.effect_log),
        }

    def worker(self, *options: str, proxied: bool = False, app: str = "tests.faults.app", **environment: str) -> Worker:
        """Make a worker without starting it."""
        number = len(self.workers) + 1
        surroundings = {**self.environment(proxied=proxied), **environment}
        log = self.folder / f"worker-{number}.log"
        self.workers.append(Worker(QUEUE, log, surroundings, *options, app=app, name=f"w{number}"))
        return self.workers[-1]

    def start_workers(self, count: int, *options: str, **how: Any) -> list[Worker]:
        """Start workers side by side."""
        made = [self.worker(*options, **how).launch() for _ in range(count)]
        for worker in made:
            worker.until_ready()
            self._resident |= {each.pid: each.memory_info().rss for each in _family(worker)}
        return made

    def proxied_office(self) -> Office:
        """Return a client whose way to database and broker leads through the proxies."""
        self._offices.append(Office(self.database.url, self.broker.url, self.folder / "acknowledged"))
        return self._offices[-1]

    def load(self, runs: int, seed: int = 1, **options: Any) -> Load:
        """Begin to start trips."""
        office = options.pop("office", self.office)
        return Load(office, self.database_url, runs=runs, seed=seed, **options)

    def start(self, run_id: str, *stops: Stop, together: bool = False) -> Any:
        return self.office.start(run_id, list(stops), together=together)

    # -- what goes wrong -----------------------------------------------------------------------------------------------
    def fault(self, kind: str, count: int = 1) -> None:
        """Count a fault."""
        self.faults[kind] += count

    def signal(self, process: Worker | int, number: signal.Signals, whole: bool = False) -> None:
        """Send a signal to a worker's main process, to it with all that it has started, or to a pid."""
        pid = process if isinstance(process, int) else _pid(process)
        family = (
            [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)] if whole else [psutil.Process(pid)]
        )
        for each in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.pid, number)
        if number == signal.SIGKILL and isinstance(process, Worker) and process.process is not None:
            process.process.wait(30.0)
        self.fault(number.name)

    def until_gone(self, worker: Worker, within_s: float = 60.0) -> None:
        """Wait until a worker that was told to end has; one that does not tells where it stands."""
        assert worker.process is not None
        try:
            worker.process.wait(within_s)
        except subprocess.TimeoutExpired:
            os.kill(worker.process.pid, signal.SIGUSR1)  # upon which Celery writes down what each thread is about
            time.sleep(2.0)
            raise AssertionError(f"{worker.queue} has not ended within {within_s} s: {worker.said[-8000:]}") from None

    @contextlib.contextmanager
    def stopped(self, worker: Worker) -> Iterator[None]:
        """Let a worker with all its processes stand still for a while."""
        self.signal(worker, signal.SIGSTOP, whole=True)
        try:
            yield
        finally:
            self.signal(worker, signal.SIGCONT, whole=True)

    def companion(self, worker: Worker) -> int:
        """Return the pid of a worker's companion, once it is there."""
        return until(lambda: next(iter(self._companions(worker)), 0), "a companion", 30.0)

    def _companions(self, worker: Worker) -> Iterator[int]:
        for child in psutil.Process(_pid(worker)).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "orchestrator.celery.companion" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                    yield child.pid

    def children(self, worker: Worker) -> list[int]:
        """Return the pids of a worker's pool children."""
        companions = set(self._companions(worker))
        return [child.pid for child in psutil.Process(_pid(worker)).children() if child.pid not in companions]

    def overtake(self, stopped: Worker, heir: Worker, run_id: str) -> None:
        """Let a worker stand still with a run's step, after its effect, until another one has done it again."""
        with self.stopped(heir):
            self.start(run_id, Stop(name="a", kind="stay", how=["after", "ok"]))
            self.until_at(run_id, "after")
        with self.stopped(stopped):
            self.until_state(run_id, "completed")
            self.let_go(run_id, "after")
        until(lambda: self.entries(run_id, "late"), f"the late result of {run_id} is on record")

    def ring_again(self, times: int = 20) -> None:
        """Ring doorbells once more than they had to be."""
        until(lambda: self.office.ring(times), "the bell rings", 30.0)
        self.redeliveries += times
        self.fault("doorbell rung again", times)

    def kill_in_a_step(self, run_id: str) -> None:
        """Kill the process in which a run's step is under way."""
        self.start(run_id, Stop(name="a", kind="insist", how=["before", "ok"]))
        self.signal(self.until_at(run_id, "before"), signal.SIGKILL)

    # -- gates ---------------------------------------------------------------------------------------------------------
    def until_at(self, run_id: str, where: str, attempt: int = 1, within_s: float = 60.0) -> int:
        """Wait until an attempt is at its gate; returns the process that it runs in."""
        path = self.folder / f"at {run_id} {where} {attempt}"
        return until(lambda: path.exists() and int(path.read_text() or 0), f"{path.name}", within_s)

    def let_go(self, run_id: str, where: str, *attempts: int) -> None:
        for attempt in attempts or (1,):
            (self.folder / f"go {run_id} {where} {attempt}").touch()

    # -- what is known -------------------------------------------------------------------------------------------------
    def sql(self, query: str, *values: Any) -> list[Any]:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            cursor = connection.execute(query, values)
            return cursor.fetchall() if cursor.description else []

    def state(self, run_id: str) -> str:
        return str(self.sql("SELECT state FROM orchestrator.runs WHERE id = %s", run_id)[0][0])

    def until_state(self, run_id: str, *states: str, within_s: float = 60.0) -> str:
        return until(lambda: (s := self.state(run_id)) in states and s, f"{run_id} is {' or '.join(states)}", within_s)

    def entries(self, run_id: str, kind: str) -> list[dict[str, Any]]:
        query = "SELECT entry FROM orchestrator.history WHERE run_id = %s AND kind = %s ORDER BY seq, n"
        return [row[0] for row in self.sql(query, run_id, kind)]

    def effects(self, run_id: str) -> list[str]:
        """Return what a run did outside of the database, in order."""
        return [
            f"{each.direction} {each.attempt}"
            for each in effects.read(self.effect_log, growing=True)
            if each.run == run_id and each.event == "effect"
        ]

    def logs(self) -> list[str]:
        return [worker.log.read_text(errors="replace") for worker in self.workers if worker.log.exists()]

    # -- the end -------------------------------------------------------------------------------------------------------
    def judge(
        self,
        demand: Demand,
        *loads: Load,
        may_park: Container[str] = (),
        within_s: float = WITHIN_S,
        meanwhile: Callable[[], object] | None = None,
    ) -> Report:
        """Wait until nothing moves, and let the checker look; a broken promise fails the test."""
        for load in loads:
            load.finish()
        options = {"meanwhile": meanwhile} if meanwhile else {}
        wait_until_settled(self.database_url, within_s, may_park=may_park, **options)
        pids = self._still_there()
        report = check(
            self.database_url,
            effect_log=self.effect_log,
            acknowledged=self.office.acknowledged,
            may_park=may_park,
            refused=refused_in(*self.logs()),
            conserved={"money": ("SELECT sum(balance)::bigint FROM accounts", ACCOUNTS * BALANCE)},
            places=self._outside() if loads else {},
            canaries=[CANARY] if loads else [],
            baseline=self._baseline(pids),
            pids=pids,
            allowance=replace(ALLOWANCE, dead_tuples=BEATS, memory_bytes=len(pids) * self.warm_bytes),
            before=Report(ended={run: end for load in loads for run, end in load.ends.items()}),
            seen=Seen(faults=self.faults.total(), redeliveries=self.redeliveries),
            demand=demand,
        )
        TALLY.add(self.faults, report)
        print(f"{dict(self.faults)}: {report}")
        assert report.ok, f"{report}\n\nlogs end with:\n" + "\n".join(log[-2500:] for log in self.logs())
        for load in loads:
            wrong = {run: end for run, end in load.expected.items() if end in ("completed", "together")}
            states = dict(self.sql("SELECT id, state FROM orchestrator.runs"))
            assert {run for run in wrong if states[run] != "completed"} == set(), "good trips were not completed"
        return report

    def _outside(self) -> dict[str, Place]:
        """Return the places at which others than the database may read."""
        places: dict[str, Place] = {f"log {n}": log for n, log in enumerate(self.logs(), 1)}
        if (told := self.folder / "telemetry").exists():
            places["telemetry"] = told
        for n, message in enumerate(self.messages):
            body = message.body if isinstance(message.body, bytes) else str(message.body).encode()
            places[f"message {n}"] = body + repr((message.headers, message.properties)).encode()
        if self.broker_url.startswith("redis"):
            with redis.Redis.from_url(self.broker_url) as broker:
                places["broker"] = b"".join(broker.dump(key) or b"" for key in broker.keys("*"))
        else:
            places["broker"] = rabbitmq.stored(self.broker_url)
        return places

    # -- what must not pile up -----------------------------------------------------------------------------------------
    def _still_there(self) -> list[int]:
        """Return the processes of workers that have lived since before the first fault."""
        return [pid for pid in self._resident if psutil.pid_exists(pid) and _is_there(pid)]

    def _baseline(self, pids: list[int]) -> Baseline:
        """Return what there was before, with the connections that idle workers and clients keep.

        What is dead in the tables can be swept away, unless somebody holds on to it.  It is swept more than once:
        sessions tell late of what they have left, and of what is gone by then.  Before that the doorbells are answered
        that wait still, hundreds of them on a busy machine: each leaves something dead.
        """
        give_up_at = time.monotonic() + 60.0
        while self.waiting() > ALLOWANCE.messages and time.monotonic() < give_up_at:
            time.sleep(0.05)
        give_up_at = time.monotonic() + 30.0
        while measure(self.database_url).dead_tuples > BEATS // 2 and time.monotonic() < give_up_at:
            with psycopg.connect(self.database_url, autocommit=True) as connection:
                connection.execute("VACUUM")
        # A companion has one, and a pool child, or a thread of two, one for transactional steps besides its own.
        idle = sum(1 + 2 * max(2, len(self.children(worker))) for worker in self.workers if worker.is_alive)
        pooled = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'orchestrator client' "
        ((clients,),) = self.sql(pooled + "AND datname = current_database()")
        most = sum(office.client.settings.max_connections for office in self._offices)
        before = Levels(connections=idle + min(clients, most), memory_bytes=sum(self._resident[pid] for pid in pids))
        return Baseline(self.database_url, before, self.waiting, within_s=30.0)

    def waiting(self) -> int:
        """Return how many messages wait in the queue."""
        with kombu.Connection(self.broker_url) as broker:
            try:
                return int(broker.default_channel.queue_declare(QUEUE, passive=True).message_count)
            except ChannelError:
                return 0

    def close(self) -> None:
        """End what runs, at once; how workers stop by themselves is a test of its own."""
        for worker in self.workers:
            if worker.is_alive:
                kill_all(psutil.Process(_pid(worker)))
                worker.kill()
        for office in self._offices:
            office.close()
        self.database.close()
        self.broker.close()


def _family(worker: Worker) -> list[psutil.Process]:
    """Return a worker's main process, its companion and its pool children."""
    main = psutil.Process(_pid(worker))
    return [main, *main.children()]


def _is_there(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _pid(worker: Worker) -> int:
    assert worker.process is not None
    return worker.process.pid
