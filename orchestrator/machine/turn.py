"""A turn: (saga function, journal, arrivals, now) -> (new entries, wanted work, state).

Owns the order of things within a turn.  Must never do IO: it is computed before the transaction that commits it, and
an `Execution` whose commit failed, or may have failed, is thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import weakref
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from orchestrator.errors import DefinitionError, UsageError, describe_exception
from orchestrator.machine import blocks, family
from orchestrator.machine.code import ContinueAsNew, SagaCode, settled_keys
from orchestrator.machine.decide import Decisions
from orchestrator.machine.fold import Fold, RunInfo
from orchestrator.machine.journal import (
    Arrival,
    Asked,
    Carried,
    CodeBegan,
    Continued,
    DeadlinePassed,
    Entry,
    Json,
    Late,
    NewChild,
    Parked,
    Post,
    Raised,
    Returned,
    Terminate,
    Withdrawn,
    Work,
)
from orchestrator.machine.record import Step
from orchestrator.machine.states import TERMINAL, RunState

CODE_ERRORS = (
    TypeError, NameError, AttributeError, ImportError, AssertionError, KeyError, IndexError,
    UsageError, DefinitionError,
)  # fmt: skip


_HEARD = 200  # ids of signals that a link knows of those before it
NOTHING_TO_SUM_UP: tuple[Any, ...] = (None, (), False, {}, {})


class CodeMissing(Exception):
    """Tell that the run wants its saga function and this process does not have it; nothing was decided."""


class CodeError(Exception):
    """Tell that the saga function itself is wrong; `error` describes it."""

    def __init__(self, error: dict[str, Json]) -> None:
        super().__init__(str(error.get("message")))
        self.error = error


@dataclass(slots=True)
class Turn:
    """What one turn wants committed, all together or not at all.

    `at` is the instant of the journal row, `before` that of the row before it, `wake` when the run needs its next turn
    by itself (None: never).
    """

    position: int
    at: datetime
    before: datetime
    entries: list[Entry]
    work: list[Work]
    withdraw: list[str]
    corrections: list[Late]
    state: RunState
    wake: datetime | None
    was_ended: bool
    children: list[NewChild] = field(default_factory=list)
    posts: list[Post] = field(default_factory=list)
    locks: list[Step] = field(default_factory=list)
    unlocks: list[str] = field(default_factory=list)
    seed: list[Entry] = field(default_factory=list)  # the first row of the journal that a run is continued with


@dataclass(frozen=True, slots=True)
class Script:
    """The author's side of a saga: makes the main coroutine for an input; says what a code error means."""

    main: Callable[[Json], Coroutine[Any, Any, Json]]
    code_errors_park: bool = True


