"""Those who start runs, and those who give orders: the real client, from processes that can die as any other.

Owns what is acknowledged: a start that returned.  An operator tells the truth, also when it is a guess to the engine.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

import psycopg

from orchestrator.client import Client
from orchestrator.errors import StoreUnavailableError, UnknownRunError, UsageError
from orchestrator.settings import Settings
from tests.machine.programs import Program
from tests.simulation.scheduler import Process
from tests.simulation.steps import SAGAS, simulated

if TYPE_CHECKING:
    from tests.simulation.world import Simulation

_ORDERS = ("cancel", "cancel", "terminate", "retry", "skip", "resolve")
_OF_FAMILIES = (*_ORDERS, "news", "news", "pause", "pause", "pause saga", "pause queue", "go on")


class People:
    """Backends that start runs, and operators."""

    def __init__(self, simulation: Simulation, random: Random, runs: list[tuple[str, Program, dict[str, Any]]]) -> None:
        self._simulation = simulation
        self._random = random
        self._runs = runs
        self.acknowledged: list[str] = []
        self.done: Counter[str] = Counter()
        self.busy = 0

    # -- starting ------------------------------------------------------------------------------------------------------
    def open_backends(self) -> None:
        """Let a backend start each run, most of them at once."""
        for run in self._runs:
            self._as_process(f"backend {run[0]}", functools.partial(self._start, run))

    def _as_process(self, name: str, act: Callable[[Client], None]) -> None:
        scheduler, broker = self._simulation.scheduler, self._simulation.broker
        settings = Settings.from_environment({}, database_url=self._simulation.database_url, max_connections=2)
        process = Process(name)
        self.busy += 1

        def leave() -> None:
            self.busy -= 1

        def run() -> None:
            client = Client(settings, broker.ring, lambda: "a")
            act(client)
            client.pool.close()
            process.on_death.remove(leave)
            leave()

        process.on_death.append(leave)
        scheduler.spawn(process, name, run)

    def _start(self, run: tuple[str, Program, dict[str, Any]], client: Client) -> None:
        run_id, program, options = run
        after_s, in_transaction, regretted = (options.pop(name) for name in ("after_s", "in_transaction", "regretted"))
        scheduler = self._simulation.scheduler
        scheduler.wait(after_s)
        start = self._start_in_transaction if in_transaction else self._start_alone
        while True:
            try:
                start(client, program, {**options, "task_id": run_id})
                break
            except (StoreUnavailableError, psycopg.OperationalError):
                scheduler.wait(0.3)
        self.acknowledged.append(run_id)
        if regretted:  # before a worker has it in hand, as often as not
            self._order(client, run_id, "cancel")

    def _start_alone(self, client: Client, program: Program, options: dict[str, Any]) -> None:
        client.start(simulated, (program,), {}, options)

    def _start_in_transaction(self, client: Client, program: Program, options: dict[str, Any]) -> None:
        connection = psycopg.connect(client.settings.dsn)
        try:
            client.start(simulated, (program,), {}, {**options, "transaction": connection})
            connection.commit()
        finally:
            connection.close()

    # -- orders --------------------------------------------------------------------------------------------------------
    def order_something(self) -> bool:
        """Let somebody order something, to the point or not; False if there is no run yet."""
        if not self.acknowledged:
            return False
        known = self._simulation.run_ids() if self._simulation.has_families else self.acknowledged
        orders = _OF_FAMILIES if self._simulation.has_families else _ORDERS
        run_id, order = self._random.choice(known), self._random.choice(orders)
        self._as_process(f"operator of {run_id}", lambda client: self._order(client, run_id, order))
        return True

    def _order(self, client: Client, run_id: str, order: str) -> None:
        try:
            if order in ("cancel", "terminate"):
                getattr(client, order)(run_id, "by chance", "ann")
            elif order == "news":
                client.signal(run_id, "news", "news", f"news {self._random.randint(1, 9)}")
            elif order == "pause":
                client.operate(run_id, "pause", by="ann")
            elif order.startswith("pause "):
                self._pause(client, order)
            elif order == "go on":
                self._lift(client, run_id)
            else:
                self._mend(client, run_id, order)
            self.done[order] += 1
        except (UsageError, UnknownRunError, StoreUnavailableError):
            return

    def _pause(self, client: Client, order: str) -> None:
        if order == "pause saga":
            client.pause(saga=self._random.choice(SAGAS).partition("@")[0], by="ann")
        else:
            client.pause(queue=self._random.choice("ab"), by="ann")

    def _lift(self, client: Client, run_id: str) -> None:
        """End every pause that concerns a run, and those of queues."""
        for target in SAGAS:
            client.resume(saga=target.partition("@")[0], by="ann")
        for queue in "ab":
            client.resume(queue=queue, by="ann")
        client.operate(run_id, "resume", by="ann")

    def tell(self, run_id: str) -> None:
        """Let somebody send a run the news."""
        self._as_process(f"teller of {run_id}", lambda client: self._order(client, run_id, "news"))

    def go_on(self, run_id: str) -> None:
        """Let an operator end the pauses that keep a run from going on."""
        self._as_process(f"operator of {run_id}", lambda client: self._order(client, run_id, "go on"))

    def mend(self, run_id: str) -> None:
        """Let an operator look after a parked run."""
        order = self._random.choice(["retry", "retry", "resolve", "skip"])
        self._as_process(f"operator of {run_id}", lambda client: self._order(client, run_id, order))

    def _mend(self, client: Client, run_id: str, order: str) -> None:
        parked = [item for item in client.outcome(run_id).parked if isinstance(item, dict)]
        for item in sorted(parked, key=lambda item: item["key"] == ""):  # the run as a whole comes last
            key = str(item["key"])
            if not key:
                if item["role"] in ("drift", "code") and "continue_as_new() with work" not in item["why"]:
                    self._simulation.broke(f"run {run_id} parked by {item['role']}: {item['why']}")
                client.operate(run_id, "resolve", "", by="ann", reason="as good as done", value=[])
            elif item["role"] == "undo" or order == "retry":
                # An undo that is skipped leaves its effect; whoever skips it does so with open eyes.
                client.operate(run_id, "skip" if order == "skip" else "retry", key, by="ann")
            elif order == "skip":
                client.operate(run_id, "skip", key, by="ann")
            else:
                self._resolve(client, run_id, key)

    def _resolve(self, client: Client, run_id: str, key: str) -> None:
        thing, name = self._simulation.thing_of(run_id, key)
        there = self._simulation.provider.settle(thing)
        value = f"{name}-{thing}" if there else None
        client.operate(run_id, "resolve", key, by="ann", reason="looked it up", value=value, no_effect=not there)
