"""Entries of Celery's beat_schedule as schedules of the engine.

Owns how Celery's schedules become timetables, and the options that this package adds.  Must never fire anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo

from celery import Celery
from celery.beat import BeatLazyFunc
from celery.schedules import BaseSchedule, crontab, maybe_schedule, schedule, solar

from orchestrator import saga as sagas
from orchestrator.codec import first_line
from orchestrator.engine.patience import at_most
from orchestrator.engine.schedules import EVER, LATE, OPTIONS, SENT, CatchUp, Overlap, Schedule
from orchestrator.engine.timetable import Crontab, Interval, Rounded, Timetable
from orchestrator.errors import UsageError
from orchestrator.store import runs

_KNOWN = frozenset({"task", "schedule", "args", "kwargs", "options", "relative"})
_OF_CELERY = frozenset({"name", "app", "last_run_at", "total_run_count"})  # attributes of a ScheduleEntry as a dict
# The methods that say when a crontab is due.
_DECIDE = ("is_due", "remaining_estimate", "remaining_delta", "_delta_to_next")
_SECOND = timedelta(seconds=1)
_QUESTIONS = 20_000  # that a schedule of the application's own is asked before it is due once; for more than a year
_LEAST = ((1_000, timedelta(minutes=1)), (10_000, timedelta(hours=1)))  # between two of them, after so many
_COMPUTING_S = 3.0  # Postgres ends a transaction of beat's that stands still for 5 s
_NEVER = "it has no slot within the next fifty years; correct its crontab"
Prepare = Callable[[Any, Any, dict[str, Any]], tuple[runs.Start, Any]]


@dataclass(frozen=True, slots=True)
class Entry:
    """What is called for a slot: a task's name with arguments and options of Celery's."""

    task: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    slot_argument: str | None = None

    @property
    def is_lazy(self) -> bool:
        """Whether an argument is computed for each slot."""
        return any(isinstance(each, BeatLazyFunc) for each in (*self.args, *self.kwargs.values()))

    def call(self, slot: datetime) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments for a slot; lazy ones are computed now, while a transaction of beat's waits."""
        with at_most(_COMPUTING_S) if self.is_lazy else nullcontext():
            args = [_value(each) for each in self.args]
            kwargs = {name: _value(each) for name, each in self.kwargs.items()}
        return args, kwargs | ({self.slot_argument: slot} if self.slot_argument else {})


def _value(given: Any) -> Any:
    """Return an argument; one that is lazy may fail as our own database does, and must not be taken for it."""
    if not isinstance(given, BeatLazyFunc):
        return given
    try:
        return given()
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"an argument of it could not be computed: {why}") from error


def read(app: Celery, prepare: Prepare, name: str, raw: Any, now: datetime) -> tuple[Schedule, Entry]:
    """Read one entry; `prepare` is that of the client, which says what a saga is started with.

    Raises: UsageError or whatever its parts raise; the caller names the entry.
    """
    given = dict(raw)
    unknown = given.keys() - _KNOWN - _OF_CELERY
    if unknown:
        raise UsageError(f"an entry has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(_KNOWN))}")
    options = dict(given.get("options") or {})
    own = {option: options.pop(option) for option in OPTIONS if option in options}
    task = given.get("task")
    if not isinstance(task, str) or not task:
        raise UsageError(f"task must be the name of a task or saga, not {task!r}")
    if isinstance(given.get("args"), (str, bytes, Mapping)):
        raise UsageError(f"args must be a list or tuple, not a {type(given['args']).__name__}")
    if not isinstance(given.get("kwargs") or {}, Mapping):
        raise UsageError(f"kwargs must be a mapping, not a {type(given['kwargs']).__name__}")
    entry = Entry(
        task, tuple(given.get("args") or ()), dict(given.get("kwargs") or {}), options, own.get("slot_argument")
    )
    zone = _zone(app, own.get("timezone"))
    timetable, reads = _timetable(app, given.get("schedule"), bool(given.get("relative")), zone)
    if not list(islice(timetable.slots(now, now), 1)):
        raise UsageError(_NEVER)
    start = _starter(prepare, entry) if task in sagas.registry.names else None
    overlap = _overlap(own.get("overlap", "allow"), start is not None)
    if start is not None and not entry.is_lazy:
        start("check", now)  # arguments that do not fit are told now, not at night
    catch_up = _catch_up(own.get("catch_up"), _deadline(app, timetable))
    problem = None if start or task in app.tasks else f"task {task} is not registered here; {SENT}"
    return Schedule(
        name=name, task=task, reads=reads, timetable=timetable, start=start, catch_up=catch_up, overlap=overlap,
        problem=problem,
    ), entry  # fmt: skip


