"""Slots of a year, against a walk over every minute of it that knows nothing but zoneinfo."""

from __future__ import annotations

import calendar
import functools
import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from celery import Celery
from celery.schedules import crontab

from orchestrator.celery.entries import _timetable
from orchestrator.engine.timetable import Interval, Rounded, between, latest

YEAR = (datetime(2025, 12, 31, tzinfo=UTC), datetime(2027, 1, 2, tzinfo=UTC))
SAMOA = (datetime(2011, 12, 20, tzinfo=UTC), datetime(2012, 1, 10, tzinfo=UTC))  # it had no 30 December
MINUTE = timedelta(minutes=1)
ZONES = ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe"]
CRONTABS = [
    "*/20 * * * *", "17 * * * *", "30 2 * * *", "0 0 * * *", "30 1,2,3 * * *", "*/20 1-3 * * sun",
    "15 */2 * * mon-fri", "0 3 1,31 * *", "5 0 29 2 *", "59 23 * * sat", "0 1 1-7 4,10 sun",
]  # fmt: skip
_NAMES = {name: str(n) for n, name in enumerate(["sun", "mon", "tue", "wed", "thu", "fri", "sat"])}


# -- the other calculation: it expands fields by itself, and walks -----------------------------------------------------
def _numbers(text: str, low: int, high: int) -> set[int]:
    found: set[int] = set()
    for part in text.split(","):
        whole, _, step = part.partition("/")
        for name, number in _NAMES.items():
            whole = whole.replace(name, number)
        first, _, last = ("0", "", "") if whole == "*" else whole.partition("-")
        numbers = range(low, high + 1) if whole == "*" else range(int(first), int(last or first) + 1)
        found |= {n for i, n in enumerate(numbers) if i % int(step or 1) == 0}
    return found


@functools.cache
def _walk(zone: str, begin: datetime, end: datetime) -> dict[int, list[tuple[datetime, datetime, str]]]:
    """Return every minute of a time with what the zone's clock shows then, by the minute of the hour.

    What the clock shows is shown the first time, `again`, or `skipped`: then it would be shown had the clock gone on.
    """
    walked: dict[int, list[tuple[datetime, datetime, str]]] = {minute: [] for minute in range(60)}
    known = ZoneInfo(zone)
    latest_shown = before = (begin - MINUTE).astimezone(known).replace(tzinfo=None)
    for number in range(int((end - begin) / MINUTE)):
        instant = begin + number * MINUTE
        shown = instant.astimezone(known).replace(tzinfo=None)
        while latest_shown < before + MINUTE < shown:
            before += MINUTE
            walked[before.minute].append((instant + (before - latest_shown - MINUTE), before, "skipped"))
        walked[shown.minute].append((instant, shown, "first" if shown > latest_shown else "again"))
        latest_shown = max(latest_shown, shown)
        before = latest_shown
    return walked


def expected_slots(text: str, zone: str, begin: datetime, end: datetime) -> list[datetime]:
    minutes, hours, days, months, weekdays = (
        _numbers(field, low, high)
        for field, low, high in zip(text.split(), (0, 0, 1, 1, 0), (59, 23, 31, 12, 6), strict=True)
    )
    kinds = {"first", "again"} if hours == set(range(24)) else {"first", "skipped"}
    found = {
        instant
        for minute in minutes
        for instant, shown, kind in _walk(zone, begin, end)[minute]
        if kind in kinds and shown.hour in hours and shown.day in days and shown.month in months
        and (shown.weekday() + 1) % 7 in weekdays
    }  # fmt: skip
    return sorted(each for each in found if each < end)


def _slots(text: str, zone: str, begin: datetime, end: datetime) -> list[datetime]:
    timetable, _ = _timetable(Celery(set_as_current=False), crontab.from_string(text), False, ZoneInfo(zone))
    return list(between(timetable, begin, begin - MINUTE, end - MINUTE))


@pytest.mark.parametrize("zone", ZONES)
def test_the_slots_of_a_year_are_those_of_a_walk_over_its_minutes(zone: str) -> None:
    for text in CRONTABS:
        found, expected = _slots(text, zone, *YEAR), expected_slots(text, zone, *YEAR)
        assert found == expected, (text, set(found) ^ set(expected))
        assert len(found) == len(set(found))