class Execution:
    """A run as one process knows it: its fold, and its live coroutine if it has one.

    A run of n steps costs O(n) however its turns are spread over processes: every journal row is folded once here, and
    saga code is resumed from where it stopped.
    """

    def __init__(self, info: RunInfo, script: Script | None) -> None:
        self.info = info
        self.fold = Fold(info)
        self.script = script
        self.code: SagaCode | None = None
        self._lost: weakref.finalize[[], Execution] | None = None
        self.wake: datetime | None = None
        self.committed_wake: datetime | None = None  # what the database knows; kept by whoever commits
        self.committed_summary: tuple[Any, ...] = NOTHING_TO_SUM_UP
        self.published: dict[str, Json] = {}  # what its code shows, as far as it was resumed here
        self.tags: dict[str, Json] = {}
        self._delivered: list[tuple[datetime | None, list[str]]] = []
        self._undelivered: list[tuple[datetime | None, list[str]]] = []
        self._left_blocks: list[str] = []  # locks whose block was left, and that may have to be kept
        self.is_ahead = False  # whether its code has asked for something that no turn has recorded

    def catch_up(self, rows: Iterable[tuple[datetime, list[Entry]]]) -> None:
        """Fold journal rows that were committed elsewhere."""
        for at, entries in rows:
            position = self.fold.position
            self.fold.apply_row(at, entries)
            if self.fold.begun_with == position:
                self._undelivered.clear()  # its code knows nothing of the time before
            self._undelivered.append((at, settled_keys(entries)))

    def turn(self, arrivals: Iterable[Arrival], now: datetime, park: Parked | None = None) -> Turn:
        """Compute the next turn at `now` (aware UTC; never earlier than the turn before).

        With `park` saga code is left alone and the run is parked instead.  Raises: DriftError, CodeError, CodeMissing,
        BlockedError; then nothing of this execution may be committed, and it is to be loaded again.
        """
        fold = self.fold
        was_ended = fold.state in TERMINAL
        at = max(now, fold.at)
        decisions = _Recorder(fold, at, self._left_blocks)
        for arrival in sorted(arrivals, key=_comes_last):
            decisions.take(arrival)
        if park is not None and fold.wants_code:
            decisions.record(park)
        deadline = self.info.deadline
        if deadline and at >= deadline and not (fold.deadline_passed or fold.reported or fold.state in TERMINAL):
            decisions.record(DeadlinePassed())
        decisions.answer()
        told = len(decisions.entries)
        self._undelivered.append((at, settled_keys(decisions.entries)))
        decisions.conclude()
        early = at < self.info.started  # somebody left something for a run whose start is set for later
        if fold.wants_code and not early:
            self._begin_code(decisions)
        while fold.wants_code and not early:
            self._run_code(decisions)
            decisions.withdraw_unborn()
            decisions.settle_down()
            answered = settled_keys(decisions.entries[told:])
            if not answered:
                break
            told = len(decisions.entries)
            self._undelivered.append((None, answered))  # of the same row, and so no time passes before them
        if self.code is not None and not fold.wants_code:
            self._drop_code()
        if decisions.withdraw_unborn():
            decisions.settle_down()
        if rest := settled_keys(decisions.entries[told:]):
            self._undelivered.append((None, rest))
        decisions.unlock_left_blocks()
        position, before = fold.position, fold.at
        fold.close_row(at)
        self.wake = self._next_wake(early)
        return Turn(
            position,
            at,
            before,
            decisions.entries,
            decisions.work,
            decisions.withdraw,
            decisions.corrections,
            fold.state,
            self.wake,
            was_ended,
            decisions.children,
            decisions.posts,
            decisions.locks,
            decisions.unlocks,
            _seed(fold),
        )

    def function_of(self, key: str) -> Callable[[], Any] | None:
        """Return the function of an outstanding ``saga.once``, resuming the coroutine as far as it is known.

        If the code asks for something then that no turn has recorded, as in a run that is paused, this `is_ahead`, and
        is to be thrown away.  Raises: DriftError; then as well.
        """
        if self.code is None or self._undelivered:
            decisions = _Recorder(self.fold, self.fold.at, self._left_blocks)
            self._resume(decisions)
            self.is_ahead = bool(decisions.entries)
        return self.code.function_of(key) if self.code else None

    def beyond(self) -> list[Entry]:
        """Resume the coroutine as far as the journal goes, and return what it gives beyond that; then throw this away.

        No time passes: what it waits for, be it a timer that is due, is left to wait.  Raises: as `turn`.
        """
        decisions = _Recorder(self.fold, self.fold.at, self._left_blocks)
        self._run_code(decisions)
        return decisions.entries

    def discard(self) -> None:
        """Drop the live coroutine without recording anything."""
        if self.code is not None:
            if self._lost is not None:
                self._lost.detach()
            self.code.discard()
            self.code = None
            self._left_blocks.clear()  # a replay leaves them again

    def _resume(self, decisions: _Recorder) -> SagaCode:
        script = self.script
        if script is None:
            raise CodeMissing(f"{self.info.target} is not registered here, and run {self.info.id} wants its code")
        if self.code is None:
            given = self.info.input
            code = self.code = SagaCode(lambda: script.main(given), self.fold)
            # Whoever loses this for whatever reason leaves no coroutine to the garbage collector, which ends it at any
            # time: what its `finally` blocks ask for would be asked for by the run whose code runs then.
            self._lost = weakref.finalize(self, code.discard)
            self._lost.atexit = False
        rows, self._undelivered = self._undelivered, []
        self._delivered.extend(rows)
        self.code.resume(rows, decisions)
        self.published, self.tags = self.code.published, self.code.tags
        return self.code

    def _run_code(self, decisions: _Recorder) -> None:
        code = self._resume(decisions)
        if not code.ended:
            return
        if not (code.raised and (self.fold.past_pivot or self.fold.pivots_in_flight)):
            code.cancel_branches()  # else what they have asked for is still wanted: mended code may go on from there
        output, error = code.outcome()
        if isinstance(error, ContinueAsNew):
            decisions.unlock_left_blocks()  # only the locks of blocks that it is still in go along
        self._drop_code()
        if isinstance(error, ContinueAsNew):
            if decisions.outstanding:
                raise CodeError(
                    describe_exception(UsageError("continue_as_new() with work outstanding: await it first"))
                )
            decisions.record(Continued(error.input, error.version))
            decisions.end(RunState.CONTINUED)
        elif error is None:
            decisions.record(Returned(output))
        elif self.script is not None and self.script.code_errors_park and is_code_error(error):
            raise CodeError(describe_exception(error))
        else:
            decisions.record(Raised(describe_exception(error)))

    def _begin_code(self, decisions: _Recorder) -> None:
        """Have code that never ran begin now, not with the first row: what it waits for it waits for from now on."""
        if not self.fold.begun and self.fold.position > self.info.since:
            decisions.record(CodeBegan())
            del self._undelivered[:-1]

    def _drop_code(self) -> None:
        self.discard()
        self._undelivered = self._delivered + self._undelivered
        self._delivered = []

    def _next_wake(self, early: bool) -> datetime | None:
        fold = self.fold
        if fold.state in TERMINAL:
            return None
        wake = self.info.started if early and fold.wants_code else None
        if self.code is not None and (seconds := self.code.loop.next_timer()) is not None:
            with contextlib.suppress(OverflowError):  # beyond all dates: asyncio takes infinity for "never", too
                wake = self.info.started + timedelta(microseconds=math.ceil(seconds * 1_000_000))
        deadline = None if fold.deadline_passed or fold.reported else self.info.deadline
        return min(filter(None, (wake, deadline)), default=None)