def _starter(prepare: Prepare, entry: Entry) -> Callable[[str, datetime], runs.Start]:
    def start(run_id: str, slot: datetime) -> runs.Start:
        saga = sagas.registry.latest(entry.task)
        args, kwargs = entry.call(slot)
        return prepare(saga, saga.codec.encode_call(tuple(args), kwargs), {**entry.options, "task_id": run_id})[0]

    return start


# -- options -----------------------------------------------------------------------------------------------------------
def _zone(app: Celery, named: Any) -> tzinfo | None:
    if named is None or isinstance(named, tzinfo):
        return named
    try:
        return ZoneInfo(named)
    except (KeyError, ValueError, TypeError, OSError):
        raise UsageError(f"there is no time zone {named!r}; write one as 'Europe/Berlin'") from None


def _attachable(zone: tzinfo) -> tzinfo:
    """Return a zone that a time may be given as it is: one of pytz has to be asked first, else it is mean time."""
    named = getattr(zone, "zone", None) if hasattr(zone, "localize") else None
    return ZoneInfo(named) if isinstance(named, str) else zone


def _overlap(named: Any, is_saga: bool) -> Overlap:
    try:
        overlap = Overlap(named)
    except ValueError:
        raise UsageError(f"overlap must be one of {', '.join(Overlap)}, not {named!r}") from None
    if overlap is not Overlap.ALLOW and not is_saga:
        raise UsageError(f"overlap={named!r} needs a saga: nobody records when a plain task has ended")
    return overlap


def _catch_up(named: Any, deadline: timedelta | None) -> CatchUp:
    if named is None:
        return CatchUp() if deadline is None else CatchUp(last=deadline)
    named_ones = {"last": CatchUp(), "all": CatchUp(each=EVER), "none": CatchUp(last=timedelta(0))}
    if isinstance(named, str) and named in named_ones:
        return named_ones[named]
    if isinstance(named, (int, float)) and not isinstance(named, bool) and 0 <= named <= EVER.total_seconds():
        named = timedelta(seconds=named)
    if not isinstance(named, timedelta):
        raise UsageError(f"catch_up must be 'last', 'all', 'none', or a number of seconds, not {named!r}")
    return CatchUp(each=max(LATE, named), last=timedelta(0))


def _deadline(app: Celery, timetable: Timetable) -> timedelta | None:
    """Return Celery's own limit for crontabs that are late."""
    seconds = app.conf.beat_cron_starting_deadline
    return timedelta(seconds=seconds) if seconds is not None and isinstance(timetable, Crontab) else None


# -- timetables --------------------------------------------------------------------------------------------------------
def _timetable(app: Celery, given: Any, relative: bool, zone: tzinfo | None) -> tuple[Timetable, str]:
    """Return the timetable of a schedule of Celery's, and how it reads."""
    if isinstance(given, bool) or not isinstance(given, (int, float, timedelta, BaseSchedule)):
        raise UsageError(
            f"schedule must be a number of seconds, a timedelta, or a schedule of Celery's such as crontab(hour=3), "
            f"not {given!r}"
        )
    known = maybe_schedule(given, relative, app=app)
    if isinstance(known, crontab) and all(_is_as_in(known, crontab, name) for name in _DECIDE):
        return _crontab(known, _attachable(zone or known.tz))
    if type(known) is schedule:
        return _interval(known, _attachable(zone or known.tz))
    if isinstance(known, crontab):
        zone = _attachable(zone or known.tz)
        return Asked(_with(known, tz=zone)), f"{_read(known)} {zone}"
    if zone is not None:
        raise UsageError(f"timezone has no meaning for {known!r}, which has its own")
    return Asked(known), _read(known)


