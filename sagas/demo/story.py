"""Owns the words of the demo: an act shows one saga, in stories; a job is one run of a story."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tasks.money import Money

COMPLETED, UNDONE, PARKED = "completed", "undone", "parked"


@dataclass(frozen=True, slots=True)
class Story:
    """Describe one kind of request: how many of it, what is special about it, how it must end."""

    share: int
    says: str
    ends: str
    twist: str = ""


@dataclass(frozen=True, slots=True)
class Promise:
    """Pair a promise with the SQL for its counterexamples and the SQL that counts what was examined."""

    says: str
    broken: str
    examined: str


@dataclass(frozen=True, slots=True)
class Shown:
    """Choose a run to be looked at with an operator's command, by its twist and how it ended."""

    title: str
    command: str
    twist: str
    state: str


@dataclass(frozen=True, slots=True)
class Act:
    """Show one saga: what it does, where others fall, what is played, and what must hold in the end."""

    name: str
    saga: Any
    does: str
    trap: str
    stories: tuple[Story, ...]
    make: Callable[[str, str, random.Random], Any]
    promises: tuple[Promise, ...]
    shown: tuple[Shown, ...]
    first: bool = False  # its jobs are started before all others
    has_effects_outside: bool = True
    middle: Callable[[], float] | None = None  # how far its longest job is, from 0 to 1: the worker dies in its middle


@dataclass(frozen=True, slots=True)
class Job:
    """A request to start, and how it must end."""

    id: str
    act: Act
    request: Any
    story: Story

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return what the saga is started with."""
        return () if self.request is None else (self.request,)

    @property
    def money(self) -> Money | None:
        """Return the amount at stake, if there is one."""
        found: Money | None = getattr(self.request, "money", getattr(self.request, "total", None))
        return found
