"""One seed, from its first start to the verdict: first faults, then none, and then everything must have ended.

Owns the phases and what they must lead to.  Everything that the engine does here is done by the engine itself, on a
real Postgres; the clock, the network, the broker, the processes and the provider are the simulation's.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import psycopg

from tests.machine.programs import Program
from tests.proof.checker import NOTHING, check
from tests.proof.effects import EffectLog
from tests.simulation import steps, watch
from tests.simulation.broker import Broker
from tests.simulation.faults import Faults
from tests.simulation.network import Network, Sessions
from tests.simulation.people import People
from tests.simulation.programs import Programs
from tests.simulation.provider import Provider
from tests.simulation.scheduler import Scheduler
from tests.simulation.surroundings import surrounded
from tests.simulation.verdict import Verdict, disagreements
from tests.simulation.workers import Node

_OBJECT = re.compile(r"<psycopg[^>]*>")  # which says its address, and the server's port
_MOST_MOVES = 60_000
_WATCHED = 50  # moves between two looks whether the laws hold that must do so at any moment
_QUIET_S = 400.0  # of time that creeps, after the last fault
_UNSETTLED = """
SELECT id FROM orchestrator.runs WHERE finished_at IS NULL
UNION SELECT run_id FROM orchestrator.arrivals UNION SELECT run_id FROM orchestrator.work
"""
_NEXT = """
SELECT extract(epoch FROM min(CASE WHEN fence IS NULL THEN due_at ELSE expires_at + interval '2.1 s' END)
    - orchestrator.now())::float8 FROM orchestrator.work WHERE due_at < orchestrator.now() + interval '100 years'
"""
_ENTRIES = """
SELECT CASE kind WHEN 'late' THEN 'late success' ELSE kind END, count(*) FROM orchestrator.history
WHERE kind IN ('late', 'parked', 'revoked', 'unlocked', 'signal', 'carried') GROUP BY kind
UNION SELECT 'correcting run', count(*) FROM orchestrator.runs WHERE id LIKE '%/late/%' HAVING count(*) > 0
"""
_PARKED = """
SELECT r.id FROM orchestrator.runs r WHERE r.state = 'parked' OR (r.parked <> '[]' AND r.finished_at IS NULL
    AND NOT EXISTS (SELECT FROM orchestrator.work w WHERE w.run_id = r.id AND w.key <> ''))
