"""A load of trips, started by a client that keeps trying, and writes down every start that returned.

Owns the threads of the load and the file of acknowledged starts.
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import psycopg
from psycopg.rows import dict_row

from orchestrator.celery.doorbell import Bell
from orchestrator.client import Client
from orchestrator.errors import OrchestratorError, StoreUnavailableError, UsageError
from orchestrator.machine.states import TERMINAL
from orchestrator.result import SagaResult
from orchestrator.settings import Settings
from tests.acceptance.running import until
from tests.faults import sagas
from tests.faults.steps import Stop
from tests.proof.runs import end_of
from tests.proof.world import Run

QUEUE = "celery"


class Office:
    """Starts trips in one database and rings one broker; every start that returned is written down at once."""

    def __init__(self, database_url: str, broker_url: str, acknowledged: Path) -> None:
        self._bell = Bell({"hostname": broker_url, "ssl": False, "transport_options": {}, "heartbeat": 0})
        settings = Settings.from_environment({}, database_url=database_url)
        self.client = Client(settings, lambda queue, times: self._bell.ring(queue, times) and None, lambda: QUEUE)
        self._file = acknowledged
        self._file.touch()
        self._lock = threading.Lock()
        self.refusals = 0

    @property
    def acknowledged(self) -> list[str]:
        return self._file.read_text().splitlines()

    def start(self, run_id: str, stops: list[Stop], *, together: bool = False, within_s: float = 60.0) -> SagaResult:
        """Start a trip, again and again until a start returns; the id makes that one run."""
        give_up_at = time.monotonic() + within_s
        options = {"task_id": run_id, "queue": QUEUE}
        while True:
            try:
                result = self.client.start(sagas.trip, (stops, together), {}, options)
            except StoreUnavailableError:
                with self._lock:
                    self.refusals += 1
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(0.05)
                continue
            with self._lock, self._file.open("a") as file:
                file.write(f"{run_id}\n")
            return result

    def ring(self, times: int) -> bool:
        """Ring for nothing: doorbells that come once more than they had to."""
        return self._bell.ring(QUEUE, times)

    def order(self, result: SagaResult, what: str, within_s: float = 60.0) -> None:
        """Cancel or terminate a run; one that has ended meanwhile is left alone."""
        give_up_at = time.monotonic() + within_s
        while True:
            try:
                return {"cancelled": result.cancel, "terminated": result.terminate}[what]("a test", "the office")
            except UsageError:
                return None
            except OrchestratorError:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(0.05)

    def close(self) -> None:
        self.client.pool.close()
        self._bell.close()


class Load:
    """So many trips, started by one thread as fast as it can; ends of every kind are among them."""

    def __init__(
        self, office: Office, database_url: str, *, runs: int, seed: int, ms: int = 20, name: str = ""
    ) -> None:
        self._office = office
        self._database_url = database_url
        self._dice = random.Random(seed)
        self._prefix = f"load-{seed}"
        self._ms = ms
        self.expected: dict[str, str] = {}
        self.ends: dict[str, str] = {}
        """How each run looked when it was first seen to have ended: an end is final."""
        self._failure: BaseException | None = None
        self._runs = runs
        self._thread = threading.Thread(target=self._start_all, name="load", daemon=True)
        self._thread.start()

    def _start_all(self) -> None:
        try:
            for number in range(self._runs):
                end, stops = sagas.plan(number, self._dice, self._ms)
                run_id = f"{self._prefix}-{number}"
                result = self._office.start(run_id, stops, together=end == "together")
                self.expected[run_id] = end
                if end in ("cancelled", "terminated"):
                    self._office.order(result, end)
        except BaseException as error:
            self._failure = error

    def ended(self) -> int:
        """Return how many runs of the load were seen to have ended; -1 while the database cannot say."""
        query = "SELECT * FROM orchestrator.runs WHERE id LIKE %s AND state = ANY(%s) AND id <> ALL(%s)"
        values = [f"{self._prefix}-%", list(TERMINAL), list(self.ends)]
        try:
            with psycopg.connect(self._database_url, connect_timeout=5, row_factory=dict_row) as connection:
                self.ends |= {row["id"]: end_of(Run(row)) for row in connection.execute(query, values).fetchall()}
        except psycopg.OperationalError:
            return -1
        return len(self.ends)

    def until_ended(self, count: int, within_s: float = 240.0) -> None:
        """Wait until so many runs have ended."""
        until(lambda: self._failure or self.ended() >= count, f"{count} runs of the load have ended", within_s)

    def finish(self, within_s: float = 120.0) -> None:
        """Wait until every start has returned."""
        self._thread.join(within_s)
        assert not self._thread.is_alive(), "the load is not started yet"
        if self._failure:
            raise self._failure
