"""A postman between two brokers: takes what is published to one to who listens at the other, and is not to be trusted.

Owns what can go wrong with a message that is under way.  A real process of messages: nothing of the engine is replaced.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from kombu import Connection, Producer, Queue

from tests.faults.load import QUEUE


@dataclass
class Habits:
    """How a postman carries: each message so many times, some not at all, some late; kept ones may come again."""

    copies: int = 1
    eaten: float = 0.0
    longest_delay_s: float = 0.0


@dataclass
class Postman:
    """Carries messages of the one queue from `source` to `target` until it is sent home."""

    source: str
    target: str
    habits: Habits
    seed: int = 1
    carried: int = 0
    eaten: int = 0
    repeated: int = 0
    kept: list[Any] = field(default_factory=list)
    """Everything that was ever carried: yesterday's messages."""

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)
        self._late: deque[tuple[float, Any]] = deque()
        self._home = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="postman", daemon=True)

    def __enter__(self) -> Postman:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._home.set()
        self._thread.join(20.0)

    def replay(self) -> int:
        """Deliver again all that was ever delivered, as it was; returns how many."""
        messages = list(self.kept)
        with Connection(self.target) as target:
            producer = Producer(target.default_channel, auto_declare=False)
            for message in messages:
                self._deliver(producer, message)
        self.repeated += len(messages)
        return len(messages)

    def _carry(self) -> None:
        while not self._home.is_set():
            with contextlib.suppress(OSError), Connection(self.source) as source, Connection(self.target) as target:
                queue = Queue(QUEUE, routing_key=QUEUE, channel=source.default_channel)
                queue.declare()
                producer = Producer(target.default_channel, auto_declare=False)
                while not self._home.is_set():
                    self._take(queue, producer)

    def _take(self, queue: Queue, producer: Producer) -> None:
        while self._late and self._late[0][0] < time.monotonic():
            self._deliver(producer, self._late.popleft()[1])
        message = queue.get(no_ack=True)
        if message is None:
            self._home.wait(0.002)
            return
        self.carried += 1
        if self._dice.random() < self.habits.eaten:
            self.eaten += 1
            return
        self.kept.append(message)
        self.repeated += self.habits.copies - 1
        for _ in range(self.habits.copies):
            if self.habits.longest_delay_s:
                due = time.monotonic() + self._dice.uniform(0, self.habits.longest_delay_s)
                self._late.append((due, message))
                self._late = deque(sorted(self._late, key=lambda item: item[0]))
            else:
                self._deliver(producer, message)

    def _deliver(self, producer: Producer, message: Any) -> None:
        kept = ("correlation_id", "delivery_mode", "priority", "reply_to")
        properties = {name: value for name, value in message.properties.items() if name in kept}
        producer.publish(
            message.body, exchange="", routing_key=QUEUE, content_type=message.content_type,
            content_encoding=message.content_encoding, headers=message.headers, retry=False, **properties,
        )  # fmt: skip
