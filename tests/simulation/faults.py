"""What goes wrong, when, and how often: a plan drawn from the seed.

Owns the choice; others do what it says.  Each seed has only some kinds of faults, so that rare ones are not always in
the shadow of frequent ones, and a bounded number of them.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import TYPE_CHECKING

from tests.simulation.network import Fate, Line
from tests.simulation.scheduler import Process, current

if TYPE_CHECKING:
    from tests.simulation.world import Simulation

_FATES = [fate for fate in Fate if fate not in (Fate.ARRIVES, Fate.STALLED)]
_EVENTS = (
    "worker killed", "child killed", "companion killed", "worker stopped", "child stopped", "companion stopped",
    "database away", "clock jumps", "warm shutdown", "order",
)  # fmt: skip
KINDS = (*(f"line {fate.value}" for fate in Fate if fate is not Fate.ARRIVES), *_EVENTS)
MUST_HAPPEN = {
    *KINDS,
    *("doorbell dropped", "doorbell doubled", "doorbell late"),
    *("step rejected", "step failed before its effect", "step failed after its effect", "step timed out"),
    *("step overran its time", "cancel", "terminate", "retry", "skip", "resolve"),
    *("turns that shared a statement", "fence taken anew"),
    *("effects", "fenced", "redispatches", "late success", "parked"),
    *("pause", "pause saga", "pause queue", "go on", "news", "revoked", "unlocked", "signal"),
}
"""What must have been there at least once in a whole set of seeds."""
_CRUCIAL = ("COMMIT", "commit_turn", "take_3", "arrivals", "SET fence")


class Faults:
    """Decides about round trips and about whole processes, as long as there is something left to go wrong.

    With a `focus`, only round trips that say this, or one of what it has bars between, are in danger, and in much.
    """

    def __init__(self, simulation: Simulation, random: Random, focus: str) -> None:
        self._simulation = simulation
        self._random = random
        self.left = random.choice([0, 4, 10, 20])
        self.happened: Counter[str] = Counter()
        self._fates = random.sample(_FATES, random.randint(1, len(_FATES)))
        self._events = random.sample(_EVENTS, random.randint(1, len(_EVENTS)))
        self._rate_of_fates = random.choice([0.0, 0.01, 0.03, 0.1])
        self._rate_of_stalls = random.choice([0.0, 0.1, 0.3])
        self._rate_of_events = random.choice([0.002, 0.01, 0.03])
        if simulation.has_families:  # which live longer, and of which more can be asked
            self.left = random.choice([0, 10, 20, 40])
            self._events += ["order"] * random.choice([0, 3, 9])
            self._rate_of_events = random.choice([0.005, 0.02, 0.05])
        self._focus = focus
        if focus:
            self.left, self._fates, self._rate_of_events = 20, _FATES, 0.0
            self._rate_of_fates, self._rate_of_stalls = 0.2, 0.3

    @property
    def over(self) -> bool:
        return self.left <= 0

    def _count(self, kind: str) -> None:
        self.left -= 1
        self.happened[kind] += 1
        self._simulation.scheduler.tell(f"fault: {kind}")

    # -- round trips ---------------------------------------------------------------------------------------------------
    def fate(self, line: Line, saying: str) -> Fate:
        """Decide what becomes of a round trip."""
        if self._focus and not any(words in saying for words in self._focus.split("|")):
            return Fate.ARRIVES
        if (self._focus or "commit_turn" in saying) and not self.over and self._random.random() < self._rate_of_stalls:
            self._count(f"line {Fate.STALLED.value}")
            return Fate.STALLED
        rate = self._rate_of_fates * (3 if any(word in saying for word in _CRUCIAL) else 0.5)
        if self.over or self._random.random() >= rate:
            return Fate.ARRIVES
        fate = self._random.choice(self._fates)
        self._count(f"line {fate.value}")
        return fate

    def stall(self, process: Process) -> None:
        """Let who is about to tell of an outcome stand still with all of its worker, for longer than its lease."""
        until = self._simulation.scheduler.monotonic + self._random.choice([4.0, 8.0, 20.0])
        for node in self._simulation.nodes:
            if process in node.processes:
                for each in node.processes:
                    each.stop(until)

    # -- processes -----------------------------------------------------------------------------------------------------
    def after_move(self) -> None:
        """Let something happen between two moves."""
        if self.over or self._random.random() >= self._rate_of_events:
            return
        kind = self._random.choice(self._events)
        if getattr(self, "_" + kind.replace(" ", "_"))():
            self._count(kind)

    def _worker_killed(self) -> bool:
        node = self._simulation.any_node()
        if node is not None:
            node.kill()
        return node is not None

    def _child_killed(self) -> bool:
        node = self._simulation.any_node()
        if node is None or not node.children:
            return False
        busy = [child for child in node.children if child.busy] or node.children
        node.kill_child(self._random.choice(busy))
        return True

    def _companion_killed(self) -> bool:
        node = self._simulation.any_node()
        if node is not None:
            self._simulation.scheduler.doom(node.beside)
        return node is not None

    def _worker_stopped(self) -> bool:
        node = self._simulation.any_node()
        return node is not None and self._stop(*node.processes)

    def _child_stopped(self) -> bool:
        node = self._simulation.any_node()
        busy = [child.process for child in node.children if child.busy] if node is not None else []
        return bool(busy) and self._stop(self._random.choice(busy))

    def _companion_stopped(self) -> bool:
        node = self._simulation.any_node()
        return node is not None and self._stop(node.beside)

    def _stop(self, *processes: Process) -> bool:
        until = self._simulation.scheduler.monotonic + self._random.choice([0.2, 1.0, 6.0, 12.0])
        for process in processes:
            process.stop(until)
        return True

    def _database_away(self) -> bool:
        self._simulation.network.cut_all(self._random.choice([0.0, 0.3, 3.0]))
        return True

    def _clock_jumps(self) -> bool:
        self._simulation.scheduler.jump(self._random.choice([0.15, 2.0, 10.0, 4000.0]))
        return True

    def _warm_shutdown(self) -> bool:
        node = self._simulation.any_node()
        if node is not None:
            node.stop()
        return node is not None

    def _order(self) -> bool:
        assert current() is None
        return self._simulation.people.order_something()
