"""Owns how the outside world misbehaves when it is told to, and must never do so unasked."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

What = Literal["slow", "error", "lost", "forgets"]


@dataclass(frozen=True, slots=True)
class Fault:
    """Describe a fault, and which requests meet it.

    ``slow`` waits `seconds` before anything happens. ``error`` answers 500, and nothing happened. ``lost`` does it
    and then gives no answer: after `seconds`, or as soon as the caller gives up, the connection is dropped.
    ``forgets`` does it and forgets the key. A request meets the fault if it is of the `kind` and `verb` (do, undo,
    find, page; empty for all), and its key or what was asked has the text `holding` in it; `times` bounds how often
    each key meets it.
    """

    what: What
    kind: str = ""
    verb: str = ""
    holding: str = ""
    times: int | None = None
    seconds: float = 30.0


class Faults:
    """The faults that are switched on, by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: dict[str, Fault] = {}
        self._met: Counter[tuple[str, str]] = Counter()

    def set(self, name: str, fault: Fault) -> None:
        """Switch a fault on, in place of one of the same name."""
        with self._lock:
            self._faults[name] = fault
            self._met = Counter({met: n for met, n in self._met.items() if met[0] != name})

    def clear(self) -> None:
        """Switch all off."""
        with self._lock:
            self._faults.clear()
            self._met.clear()

    def met_by(self, kind: str, verb: str, key: str, text: str) -> list[Fault]:
        """Return the faults that this request meets, and count them."""
        with self._lock:
            return list(self._meet(kind, verb, key, text))

    def _meet(self, kind: str, verb: str, key: str, text: str) -> Iterator[Fault]:
        for name, fault in self._faults.items():
            fits = fault.kind in ("", kind) and fault.verb in ("", verb) and fault.holding in f"{key} {text}"
            if fits and (fault.times is None or self._met[name, key] < fault.times):
                self._met[name, key] += 1
                yield fault
