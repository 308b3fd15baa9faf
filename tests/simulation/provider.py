"""The world outside Postgres, as steps meet it: a provider that keeps its contract, and steps that do not behave.

Owns what is there and what may never come again, and what each attempt of a step does, which depends on nothing but
the seed, the thing, the role and the attempt.  Must never look at the engine's tables.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass

from orchestrator import Rejected, step
from tests.proof.effects import EffectLog
from tests.simulation.scheduler import Scheduler

limit: ContextVar[float] = ContextVar("limit")
"""The instant, by the process's clock, at which the running attempt is to be interrupted."""


class TimeIsUp(Exception):
    """The start-to-close timeout of a step, as the worker's timer raises it inside of it."""


@dataclass(frozen=True, slots=True)
class Conduct:
    """What an attempt does: how long it takes before and after its effect, and how it ends."""

    before_s: float = 0.0
    after_s: float = 0.0
    end: str = "returns"  # rejected, fails, unanswered (fails after its effect)
    deaf: bool = False  # cannot be interrupted


_FORWARD = (
    (120, Conduct()),
    (140, Conduct(before_s=0.5)),
    (155, Conduct(after_s=0.5)),
    (165, Conduct(before_s=1.0, after_s=2.0)),
    (185, Conduct(end="rejected")),
    (198, Conduct(0.1, end="rejected")),
    (212, Conduct(end="fails")),
    (230, Conduct(end="unanswered")),
    (236, Conduct(before_s=60)),
    (242, Conduct(after_s=60)),
    (246, Conduct(before_s=9, deaf=True)),
    (250, Conduct(after_s=9, deaf=True)),
    (256, Conduct(after_s=0.01)),
)
_BACKWARD = (
    (180, Conduct()),
    (200, Conduct(before_s=0.3)),
    (220, Conduct(end="fails")),
    (238, Conduct(end="unanswered")),
    (246, Conduct(after_s=9, deaf=True)),
    (256, Conduct(end="rejected")),
)


class Provider:
    """Remembers every effect and every undo; a do that comes after its undo is refused."""

    def __init__(self, seed: int, scheduler: Scheduler, log: EffectLog, *, calm: bool) -> None:
        self.present: set[int] = set()
        self.refused: set[int] = set()
        self.log = log
        self.happened: Counter[str] = Counter()
        self._seed = seed
        self._scheduler = scheduler
        self._calm = calm

    # -- what steps do -------------------------------------------------------------------------------------------------
    def do(self, thing: int) -> None:
        """Make `thing`, as an attempt that behaves as the seed has it.  Raises: as the attempt ends."""
        conduct = self._conduct(_FORWARD, thing)
        self._begin(conduct)
        if thing in self.refused:
            raise Rejected(f"{thing} was undone")
        self.present.add(thing)
        self.log.effect()
        self._end(conduct)

    def undo(self, thing: int) -> None:
        """Take `thing` back, and see to it that it never comes again."""
        conduct = self._conduct(_BACKWARD, thing)
        self._begin(conduct)
        self.present.discard(thing)
        self.refused.add(thing)
        self.log.effect()
        self._end(conduct)

    def probe(self, thing: int) -> bool:
        """Tell whether `thing` is there; if not, it never will be."""
        conduct = self._conduct(_BACKWARD, thing)
        if conduct.end == "rejected":
            conduct = Conduct(end="fails")
        self._begin(conduct)
        self._end(conduct, told=False)
        return self.settle(thing)

    def work(self, thing: int) -> None:
        """Take time and end in some way, without an effect at the provider."""
        conduct = self._conduct(_FORWARD, thing)
        self._begin(conduct)
        self._end(conduct)

    def once(self, n: int) -> int:
        """Run as the function of a ``saga.once``."""
        self.happened[f"once {n}"] += 1
        chance = _chance(self._seed, "once", n, self.happened[f"once {n}"])
        self._scheduler.yield_()
        if chance < 50 and not self._calm:
            raise ConnectionError("no luck")
        return n

    def rest(self, seconds: float) -> None:
        """Take time.  Raises: TimeIsUp."""
        self._linger(seconds, deaf=False)

    def settle(self, thing: int) -> bool:
        """Answer whether `thing` is there, for good."""
        if thing not in self.present:
            self.refused.add(thing)
        return thing in self.present

    # -- conduct -------------------------------------------------------------------------------------------------------
    def _conduct(self, table: tuple[tuple[int, Conduct], ...], thing: int) -> Conduct:
        context = step.current()
        chance = _chance(self._seed, thing, context.undoes != "", table is _FORWARD, context.attempt)
        return Conduct() if self._calm else next(conduct for below, conduct in table if chance < below)

    def _begin(self, conduct: Conduct) -> None:
        self._linger(conduct.before_s, conduct.deaf)
        if conduct.end == "rejected":
            self.happened["step rejected"] += 1
            raise Rejected("no")
        if conduct.end == "fails":
            self.happened["step failed before its effect"] += 1
            raise ConnectionError("no luck")

    def _end(self, conduct: Conduct, *, told: bool = True) -> None:
        self._linger(conduct.after_s, conduct.deaf)
        if conduct.end == "unanswered":
            self.happened["step failed after its effect"] += 1
            raise ConnectionError("no answer")
        if told:
            self.log.returned()

    def _linger(self, seconds: float, deaf: bool) -> None:
        left = limit.get() - self._scheduler.monotonic
        self._scheduler.wait(seconds if deaf else max(0.0, min(seconds, left)))
        if self._scheduler.monotonic < limit.get():
            return
        if deaf:
            self.happened["step overran its time"] += 1
        else:
            self.happened["step timed out"] += 1
            raise TimeIsUp


def _chance(*what: object) -> int:
    return hashlib.sha256(repr(what).encode()).digest()[0]
