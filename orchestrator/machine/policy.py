"""When a failed attempt is tried again, and what a step declares about its effect.

Owns the arithmetic of retries and every default of it.  Must never look at a clock.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any

from orchestrator.errors import DefinitionError

LONGEST_PAUSE_S = 1e9  # 31 years; what is added to an instant has to give one


class Effect(StrEnum):
    """What a step does to the world outside, as its author declares it."""

    NONE = "none"
    """Read-only: nothing to undo, whatever happened."""
    COMPENSATABLE = "compensatable"
    """Undone by its compensation; implied by ``compensate=``."""
    PIVOT = "pivot"
    """The point of no return: once it succeeded the run only goes forward."""
    RETRIABLE = "retriable"
    """Succeeds if tried often enough; for steps after the pivot."""


def must_be_timedelta(option: str, value: Any) -> None:
    """Refuse a bare number, which does not say what it counts.  Raises: DefinitionError."""
    if not isinstance(value, timedelta):
        raise DefinitionError(f"{option} takes a timedelta, such as timedelta(seconds=30), not {value!r:.80}")


def _must_be_errors(types: Any) -> None:
    """Refuse what would never match: a lone name is a sequence of letters.  Raises: DefinitionError."""
    several = isinstance(types, (tuple, list, set, frozenset))
    if not several or not all(
        isinstance(each, str) or (isinstance(each, type) and issubclass(each, BaseException)) for each in types
    ):
        raise DefinitionError(
            "RetryPolicy: non_retryable_error_types takes a tuple of exception classes, or of their names, such as "
            f"(CardDeclined, 'ValidationError'), not {types!r:.80}"
        )


def is_among(names: Collection[str], class_names: Collection[str]) -> bool:
    """Tell whether an error with these qualified class names (its own and its bases') is one of those that are named.

    A class that is declared within another one, such as ``Account.DoesNotExist`` of Django, has its last name, too.
    """
    return any(name in class_names or name in map(_last, class_names) for name in names)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Say how often and when a step is tried again; the five fields are Temporal's.

    The pause after the n-th failed attempt is ``initial_interval * backoff_coefficient ** (n - 1)``, at most
    ``maximum_interval``.  `non_retryable_error_types` are exception classes, or names of them (a class matches its
    subclasses too): an attempt that ends in one of them certainly had no effect, and is not tried again.

    Raises: DefinitionError for values that make no sense.
    """

    initial_interval: timedelta = timedelta(seconds=1)
    backoff_coefficient: float = 2.0
    maximum_interval: timedelta = timedelta(minutes=1)
    maximum_attempts: int = 5
    non_retryable_error_types: tuple[type[BaseException] | str, ...] = ()

    def __post_init__(self) -> None:
        many: Any = self.maximum_attempts
        if type(many) is not int or not 1 <= many < 2**31:
            raise DefinitionError("RetryPolicy: maximum_attempts is a whole number, 1 or more: attempts are bounded")
        must_be_timedelta("RetryPolicy: initial_interval", self.initial_interval)
        must_be_timedelta("RetryPolicy: maximum_interval", self.maximum_interval)
        if self.initial_interval < timedelta(0) or self.maximum_interval < self.initial_interval:
            raise DefinitionError("RetryPolicy: intervals must satisfy 0 <= initial_interval <= maximum_interval")
        if not 1 <= self.backoff_coefficient < math.inf:
            raise DefinitionError("RetryPolicy: backoff_coefficient must be 1.0 or more, and finite")
        _must_be_errors(self.non_retryable_error_types)

    def delay(self, attempts: int) -> timedelta:
        """Return the pause after `attempts` failed attempts (1 or more)."""
        try:
            seconds = self.initial_interval.total_seconds() * self.backoff_coefficient ** (attempts - 1)
        except OverflowError:
            return self.maximum_interval
        return min(timedelta(seconds=min(seconds, LONGEST_PAUSE_S)), self.maximum_interval)

    @property
    def error_names(self) -> tuple[str, ...]:
        """The names of the non-retryable errors; those of classes say within what they are declared."""
        return tuple(e if isinstance(e, str) else e.__qualname__ for e in self.non_retryable_error_types)

    def refuses(self, class_names: Collection[str]) -> bool:
        """Tell whether an error with these class names (its own and its bases') is not to be tried again."""
        return is_among(self.error_names, class_names)

    def encode(self) -> list[Any]:
        """Return the journal form: seconds, coefficient, seconds, attempts, names."""
        return [
            min(self.initial_interval.total_seconds(), LONGEST_PAUSE_S),
            self.backoff_coefficient,
            min(self.maximum_interval.total_seconds(), LONGEST_PAUSE_S),
            self.maximum_attempts,
            list(self.error_names),
        ]

    @classmethod
    def decode(cls, form: list[Any]) -> RetryPolicy:
        """Return the policy of a journal form."""
        initial, coefficient, maximum, attempts, names = form
        return cls(timedelta(seconds=initial), coefficient, timedelta(seconds=maximum), attempts, tuple(names))


_RATE = re.compile(r"(\d+(?:\.\d+)?)/([smh])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_between(rate: Any) -> float:
    """Return the seconds between two begins at a rate such as ``100/s``, ``5/m`` or ``1000/h``.

    Raises: DefinitionError for anything else, and for a rate of zero.
    """
    found = _RATE.fullmatch(rate) if isinstance(rate, str) else None
    if found is None or not float(found[1]):
        raise DefinitionError(
            f"a rate is a positive number for each second, minute or hour, like '100/s', not {rate!r}"
        )
    return _SECONDS[found[2]] / float(found[1])


@dataclass(frozen=True, slots=True)
class Limit:
    """How often a step may begin, and how many of it may be under way at once, over all workers.

    Raises: DefinitionError for values that make no sense.
    """

    rate: str | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        if self.rate is not None:
            seconds_between(self.rate)
        many: Any = self.concurrency
        if many is not None and (type(many) is not int or many < 1):
            raise DefinitionError(f"concurrency is a whole number of 1 or more, not {many!r}")

    def encode(self, gate: str) -> dict[str, Any]:
        """Return the form in which a journal and a row of work have it: the gate, and its limits at that time."""
        form: dict[str, Any] = {"gate": gate}
        if self.rate is not None:
            form |= {"every": seconds_between(self.rate), "rate": self.rate}
        if self.concurrency is not None:
            form["most"] = self.concurrency
        return form


STEP_RETRY = RetryPolicy()
# 1 s doubling to 10 min reaches 24 hours at the 153rd attempt; then an operator is asked.
COMPENSATION_RETRY = RetryPolicy(maximum_interval=timedelta(minutes=10), maximum_attempts=153)
START_TO_CLOSE = timedelta(minutes=5)
LONGEST_TIMEOUT = timedelta(days=3650)


def is_priority(value: object) -> bool:
    """Tell whether a value is a priority: a whole number from 0 to 9; work of another one would never be taken."""
    return type(value) is int and 0 <= value <= 9
