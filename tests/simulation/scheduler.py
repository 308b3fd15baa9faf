"""One thread, many actors, one of them moving at a time: who is next is drawn from the seed.

Owns simulated time and the choice.  An actor is a greenlet; it hands itself over wherever a real process could be
overtaken: at every round trip to the database, when it waits, and inside steps.  Must never know what an actor does.

There are two clocks, as there are on any machine: `monotonic` only ever creeps on and is what processes measure with,
`wall` is the database's and may jump.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from greenlet import GreenletExit, getcurrent, greenlet


class Killed(GreenletExit):
    """SIGKILL: thrown into an actor, which must not go on."""


class Waits(Protocol):
    """What an actor hangs in inside of the database."""

    def settle(self) -> bool:
        """Look again; True if it goes on."""
        ...


@dataclass(eq=False)
class Process:
    """Actors that live and die, and stand still, together."""

    name: str
    actors: list[Actor] = field(default_factory=list)
    stopped_until: float = 0.0
    dead: bool = False
    on_death: list[Callable[[], None]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether it has died, or has done all that it had to do."""
        return self.dead or (bool(self.actors) and all(actor.over for actor in self.actors))

    def stop(self, until: float) -> None:
        """SIGSTOP, and SIGCONT at `until`."""
        self.stopped_until = max(self.stopped_until, until)


class Actor:
    """A greenlet of a process; `wake_at` or `ready` say when it wants to go on."""

    def __init__(self, process: Process, name: str, run: Callable[[], Any], hub: greenlet) -> None:
        self.process = process
        self.name = name
        self.wake_at = 0.0
        self.ready: Callable[[], bool] | None = None
        self.hangs_in: Waits | None = None
        self.greenlet: Any = greenlet(run, parent=hub)
        self.greenlet.actor = self

    @property
    def over(self) -> bool:
        return bool(self.greenlet.dead)

    def wants(self, now: float) -> bool:
        if self.process.stopped_until > now or self.hangs_in is not None:
            return False
        return self.wake_at <= now or (self.ready is not None and self.ready())


def current() -> Actor | None:
    """Return the actor that moves now; None outside of the simulation."""
    return getattr(getcurrent(), "actor", None)


class Scheduler:
    """The hub: lets actors move one after the other, and time pass when nobody can."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.monotonic = 1000.0
        self.wall = 1_800_000_000.0
        self.moves = 0
        self.actors: list[Actor] = []
        self.on_move: list[Callable[[], None]] = []
        self.tell: Callable[[str], None] = lambda line: None
        self._doomed: list[Process] = []
        self._hub = getcurrent()
        self._last: Actor | None = None
        # How this seed schedules: how long a move takes, and how readily one actor is overtaken by another.
        self._pace_s = random.choice([0.0002, 0.001, 0.005, 0.03])
        self._stickiness = random.choice([0.0, 0.5, 0.9])

    # -- called by actors ----------------------------------------------------------------------------------------------
    def yield_(self) -> None:
        """Let others move, perhaps."""
        self.wait(0.0)

    def wait(self, seconds: float, ready: Callable[[], bool] | None = None) -> None:
        """Sleep for so long, or until `ready`."""
        actor = current()
        assert actor is not None
        actor.wake_at, actor.ready = self.monotonic + seconds, ready
        self._hand_over(actor)

    def hang(self, waits: Waits) -> None:
        """Stand still until the database lets this actor go on."""
        actor = current()
        assert actor is not None
        actor.hangs_in = waits
        self._hand_over(actor)

    def _hand_over(self, actor: Actor) -> None:
        if actor.process.dead:
            raise Killed
        self._hub.switch()
        if actor.process.dead:
            raise Killed

    # -- processes -----------------------------------------------------------------------------------------------------
    def spawn(self, process: Process, name: str, run: Callable[[], Any]) -> Actor:
        """Let `run` be an actor of `process`."""
        actor = Actor(process, name, run, self._hub)
        process.actors.append(actor)
        self.actors.append(actor)
        return actor

    def doom(self, process: Process) -> None:
        """SIGKILL a process; its actors do not move any more."""
        if not process.dead:
            process.dead = True
            self.tell(f"{process.name} is killed")
            self._doomed.append(process)
        if current() is None:
            self._bury()

    def die(self) -> None:
        """Called by an actor of a process that is dead: does not return."""
        actor = current()
        assert actor is not None and actor.process.dead
        self._hand_over(actor)

    def _bury(self) -> None:
        while self._doomed:
            process = self._doomed.pop(0)
            for close in process.on_death:
                close()
            for actor in process.actors:
                if not actor.over:
                    actor.greenlet.throw(Killed)
            self.actors = [actor for actor in self.actors if actor.process is not process]

    def end(self) -> None:
        """Nobody moves any more."""
        for process in dict.fromkeys(actor.process for actor in self.actors):
            self.doom(process)

    # -- the loop ------------------------------------------------------------------------------------------------------
    def move(self) -> None:
        """Let one actor move, or time pass until one can."""
        self._settle()
        able = [actor for actor in self.actors if actor.wants(self.monotonic)]
        if not able:
            self._pass_time()
            return
        actor = self._last if self._last in able and self.random.random() < self._stickiness else None
        actor = actor or self.random.choice(able)
        self._last = actor
        self.moves += 1
        if self.random.random() < 0.2:
            self.advance(self.random.random() * 2 * self._pace_s)
        actor.greenlet.switch()
        self._bury()
        self.actors = [actor for actor in self.actors if not actor.over]
        for listener in self.on_move:
            listener()

    def _settle(self) -> None:
        """Who hangs goes on as soon as the database lets them: nothing runs there while somebody else moves."""
        for actor in self.actors:
            if actor.hangs_in is not None and actor.hangs_in.settle():
                actor.hangs_in = None

    def _pass_time(self) -> None:
        later = [max(actor.wake_at, actor.process.stopped_until) for actor in self.actors if actor.hangs_in is None]
        assert later, "everybody hangs in the database"
        self.advance(max(0.0, min(later) - self.monotonic) + 1e-6)

    def advance(self, seconds: float) -> None:
        """Let time pass, on both clocks."""
        self.monotonic += seconds
        self.wall += seconds

    def jump(self, seconds: float) -> None:
        """Let the database's clock jump; processes measure nothing of it."""
        self.wall += seconds
        self.tell(f"the database's clock jumps by {seconds:.3f} s")
