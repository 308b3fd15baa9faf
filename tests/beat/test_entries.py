"""Entries of a beat_schedule: every shape that Celery takes, the options that are ours, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import pytz
from celery import Celery
from celery.beat import BeatLazyFunc, ScheduleEntry
from celery.schedules import BaseSchedule, crontab, schedstate, schedule, solar

from orchestrator import UsageError, saga
from orchestrator.celery import entries, nightly
from orchestrator.celery.entries import Asked, Entry
from orchestrator.celery.schedules import Book, Post, Undeliverable
from orchestrator.client import Client
from orchestrator.codec import dumps
from orchestrator.engine.schedules import EVER, LATE, CatchUp, Overlap, Schedule
from orchestrator.engine.timetable import Crontab, Interval, Rounded
from orchestrator.settings import Settings

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


@saga.define
async def tally(amount: int, of: datetime | None = None) -> int:
    return amount


@pytest.fixture
def app() -> Celery:
    made = Celery("entries", set_as_current=False)
    made.task(name="plain", shared=False)(_nothing)
    return made


def _nothing() -> None: ...


@pytest.fixture
def client() -> Client:
    settings = Settings.from_environment({}, database_url="postgresql://nobody@127.0.0.1:1/nothing")
    return Client(settings, lambda queue, times: None, lambda: "celery")


def read(app: Celery, client: Client, **entry: Any) -> tuple[Schedule, Entry]:
    app.finalize()
    return entries.read(app, client.prepare, "it", {"task": "plain", "schedule": 60, **entry}, NOW)


class Doubling(BaseSchedule):
    """A schedule of the application's own, which knows only Celery's interface."""

    def is_due(self, last_run_at: datetime) -> Any:
        age = (last_run_at - datetime(2026, 1, 1, tzinfo=UTC)).total_seconds()
        rest = age - (self.now() - last_run_at).total_seconds()
        return schedstate(rest <= 0, max(rest, 0))


class Workdays(crontab):
    """A crontab that is not due on some days; `is_due` may return a plain tuple, as Celery documents it."""

    def __init__(self, free: set[int], **options: Any) -> None:
        self.free = free
        super().__init__(**options)

    def is_due(self, last_run_at: datetime) -> Any:
        return (False, 3600) if self.now().isoweekday() in self.free else tuple(super().is_due(last_run_at))


class Wednesdays(BaseSchedule):
    """Due on Wednesdays at five past nine; it does not say when that is, and wants to be asked every ten seconds."""

    def is_due(self, last_run_at: datetime) -> Any:
        now = self.now()
        at = now.replace(hour=9, minute=5, second=0, microsecond=0) - timedelta(days=(now.isoweekday() - 3) % 7)
        return now >= at > last_run_at, 10


class Never(BaseSchedule):
    def is_due(self, last_run_at: datetime) -> Any:
        return False, 60


class Stuck(BaseSchedule):
    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        return timedelta(0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (crontab(minute=0, hour=3), Crontab), (300, Interval), (0.5, Interval), (timedelta(hours=1), Interval),
        (schedule(60), Interval), (schedule(3600, relative=True), Rounded), (solar("sunset", 52.5, 13.4), Asked),
        (Doubling(), Asked),
    ],
)  # fmt: skip
def test_every_kind_of_schedule_has_a_timetable(app: Celery, client: Client, given: Any, expected: type) -> None:
    found, _ = read(app, client, schedule=given)
    assert type(found.timetable) is expected
    slots = list(islice(found.timetable.slots(NOW, NOW), 5))
    assert all(earlier < later for earlier, later in pairwise([NOW, *slots]))


def test_a_crontab_with_rules_of_its_own_is_due_when_they_say(app: Celery, client: Client) -> None:
    """It fired by its five fields alone: a payment on a holiday."""
    found, _ = read(app, client, schedule=Workdays({6, 7}, hour=3, minute=0))
    slots = list(islice(found.timetable.slots(NOW, NOW), 8))
    assert [f"{slot:%a %d %H:%M}" for slot in slots] == [
        "Tue 02 03:00", "Wed 03 03:00", "Thu 04 03:00", "Fri 05 03:00", "Mon 08 00:00", "Mon 08 03:00", "Tue 09 03:00",
        "Wed 10 03:00",
    ]  # fmt: skip


def test_a_crontab_with_rules_of_its_own_reads_the_clock_of_the_zone_of_its_entry(app: Celery, client: Client) -> None:
    found, _ = read(app, client, schedule=Workdays(set(), hour=3, minute=0), options={"timezone": "Asia/Tokyo"})
    assert next(found.timetable.slots(NOW, NOW)) == datetime(2026, 6, 1, 18, tzinfo=UTC)


def test_a_schedule_of_the_applications_own_reads_the_same_in_every_process(app: Celery, client: Client) -> None:
    """Where it lies in memory says nothing: each beat that started took its timetable for a changed one."""
    first, second = (read(app, client, schedule=made)[0].reads for made in (Doubling(), Doubling()))
    assert first == second and "Doubling" in first


def test_a_schedule_that_wants_to_be_asked_often_may_be_due_in_a_week(app: Celery, client: Client) -> None:
    found, _ = read(app, client, schedule=Wednesdays())
    slots = list(islice(found.timetable.slots(NOW, NOW), 3))
    assert slots == [datetime(2026, 6, day, 9, 5, tzinfo=UTC) for day in (3, 10, 17)]


def test_the_sun_sets_once_a_day_wherever_one_begins() -> None:
    timetable = Asked(solar("sunset", 52.5, 13.4, app=Celery(set_as_current=False)))
    slots = list(islice(timetable.slots(NOW, NOW), 400))
    assert all(timedelta(hours=23) < later - earlier < timedelta(hours=25) for earlier, later in pairwise(slots))
    assert next(timetable.slots(slots[8], slots[8])) == slots[9]


def test_an_entry_of_celerys_own_class_is_read_as_a_dict_is(app: Celery, client: Client) -> None:
    entry = ScheduleEntry(name="it", task="plain", schedule=schedule(60, app=app), args=(1,), app=app)
    found, call = entries.read(app, client.prepare, "it", entry, NOW)
    assert (found.task, call.args, found.timetable) == ("plain", (1,), Interval(timedelta(minutes=1)))


def test_the_zone_of_a_crontab_is_that_of_the_entry_else_that_of_the_app(app: Celery, client: Client) -> None:
    app.conf.timezone = "Asia/Tokyo"
    night = crontab(minute=0, hour=3)
    assert read(app, client, schedule=night)[0].reads == "0 3 * * * Asia/Tokyo"
    options = {"timezone": "Europe/Berlin"}
    assert read(app, client, schedule=night, options=options)[0].reads == "0 3 * * * Europe/Berlin"


@pytest.mark.parametrize("where", ["the app", "the entry"])
@pytest.mark.parametrize("given", [crontab(minute=0, hour=3), schedule(3600, relative=True)], ids=str)
def test_a_zone_of_pytz_is_the_zone_of_that_name(app: Celery, client: Client, where: str, given: Any) -> None:
    """As ``tzinfo`` it is local mean time: 53 minutes and 28 seconds ahead of UTC in Berlin, whatever the season."""
    zone = pytz.timezone("Europe/Berlin")
    app.conf.timezone = zone if where == "the app" else "UTC"
    found, _ = read(app, client, schedule=given, options={"timezone": zone} if where == "the entry" else {})
    expected, _ = read(app, client, schedule=given, options={"timezone": "Europe/Berlin"})
    slots, wanted = (list(islice(each.timetable.slots(NOW, NOW), 300)) for each in (found, expected))
    assert (slots, found.reads) == (wanted, expected.reads)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, CatchUp()), ("last", CatchUp()), ("all", CatchUp(each=EVER)), ("none", CatchUp(last=timedelta(0))),
        (7200, CatchUp(each=timedelta(hours=2), last=timedelta(0))), (5, CatchUp(each=LATE, last=timedelta(0))),
    ],
)  # fmt: skip
def test_catching_up_is_a_word_or_a_number_of_seconds(
    app: Celery, client: Client, given: Any, expected: CatchUp
) -> None:
    options = {} if given is None else {"catch_up": given}
    assert read(app, client, options=options)[0].catch_up == expected


def test_celerys_deadline_for_late_crontabs_is_kept(app: Celery, client: Client) -> None:
    app.conf.beat_cron_starting_deadline = 600
    assert read(app, client, schedule=crontab())[0].catch_up == CatchUp(last=timedelta(minutes=10))
    assert read(app, client, schedule=60)[0].catch_up == CatchUp()


def test_a_saga_is_started_with_its_slot_and_lazy_arguments_are_computed_then(app: Celery, client: Client) -> None:
    options = {"slot_argument": "of", "overlap": "queue", "queue": "nightly", "expires": 60}
    found, call = read(app, client, task=tally.name, args=(BeatLazyFunc(lambda: 7),), options=options)
    assert found.overlap is Overlap.QUEUE and found.start is not None
    new = found.start("own id", NOW)
    assert (new.id, new.queue, new.saga) == ("own id", "nightly", tally.name)
    assert new.input == {"amount": 7, "of": "2026-06-01T12:00:00Z"}
    assert call.options == {"queue": "nightly", "expires": 60}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"schedule": "* * * * *"}, "schedule must be a number of seconds"),
        ({"schedule": None}, "schedule must be"), ({"schedule": True}, "schedule must be"),
        ({"schedule": 0}, "longer than nothing"), ({"schedule": -5}, "longer than nothing"),
        ({"schedule": crontab(day_of_month={29, 30}, month_of_year=2, minute=set())}, "no slot within"),
        ({"schedule": Stuck()}, "is followed by"), ({"schedule": Never()}, "says up to 2027.* it is not due"),
        ({"task": None}, "task must be the name"), ({"task": ""}, "task must be the name"),
        ({"when": 5}, "an entry has no when; it has"),
        ({"options": {"timezone": "Mars/Olympus"}}, "there is no time zone 'Mars/Olympus'"),
        ({"options": {"timezone": 7}}, "there is no time zone 7"),
        ({"options": {"timezone": "../../etc/passwd"}}, "there is no time zone"),
        ({"schedule": solar("sunset", 0, 0), "options": {"timezone": "UTC"}}, "timezone has no meaning"),
        ({"options": {"catch_up": "some"}}, "catch_up must be"), ({"options": {"catch_up": -1}}, "catch_up must be"),
        ({"options": {"catch_up": float("nan")}}, "catch_up must be"),
        ({"options": {"overlap": "never"}}, "overlap must be one of allow, skip, queue, cancel"),
        ({"options": {"overlap": "skip"}}, "needs a saga"),
        ({"task": tally.name}, "amount"), ({"task": tally.name, "args": ("x",)}, "amount"),
        ({"task": tally.name, "args": (1,), "options": {"overlpa": "skip"}}, "no start option overlpa"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_entry_is_said(app: Celery, client: Client, entry: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        read(app, client, **entry)


def settings(**options: Any) -> Settings:
    return Settings.from_environment({}, database_url="postgresql://nobody@127.0.0.1:1/nothing", **options)


def test_31_february_is_refused_by_celery_itself_where_it_is_written() -> None:
    with pytest.raises(ValueError, match="31"):
        crontab(minute=0, hour=0, day_of_month=31, month_of_year=2)


def test_a_bad_entry_is_named_and_harms_no_other(app: Celery, client: Client) -> None:
    app.orchestrator = type("Stand", (), {"client": client, "settings": settings(nightly=False)})
    app.conf.result_expires = None  # else Celery adds an entry of its own
    app.conf.beat_schedule = {
        "good": {"task": "plain", "schedule": 60}, "bad": {"task": "plain"}, "worse": 7,
        "worst": {"task": tally.name, "schedule": 1},
        "elsewhere": {"task": "a.task.of.another.service", "schedule": 60},
    }  # fmt: skip
    book = Book(app)
    assert book.refresh(NOW)
    assert book.schedules.keys() == {"good", "elsewhere"}
    assert book.problems.keys() == {"bad", "worse", "worst", "elsewhere"}
    assert "is not registered here; it is sent all the same" in book.problems["elsewhere"]
    assert {each.name for each in book.declared()} == app.conf.beat_schedule.keys()
    assert not book.refresh(NOW)
    app.conf.beat_schedule["good"]["schedule"] = 30
    assert book.refresh(NOW) and book.schedules["good"].timetable == Interval(timedelta(seconds=30))


def test_beat_reconciles_every_night_and_prunes_if_it_is_told_what_is_old() -> None:
    def named(configured: dict[str, Any], **options: Any) -> list[str]:
        return sorted(nightly.entries(settings(**options), configured))

    assert named({}) == ["orchestrator.reconcile"]
    assert named({}, retention="90d") == ["orchestrator.prune", "orchestrator.reconcile"]
    assert named({"mine": {"task": "orchestrator.reconcile"}, "bad": 7}) == []
    assert named({"bad": {"task": ["no", "name"]}}) == ["orchestrator.reconcile"]
    assert named({}, nightly=False, retention="90d") == []


def test_a_periodic_task_takes_the_options_as_well(app: Celery, client: Client) -> None:
    app.add_periodic_task(crontab(), app.signature(tally.name, (1,)), name="it", overlap="queue", timezone="Asia/Tokyo")
    found, call = entries.read(app, client.prepare, "it", app.conf.beat_schedule["it"], NOW)
    assert (found.overlap, found.reads, call.options) == (Overlap.QUEUE, "* * * * * Asia/Tokyo", {})


def test_lazy_arguments_are_not_computed_before_their_slot(app: Celery, client: Client) -> None:
    computed: list[int] = []
    lazy = BeatLazyFunc(lambda: computed.append(1) or 7)  # type: ignore[func-returns-value]
    found, _ = read(app, client, task=tally.name, args=(lazy,))
    assert computed == []
    assert found.start and found.start("id", NOW).input == {"amount": 7}


@pytest.mark.parametrize("given", [{"args": "90d"}, {"args": {"a": 1}}, {"kwargs": ["a"]}])
def test_a_text_in_the_place_of_arguments_is_refused(app: Celery, client: Client, given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be a"):
        read(app, client, **given)


@pytest.mark.parametrize("name", ["no\0name", "no\ud800name", "n" * 3000, ""])
def test_a_name_that_cannot_be_stored_harms_no_other_entry(app: Celery, client: Client, name: str) -> None:
    app.orchestrator = SimpleNamespace(client=client, settings=client.settings)
    app.conf.beat_schedule = {name: {"task": "plain", "schedule": 60}, "it": {"task": "plain", "schedule": 60}}
    book = Book(app)
    book.refresh(NOW)
    assert {declared.name for declared in book.declared()} >= {"it"}
    assert [told for told in book.problems.values() if "its name must be text of 1 to 2000 bytes" in told]
    assert all(len(dumps(declared.name)) < 2000 for declared in book.declared())


def test_an_argument_that_cannot_be_computed_is_no_broker_that_is_away(app: Celery) -> None:
    """What reads a file or asks a server fails as a broker does, with an OSError."""

    def compute() -> int:
        raise ConnectionError("the rates cannot be had")

    book = Book(app)
    book.entries["it"] = Entry("plain", (BeatLazyFunc(compute),))
    with pytest.raises(Undeliverable, match="it") as raised:
        Post(app, book).deliver("it", NOW, "id")
    assert "the rates cannot be had" in str(raised.value.reason)


def test_an_argument_of_a_saga_that_cannot_be_computed_is_no_database_that_is_away(app: Celery, client: Client) -> None:
    """What asks another database fails as ours does."""

    def compute() -> int:
        raise psycopg.OperationalError("the other database is away")

    found, _ = read(app, client, task=tally.name, args=(BeatLazyFunc(compute),))
    assert found.start is not None
    with pytest.raises(UsageError, match="could not be computed: OperationalError: the other database is away"):
        found.start("id", NOW)


def test_it_is_the_default_of_an_app_that_names_no_scheduler_of_its_own() -> None:
    from orchestrator.celery.app import _default_beat

    ours, theirs = Celery("ours", set_as_current=False), Celery("theirs", set_as_current=False)
    theirs.config_from_object({"CELERY_BEAT_SCHEDULER": "celery.beat:PersistentScheduler"}, namespace="CELERY")
    late = Celery("late", set_as_current=False)
    assert late.conf.beat_scheduler == "celery.beat:PersistentScheduler"
    for app in (ours, theirs, late):
        _default_beat(app)
    assert ours.conf.beat_scheduler == late.conf.beat_scheduler == "orchestrator.celery.beat:Scheduler"
    assert theirs.conf.beat_scheduler == "celery.beat:PersistentScheduler"


def test_nonsense_is_refused_as_usage() -> None:
    with pytest.raises(UsageError):
        entries._overlap("sometimes", True)