def _comes_last(arrival: Arrival) -> bool:
    """Tell of an order to end at once, which would leave unknown what came in at the same time."""
    return type(arrival) is Terminate


def _seed(fold: Fold) -> list[Entry]:
    """Return what the next link begins with: locks held, signals nobody has heard, ids of those heard, an alarm."""
    if fold.continued is None:
        return []
    held = blocks.carried(fold)
    unheard = [signal for kept in fold.signals.values() for signal in kept]
    known = {(signal.name, signal.id) for signal in unheard}
    heard = tuple([name, id] for name, id in fold.signal_ids if (name, id) not in known)[-_HEARD:]
    if not (held or heard or unheard or fold.restored or fold.deadline_passed):
        return []
    carried = Carried(held, heard, fold.deadline_passed)
    return [*([fold.restored] if fold.restored else ()), carried, *unheard]


class _Recorder(Decisions):
    """Decisions that saga code adds to."""

    def __init__(self, fold: Fold, now: datetime, left_blocks: list[str]) -> None:
        super().__init__(fold, now)
        self._left_blocks = left_blocks

    def record(self, entry: Entry) -> None:
        super().record(entry)
        if type(entry) is not Asked:
            return
        step = self.fold.steps[entry.key]
        match entry.kind:
            case "step" if step.is_pivot and self.fold.info.parent:
                family.ask_for_pivot(self, step)
            case "step" | "once":
                self.do(step)
            case "child":
                family.born(self, step)
            case "lock":
                blocks.ask_for_lock(self, step)

    def abandon(self, key: str) -> None:
        """Give up a request whose branch was cancelled."""
        self.give_up(self.fold.steps[key])

    def unlock(self, key: str, failed: bool) -> None:
        """Give a lock back; if an exception left its block, or it is still needed, not before the end of the turn."""
        if failed or blocks.is_needed(self.fold, key):
            self._left_blocks.append(key)
        else:
            blocks.unlock(self, key)

    def unlock_left_blocks(self) -> None:
        """Free locks whose block was left, unless the run goes back because of it: then not before it has ended."""
        if not (self.fold.rollback or self.fold.raised or self.fold.ended):
            free = [key for key in self._left_blocks if not blocks.is_needed(self.fold, key)]
            for key in free:
                self._left_blocks.remove(key)
                blocks.unlock(self, key)

    def settle_down(self) -> None:
        """Answer and conclude, until nothing of this very turn is given up by that."""
        more = True
        while more:
            self.answer()
            self.conclude()
            more = self.withdraw_unborn()

    def withdraw_unborn(self) -> bool:
        """What became due and was given up within one turn never becomes work; tell whether there was any."""
        if not self.withdraw:
            return False
        forward = {work.key for work in self.work if work.role in ("do", "once")}
        unborn = dict.fromkeys(key for key in self.withdraw if key in forward)
        self.work = [work for work in self.work if work.key not in unborn]
        self.withdraw = [key for key in self.withdraw if key not in unborn]
        for key in unborn:
            self.take(Withdrawn(key))
        return bool(unborn)


def is_code_error(error: BaseException) -> bool:
    """Tell whether `error` says that saga code is wrong, not that the run went wrong."""
    if isinstance(error, BaseExceptionGroup):
        return any(is_code_error(inner) for inner in error.exceptions)
    if isinstance(error, CODE_ERRORS) or _refused_by_asyncio(error):
        return True
    return not isinstance(error, (Exception, asyncio.CancelledError))


def _refused_by_asyncio(error: BaseException) -> bool:
    """Tell whether asyncio itself refuses something, such as its ``run`` in a saga: that has no class of its own."""
    trace = error.__traceback__
    if type(error) is not RuntimeError or trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] == asyncio.__name__
