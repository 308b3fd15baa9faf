"""A broker that keeps no promise: doorbells are dropped, doubled, late, and overtake each other.

Owns the messages.  Must never decide what they mean: they carry nothing but the name of a queue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from tests.simulation.scheduler import Scheduler

_EXPIRES_S = 10.0


@dataclass(frozen=True, slots=True)
class _Message:
    queue: str
    due: float
    expires: float


class Broker:
    """Carries doorbells; `trouble` of them, from 0 to 1, are not carried as one would wish."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._messages: list[_Message] = []
        self.trouble = 0.0
        self.happened: Counter[str] = Counter()

    def ring(self, queue: str, times: int = 1) -> None:
        """Take doorbells over."""
        for _ in range(times):
            random = self._scheduler.random
            fate = random.choice(["dropped", "doubled", "late"]) if random.random() < self.trouble else "carried"
            if fate != "carried":
                self.happened[f"doorbell {fate}"] += 1
            if fate != "dropped":
                self._put(queue, random.choice([0.05, 0.5, 3.0, 12.0]) if fate == "late" else 0.0)
            if fate == "doubled":
                self._put(queue, 0.0)

    def _put(self, queue: str, delay_s: float) -> None:
        now = self._scheduler.monotonic
        self._messages.append(_Message(queue, now + delay_s, now + _EXPIRES_S))

    def has(self, queues: Collection[str]) -> bool:
        """Tell whether a doorbell of these queues can be delivered."""
        now = self._scheduler.monotonic
        self._messages = [message for message in self._messages if message.expires > now]
        return any(message.queue in queues and message.due <= now for message in self._messages)

    def take(self, queues: Collection[str]) -> bool:
        """Deliver one doorbell of these queues, any of them; False if there is none."""
        now = self._scheduler.monotonic
        able = [
            message for message in self._messages if message.queue in queues and message.due <= now < message.expires
        ]
        if able:
            self._messages.remove(self._scheduler.random.choice(able))
        return bool(able)

    @property
    def empty(self) -> bool:
        return not any(message.expires > self._scheduler.monotonic for message in self._messages)
