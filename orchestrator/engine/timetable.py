"""When a schedule has its slots: pure arithmetic on aware UTC instants.

Owns the rules for daylight saving.  Must never look at a clock: the same timetable has the same slots for whoever asks,
which is what lets any number of beats agree on them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from itertools import takewhile
from typing import Protocol

_ONE_DAY = timedelta(days=1)
_DAYS_AHEAD = 50 * 366  # a 29 February that has to be a Monday may be 40 years away
_WINDOWS = (timedelta(hours=1), _ONE_DAY, timedelta(days=32), timedelta(days=400))


class Timetable(Protocol):
    """A set of instants."""

    def slots(self, origin: datetime, since: datetime) -> Iterator[datetime]:
        """Yield the slots after `since`, in order and each once; an interval counts from `origin`, a slot of its."""


@dataclass(frozen=True, slots=True)
class Crontab:
    """Minutes of the clock of a zone.

    One that fires in every hour of the day fires whenever the clock of the zone shows its minutes: not while an hour
    is skipped, and in both of an hour that is repeated.  One that names hours fires once for each time of day that it
    names: a time that is skipped is counted from before the gap (02:30 is then 03:30), one that is repeated is taken
    the first time.  RFC 5545 reads local times in the same way.
    """

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    zone: tzinfo

    def slots(self, origin: datetime, since: datetime) -> Iterator[datetime]:
        """Yield the slots after `since`; none if there is none within fifty years."""
        if not (self.hours and self.minutes):
            return
        held: list[datetime] = []  # a time that is skipped may be counted into the next day
        for day in self._dates(since.astimezone(self.zone).date() - _ONE_DAY):
            merged = sorted({*held, *self._on(day)})
            settled = bisect_right(merged, held[-1]) if held else 0
            yield from (slot for slot in merged[:settled] if slot > since)
            held = merged[settled:]
        yield from (slot for slot in held if slot > since)

    def _dates(self, first: date) -> Iterator[date]:
        day, in_vain = first, 0
        while in_vain < _DAYS_AHEAD:
            if day.month in self.months and day.day in self.days and day.isoweekday() % 7 in self.weekdays:
                yield day
                in_vain = 0
            in_vain += 1
            day += _ONE_DAY

    def _on(self, day: date) -> Iterator[datetime]:
        every_hour = len(self.hours) == 24
        for hour in self.hours:
            for minute in self.minutes:
                shown = datetime.combine(day, time(hour, minute))
                instant = shown.replace(tzinfo=self.zone).astimezone(UTC)
                if not every_hour:
                    yield instant
                    continue
                for each in {instant, shown.replace(tzinfo=self.zone, fold=1).astimezone(UTC)}:
                    if each.astimezone(self.zone).replace(tzinfo=None) == shown:
                        yield each


@dataclass(frozen=True, slots=True)
class Interval:
    """Every so often, by elapsed time."""

    every: timedelta

    def slots(self, origin: datetime, since: datetime) -> Iterator[datetime]:
        """Yield the slots after `since`, whole numbers of intervals away from `origin`."""
        number = (since - origin) // self.every + 1
        while True:
            yield origin + number * self.every
            number += 1


@dataclass(frozen=True, slots=True)
class Rounded:
    """Every so often, rounded down to whole seconds, minutes, hours or days of the clock of a zone."""

    every: timedelta
    zone: tzinfo

    def slots(self, origin: datetime, since: datetime) -> Iterator[datetime]:
        """Yield the slots after `since`, each counted from the one before."""
        slot = min(origin, since)
        while True:
            slot = self._next(slot)
            if slot > since:
                yield slot

    def _next(self, slot: datetime) -> datetime:
        shown = (slot + self.every).astimezone(self.zone)
        if self.every >= _ONE_DAY:  # days of the calendar, which may have 23 or 25 hours
            shown = slot.astimezone(self.zone).replace(tzinfo=None) + self.every
            shown = datetime.combine(shown.date(), time(), tzinfo=self.zone)
        elif self.every >= timedelta(hours=1):
            shown = shown.replace(minute=0, second=0)
        elif self.every >= timedelta(minutes=1):
            shown = shown.replace(second=0)
        rounded = shown.replace(microsecond=0).astimezone(UTC)
        return rounded if rounded > slot else slot + self.every


def between(timetable: Timetable, origin: datetime, since: datetime, until: datetime) -> Iterator[datetime]:
    """Yield the slots after `since` up to and including `until`."""
    return takewhile(lambda slot: slot <= until, timetable.slots(origin, since))


def latest(timetable: Timetable, origin: datetime, since: datetime, until: datetime) -> datetime | None:
    """Return the last slot after `since` up to `until`, without walking over all of a long time."""
    for window in (*_WINDOWS, until - since):
        begin = max(since, until - window)
        found = deque(between(timetable, origin, begin, until), maxlen=1)
        if found or begin == since:
            return found[0] if found else None
    return None
