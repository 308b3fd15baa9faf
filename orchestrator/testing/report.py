"""What an exploration found, in words that tell what happened to the saga and how to see it again.

Owns those words.  Must never run anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from orchestrator.errors import message_of
from orchestrator.store.turns import Taken
from orchestrator.testing.faults import EVERY, Fault, Kind
from orchestrator.testing.handle import EnvironmentRun

_OTHERS: Final = 10
_ROOM: Final = 120
_CODE: Final = {
    Kind.REJECTED: '"rejected"',
    Kind.LOST: '"unknown"',
    Kind.SILENT: '"unknown", effect=False',
    Kind.DIED_BEFORE: '"crash", at="before"',
    Kind.DIED_AFTER: '"crash", at="after"',
    Kind.DIED_COMMITTED: '"crash", at="committed"',
}


@dataclass(frozen=True, slots=True)
class Schedule:
    """What is to go wrong in one run, in the order in which it was added."""

    faults: tuple[Fault, ...] = ()

    def __str__(self) -> str:
        return "; ".join(map(str, self.faults)) or "nothing went wrong"

    def code(self) -> Iterator[str]:
        """Yield the lines that make the same happen in an environment."""
        for fault in self.faults:
            which = "" if fault.attempt == EVERY else f", attempt={fault.attempt}"
            key = f', key="{fault.key}"' if fault.key else ""
            if fault.kind in _CODE:
                yield f'env.fail("{fault.task}", {_CODE[fault.kind]}{which}{key})'
            else:
                yield f"# {fault}"


@dataclass(frozen=True, slots=True)
class Played:
    """A schedule that ended badly: what is wrong, how the run ended, and its journal as lines."""

    schedule: Schedule
    problem: str
    ended: str
    journal: tuple[str, ...]
    calls: tuple[str, ...]

    @classmethod
    def of(cls, schedule: Schedule, run: EnvironmentRun, problem: str) -> Played:
        """Take down how a run ended, before the next schedule wipes it away."""
        error = run.error
        why = f": {error.get('type')}: {message_of(error)}" if error else ""
        calls = [f"{call.name}{call.args}" + (f" raised {call.error!r}" if call.error else "") for call in run.calls]
        return cls(schedule, problem, f"{run.state}{why}"[:600], tuple(_journal(run)), tuple(calls))

    def lines(self, saga: str) -> Iterator[str]:
        """Yield the whole story."""
        yield "What was done to it:"
        yield from (f"  {n}. {fault}" for n, fault in enumerate(self.schedule.faults, 1))
        if not self.schedule.faults:
            yield "  nothing; it fails by itself"
        yield f"What is wrong:\n  {self.problem}"
        yield f"How the run ended:\n  {self.ended}"
        yield "Its journal:"
        yield from (f"  {line}" for line in self.journal)
        yield "The code that ran:"
        yield from (f"  {call}" for call in self.calls)
        yield "To see it again, in a test with an environment `env`:"
        yield from (f"  {line}" for line in self.schedule.code())
        yield f"  run = env.run({saga.rpartition('.')[2]}, ...)"


def _journal(run: EnvironmentRun) -> Iterator[str]:
    from orchestrator.cli.timeline import events  # with click and rich; only a report needs them

    history = run.history
    started = datetime.fromisoformat(history["started"])
    rows = [(seq, datetime.fromisoformat(at), forms) for seq, (at, forms) in enumerate(history["journal"])]
    for event in events(rows, _ROOM):
        yield f"+{(event.at - started).total_seconds():.3f} s {event.mark} {event.text}"
        yield from (f"      {line}" for line in event.details)


@dataclass(slots=True)
class Exploration:
    """How many schedules were tried, how their runs ended, and which of them broke something; printable."""

    saga: str
    seed: int
    tried: int = 0
    exhausted: bool = False  # max_schedules was reached before every schedule was tried
    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    points: set[tuple[str, str, str]] = field(default_factory=set)
    failures: list[Played] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was broken."""
        return not self.failures

    def count(self, schedule: Schedule, run: EnvironmentRun, seen: Sequence[Taken]) -> None:
        """Count a schedule that was played."""
        self.tried += 1
        self.ends[run.state] += 1
        self.kinds.update(str(fault.kind) for fault in schedule.faults)
        self.points |= {(taken.run_id, taken.key, taken.role) for taken in seen}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        ends = ", ".join(f"{n} {state}" for state, n in self.ends.most_common())
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.kinds.most_common())
        more = "; there are more: raise max_schedules" if self.exhausted else ""
        summary = [
            f"{self.tried} schedules of {len(self.points)} boundaries in {self.seconds:.1f} s, seed {self.seed}{more}",
            f"ended: {ends}",
            f"faults: {kinds or 'none'}",
        ]
        if self.ok:
            yield f"{self.saga} kept its promises."
            yield from summary
            return
        yield f"{self.saga} breaks in {len(self.failures)} of the schedules that were tried; the shortest:"
        yield ""
        yield from self.failures[0].lines(self.saga)
        if len(self.failures) > 1:
            yield "Other schedules that break it:"
            yield from (f"  - {other.schedule}: {other.problem}"[:300] for other in self.failures[1 : _OTHERS + 1])
        yield from summary


class InvariantBroken(AssertionError):
    """Tell which schedule of faults broke a saga; the text is the report, `exploration` has all of it."""

    def __init__(self, exploration: Exploration) -> None:
        super().__init__(str(exploration))
        self.exploration = exploration