def _read(known: BaseSchedule) -> str:
    """Return how a schedule reads, in every process alike: without its place in memory, where it has no other text."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(known))


def _with(known: BaseSchedule, **attributes: Any) -> BaseSchedule:
    """Return a copy of a schedule that differs in these; `copy` would make one without what a subclass has added."""
    made = object.__new__(type(known))
    made.__dict__.update(known.__dict__, **attributes)
    return made


def _is_as_in(known: BaseSchedule, kind: type[BaseSchedule], name: str) -> bool:
    """Tell whether a schedule has a method as Celery has it, and no other one of the application's own."""
    return getattr(type(known), name) is getattr(kind, name)


def _crontab(given: crontab, zone: tzinfo) -> tuple[Timetable, str]:
    reads = " ".join(
        _written(getattr(given, f"_orig_{name}"), getattr(given, name))
        for name in ("minute", "hour", "day_of_month", "month_of_year", "day_of_week")
    )
    timetable = Crontab(
        frozenset(given.minute), frozenset(given.hour), frozenset(given.day_of_month), frozenset(given.month_of_year),
        frozenset(given.day_of_week), zone,
    )  # fmt: skip
    return timetable, f"{reads} {zone}"


def _written(original: Any, numbers: set[int]) -> str:
    return str(original).replace(" ", "") if isinstance(original, (str, int)) else ",".join(map(str, sorted(numbers)))


def _interval(given: schedule, zone: tzinfo) -> tuple[Timetable, str]:
    every = given.run_every
    if not isinstance(every, timedelta) or every <= timedelta(0):
        raise UsageError(f"an interval must be longer than nothing, not {every!r}")
    if given.relative and every >= timedelta(seconds=1):
        return Rounded(every, zone), f"every {every.total_seconds():g} s, rounded in {zone}"
    return Interval(every), f"every {every.total_seconds():g} s"


@dataclass(frozen=True, slots=True)
class Asked:
    """Any other schedule: asked, again and again, when it is due if it ran last at this instant and it is now then."""

    schedule: BaseSchedule

    def slots(self, origin: datetime, since: datetime) -> Iterator[datetime]:
        """Yield the slots after `since`.  Raises: UsageError if it does not move on."""
        slot = min(origin, since)
        while True:
            after = self._after(slot)
            if after <= slot:
                raise UsageError(f"{self.schedule!r} says that {slot.isoformat()} is followed by {after.isoformat()}")
            slot = after
            if slot > since:
                yield slot

    def _after(self, slot: datetime) -> datetime:
        asks = not any(_is_as_in(self.schedule, kind, "is_due") for kind in (BaseSchedule, schedule, crontab, solar))
        after = self._when_due(slot) if asks else slot + _with(self.schedule, now=lambda: slot).remaining_estimate(slot)
        # Rounded up, so that the event after this one is not, for a fraction of a second, this one.
        return _whole_second(after.astimezone(UTC))

    def _when_due(self, slot: datetime) -> datetime:
        """Ask as Celery's beat does: now, and again whenever the schedule says that it is to be asked again.

        One that wants to be asked very often is asked less so in the end, and the moment is then found between two
        questions.
        """
        before, now, own = slot, slot, _SECOND
        for questions in range(_QUESTIONS):
            due, pause = self._asked(slot, now)
            if due and now > slot:
                return now if now - before <= own + _SECOND else self._between(slot, before, now)
            before, own = now, max(timedelta(seconds=pause), _SECOND)
            now = _whole_second(now + max([own, *(least for many, least in _LEAST if questions >= many)]))
        raise UsageError(f"{self.schedule!r} says up to {now.isoformat()} that it is not due")

    def _between(self, slot: datetime, before: datetime, after: datetime) -> datetime:
        """Return the first second at which it is due, after one when it is not, up to one when it is."""
        while after - before > _SECOND:
            middle = before + (after - before) // (2 * _SECOND) * _SECOND
            before, after = (before, middle) if self._asked(slot, middle)[0] else (middle, after)
        return after

    def _asked(self, slot: datetime, now: datetime) -> tuple[bool, float]:
        due, pause = _with(self.schedule, now=lambda: now).is_due(slot)
        return due, pause


def _whole_second(instant: datetime) -> datetime:
    return instant + timedelta(microseconds=-instant.microsecond % 1_000_000)