def test_a_day_that_a_zone_never_had_loses_no_slot_and_doubles_none() -> None:
    for text in [*CRONTABS, "* * * * *"]:
        assert _slots(text, "Pacific/Apia", *SAMOA) == expected_slots(text, "Pacific/Apia", *SAMOA), text
    noon = _slots("0 12 * * *", "Pacific/Apia", *SAMOA)
    assert all(later - earlier == timedelta(days=1) for earlier, later in itertools.pairwise(noon))


@pytest.mark.parametrize(
    ("text", "day", "at"),
    [
        ("30 2 * * *", datetime(2026, 3, 29), ["03:30+02:00"]),  # skipped: as if the clock had gone on
        ("30 2 * * *", datetime(2026, 10, 25), ["02:30+02:00"]),  # repeated: the first
        ("30 * * * *", datetime(2026, 10, 25), ["01:30+02:00", "02:30+02:00", "02:30+01:00", "03:30+01:00"]),
        ("30 * * * *", datetime(2026, 3, 29), ["00:30+01:00", "01:30+01:00", "03:30+02:00", "04:30+02:00"]),
        ("30 2,3 * * *", datetime(2026, 3, 29), ["03:30+02:00"]),  # two that fall together are one
    ],
)
def test_the_two_changes_of_the_clock_in_berlin(text: str, day: datetime, at: list[str]) -> None:
    berlin = ZoneInfo("Europe/Berlin")
    begin = day.replace(tzinfo=berlin).astimezone(UTC)
    shown = [each.astimezone(berlin) for each in _slots(text, "Europe/Berlin", begin, begin + timedelta(days=1))]
    near = [each for each in shown if each.date() == day.date() and at[0][:2] <= f"{each:%H}" <= at[-1][:2]]
    assert [each.isoformat()[11:16] + each.isoformat()[-6:] for each in near] == at


def test_wherever_one_begins_the_slots_are_the_same() -> None:
    timetable, _ = _timetable(
        Celery(set_as_current=False), crontab.from_string("20 1-3 * * *"), False, ZoneInfo("America/New_York")
    )
    whole = list(between(timetable, YEAR[0], *YEAR))
    slot, walked = YEAR[0], []
    while (slot := next(timetable.slots(slot, slot))) <= YEAR[1]:
        walked.append(slot)
    assert walked == whole
    assert latest(timetable, YEAR[0], *YEAR) == whole[-1]
    assert latest(timetable, YEAR[0], whole[5], whole[6] - MINUTE) is None


def test_a_crontab_has_its_slots_for_as_long_as_one_looks() -> None:
    """However rare they are: only where there is none for fifty years, there is none."""
    begin, end = datetime(1900, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
    years = [each.year for each in _slots("0 0 29 2 *", "UTC", begin, end)]
    assert years == [year for year in range(1900, 2100) if calendar.isleap(year)]


def test_an_interval_counts_elapsed_time_from_its_origin_in_both_directions() -> None:
    every = timedelta(seconds=90)
    origin = datetime(2026, 3, 29, 0, 59, 30, tzinfo=UTC)
    slots = list(between(Interval(every), origin, origin - 2 * every, origin + 2 * every))
    assert slots == [origin + n * every for n in (-1, 0, 1, 2)]


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (timedelta(days=1), ["2026-03-28T23:00", "2026-03-29T22:00", "2026-03-30T22:00"]),  # midnights of 23 h
        (timedelta(hours=2), ["2026-03-28T13:00", "2026-03-28T15:00", "2026-03-28T17:00"]),
        (timedelta(minutes=7), ["2026-03-28T11:41", "2026-03-28T11:48", "2026-03-28T11:55"]),
    ],
)
def test_a_relative_interval_is_rounded_on_the_clock_of_its_zone(every: timedelta, expected: list[str]) -> None:
    origin = datetime(2026, 3, 28, 11, 34, 56, tzinfo=UTC)
    slots: Iterator[datetime] = Rounded(every, ZoneInfo("Europe/Berlin")).slots(origin, origin)
    assert [next(slots).isoformat()[:16] for _ in range(3)] == expected