"""
_PAUSED = """
SELECT min(id) FROM orchestrator.runs WHERE finished_at IS NULL AND EXISTS (SELECT FROM orchestrator.pauses)
HAVING min(id) IS NOT NULL
UNION SELECT id FROM orchestrator.runs WHERE state = 'paused' ORDER BY 1
"""
_LINKS = """
SELECT id, CASE WHEN state = 'continued' THEN parent_id ELSE id END, link FROM orchestrator.runs
"""


class Stuck(Exception):
    """The system does not come to rest."""


def has_families(seed: int) -> bool:
    """Tell whether the runs of a seed may use everything that saga code can; those of the others ask for steps only."""
    return Random(f"family of {seed}").random() < 0.25


class Simulation:
    """Everything that takes part in one seed."""

    def __init__(
        self, seed: int, database_url: str, effect_log: Path, sessions: Sessions, tell: Any = None, focus: str = ""
    ) -> None:
        random = self.random = Random(seed)
        self.seed = seed
        self.has_families = not focus and has_families(seed)
        self.database_url = database_url
        self.scheduler = Scheduler(Random(random.random()))
        self._schedule = hashlib.sha256()
        self._tell = tell
        self.scheduler.tell = self._note
        self.network = Network(self.scheduler, database_url, sessions)
        self.broker = Broker(self.scheduler)
        self.effect_log = effect_log
        effect_log.write_bytes(b"")
        self.provider = Provider(seed, self.scheduler, EffectLog(effect_log), calm=random.random() < 0.1)
        self.faults = Faults(self, Random(random.random()), focus)
        self.programs: dict[str, Program] = {}
        self.people = People(self, random, self._runs())
        self.refused: list[tuple[str, int, str, int]] = []  # run, link, key, attempt
        self.broken: list[str] = []
        self.pids: set[int] = set()
        self.new_pid = itertools.count(100)
        self._looked_at = 0.0
        self._attempts: set[tuple[Any, ...]] = set()
        self.nodes = self._nodes()

    def _runs(self) -> list[tuple[str, Program, dict[str, Any]]]:
        programs = Programs(self.random)
        runs = []
        burst = self.random.random() < 0.15
        for number in range(self.random.randint(5, 8) if burst else self.random.randint(2, 5)):
            options: dict[str, Any] = {
                "after_s": self.random.choice([0, 0, 0, 0.3, 2.0]),
                "in_transaction": self.random.random() < 0.2,
                "queue": self.random.choice(["a", "a", "b"]),
                "priority": self.random.choice([0, 0, 0, 5]),
                "regretted": self.random.random() < 0.1,
            }
            if self.random.random() < 0.15:
                options["countdown"] = self.random.choice([1, 5000])
            if self.random.random() < 0.2:
                options["deadline"] = self.random.choice([0.5, 3.0, 3000.0, 6000.0])
            run_id = f"run-{number}"
            self.programs[run_id] = programs.draw_family() if self.has_families else programs.draw(short=burst)
            runs.append((run_id, self.programs[run_id], options))
        return runs

    def _nodes(self) -> list[Node]:
        settings = {
            "drain_steps": self.random.choice([1, 3, 500]),
            "cache_runs": self.random.choice([0, 1, 1000]),
            "pump_interval": timedelta(seconds=self.random.choice([1.0, 1.9, 2.8])),
            "lease": timedelta(seconds=3),
            "watchdog": timedelta(days=10),  # longer than any clock of a seed gets
        }
        unhurried = {**settings, "pump_interval": timedelta(seconds=2.8)}
        nodes = [Node(self, "one", queues=["a", "b"], slots=self.random.choice([1, 2]), knows_saga=True, **settings)]
        queues = self.random.choice([["a"], ["b"], ["a", "b"]])
        knows = self.random.random() < 0.7
        nodes.append(Node(self, "two", queues=queues, slots=1, knows_saga=knows, **unhurried))
        return nodes

    def _note(self, line: str) -> None:
        line = _OBJECT.sub("<psycopg>", line)
        self._schedule.update(line.encode())
        if self._tell is not None:
            self._tell(f"{self.scheduler.monotonic - 1000:9.4f} {line}")

    # -- asked by others -----------------------------------------------------------------------------------------------
    def any_node(self) -> Node | None:
        """Return a worker that is up."""
        up = [node for node in self.nodes if node.up and not node.stopping and node.incarnation]
        return self.random.choice(up) if up else None

    def broke(self, what: str) -> None:
        """Note that something happened that must not."""
        self.scheduler.tell(f"BROKEN: {what}")
        self.broken.append(what)

    def ran(self, *attempt: Any) -> None:
        """Note that the code of an attempt runs: a begun attempt belongs to one child, which runs it once."""
        if attempt in self._attempts:
            self.broke(f"an attempt ran twice: {attempt}")
        self._attempts.add(attempt)

    def thing_of(self, run_id: str, key: str) -> tuple[int, str]:
        """Return the number that a request is about, and the name of its step."""
        (entry,) = self.network.ask(
            "SELECT entry FROM orchestrator.history WHERE run_id = %s AND key = %s AND kind = 'asked'", run_id, key
        )
        task = entry.get("task", key.partition("#")[0])
        return int(entry["args"]["n"]), task.rsplit(".", 1)[-1]

    def run_ids(self) -> list[str]:
        """Return the runs that have not ended, or else those that were started."""
        found = self.network.rows("SELECT id FROM orchestrator.runs WHERE finished_at IS NULL ORDER BY id")
        return [run_id for (run_id,) in found] or self.people.acknowledged

    def killed(self, process: Any) -> None:
        """Do for the killed what the kernel does: tell those who watch."""
        for node in self.nodes:
            for child in node.children:
                if child.process is process:
                    node.kill_child(child)
                    return
        self.scheduler.doom(process)

    # -- phases --------------------------------------------------------------------------------------------------------
    def play(self) -> Verdict:
        """Play the seed; the verdict says what was broken."""
        with surrounded(self):
            try:
                self._make_trouble()
                self._come_to_rest()
            except Stuck as stuck:
                self.broke(f"stuck: {stuck}")
            except Exception:
                self.broke(f"an actor ended in {traceback.format_exc()}")
            finally:
                self._entries = self.network.rows(_ENTRIES)
                for node in self.nodes:
                    node.kill()
                self.scheduler.end()
                self.network.close()
                steps.use(None)
        return self._judge()

    def _make_trouble(self) -> None:
        self.network.show_time()
        for node in self.nodes:
            node.start()
        self.people.open_backends()
        self.network.fate, self.network.kill, self.network.stall = self.faults.fate, self.killed, self.faults.stall
        self.scheduler.on_move.append(self.faults.after_move)
        self.broker.trouble = self.random.choice([0.0, 0.1, 0.5]) if not self.faults.over else 0.0
        until = self.scheduler.monotonic + 15.0
        while self.scheduler.monotonic < until and not self.faults.over:
            self._move()
            if self._is_quiet() and self._settled():
                break
        self.faults.left = 0
        self.broker.trouble = 0.0
        self.network.down_until = 0.0

    def _come_to_rest(self) -> None:
        until = self.scheduler.monotonic + _QUIET_S
        while self.scheduler.monotonic < until:
            self._move()
            if self._is_quiet():
                if self._settled():
                    return
                self._go_on()
        raise Stuck(f"not at rest after {_QUIET_S} s: {self._standing()}")

    def _move(self) -> None:
        for node in self.nodes:
            if not node.up:
                node.start()
        self.scheduler.move()
        if self.has_families and self.scheduler.moves % _WATCHED == 0:
            for law in watch.broken(self.network):
                if law not in self.broken:
                    self.broke(law)
        if self.scheduler.moves > _MOST_MOVES:
            raise Stuck(f"{_MOST_MOVES} moves: {self._standing()}")

    def _is_quiet(self) -> bool:
        """Tell, every now and then, whether nobody is about to do anything but what is done every second."""
        if self.scheduler.monotonic < self._looked_at + 0.1:
            return False
        children = [child for node in self.nodes for child in node.children]
        up = all(node.up and node.children and node.incarnation for node in self.nodes)
        if not up or any(child.busy for child in children) or not self.broker.empty or self.people.busy:
            return False
        self._looked_at = self.scheduler.monotonic
        return True

    def _settled(self) -> bool:
        return not self.network.rows(_UNSETTLED) and bool(self.people.acknowledged)

    def _go_on(self) -> None:
        """Operators look after what is parked; long waiting is cut short."""
        parked = [run_id for (run_id,) in self.network.rows(_PARKED)]
        for run_id in parked:
            self.people.mend(run_id)
        paused = [run_id for (run_id,) in self.network.rows(_PAUSED)] if self.has_families else []
        for run_id in paused:
            self.people.go_on(run_id)
        parked += paused
        (seconds,) = self.network.ask(_NEXT)
        if self.has_families and not parked and seconds is None:
            for run_id in self.run_ids():  # which may wait for it without end
                self.people.tell(run_id)
        if not parked and seconds is not None and seconds > 0.3:
            self.scheduler.jump(seconds)
            self.network.show_time()

    def _standing(self) -> str:
        runs = self.network.rows("SELECT id, state, position, parked FROM orchestrator.runs WHERE finished_at IS NULL")
        work = self.network.rows("SELECT run_id, key, role, target, due_at, fence, child FROM orchestrator.work")
        arrivals = self.network.rows("SELECT run_id, arrival FROM orchestrator.arrivals")
        return f"runs {runs}; work {work}; arrivals {arrivals}"

    # -- verdict -------------------------------------------------------------------------------------------------------
    def _refused(self) -> list[tuple[str, str, int]]:
        """Return the attempts that were refused, each with the row that its link is kept under now."""
        with psycopg.connect(self.database_url) as connection:
            rows = connection.execute(_LINKS).fetchall()
        names = {(run_id, link): id for id, run_id, link in rows}
        return [(names.get((run_id, link), run_id), key, attempt) for run_id, link, key, attempt in self.refused]

    def _judge(self) -> Verdict:
        report = check(
            self.database_url,
            effect_log=self.effect_log,
            acknowledged=self.people.acknowledged,
            refused=self._refused(),
            unlogged=steps.UNLOGGED,
            demand=NOTHING,
        )
        broken = [*self.broken, *map(str, report.violations)]
        broken += disagreements(self.database_url, self.provider)
        if self.network.deadlocks and not self.has_families:  # whose turns post to other runs, and try again
            broken.append(f"{self.network.deadlocks} deadlocks")
        states = {name.removeprefix("state "): n for name, n in report.seen.items() if name.startswith("state ")}
        happened = (
            self.faults.happened
            + self.network.happened
            + self.broker.happened
            + self.provider.happened
            + self.people.done
        )
        happened += Counter({name: report.seen[name] for name in ("fenced", "redispatches", "effects", "runs")})
        happened += Counter(dict(self._entries))
        return Verdict(self.seed, broken, happened, Counter(states), self._schedule.hexdigest())
