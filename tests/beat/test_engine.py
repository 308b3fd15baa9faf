"""The engine of beat on a real database, by a clock that the test moves: a year, policies, orders of people."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from celery import Celery
from celery.schedules import crontab

from orchestrator import Effect, UsageError, saga, step
from orchestrator.celery.entries import _timetable
from orchestrator.engine.schedules import EVER, CatchUp, Decision, Overlap, Schedule, Schedules, run_id
from orchestrator.engine.timetable import Interval
from orchestrator.store import restores, runs
from orchestrator.store import schedules as store
from orchestrator.store.connection import Connection, open_connection
from tests.beat.test_timetable import YEAR, expected_slots
from tests.engine.stage import QUEUE, Child, state

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
LEASE = timedelta(seconds=2)
App = Schedules("app", lambda connection, queue, rows: None)


@step(effect=Effect.NONE)
def look(text: str) -> str:
    return text


@saga.define
async def inspect() -> str:
    await saga.sleep(timedelta(days=10_000))
    return await saga.step(look, "at it")


def begin_run(own_id: str, slot: datetime) -> runs.Start:
    return runs.Start(id=own_id, saga=inspect.name, version=1, input={}, queue=QUEUE)


def schedule(name: str = "it", **options: Any) -> Schedule:
    given: dict[str, Any] = {"task": inspect.name, "reads": "hourly", "timetable": Interval(HOUR), "start": begin_run}
    return Schedule(name=name, **{**given, **options})


def daily(text: str, zone: str, **options: Any) -> Schedule:
    timetable, reads = _timetable(Celery(set_as_current=False), crontab.from_string(text), False, ZoneInfo(zone))
    return schedule(f"{text} {zone}", timetable=timetable, reads=reads, **options)


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with open_connection(database_url, name="test") as opened:
        yield opened


def lead(connection: Connection, now: datetime, *schedules: Schedule, holder: str = "a") -> store.Lead | None:
    found = store.lead(connection, "app", holder, LEASE, now)
    if found is not None and schedules:
        store.declare(connection, "app", [each.declared for each in schedules], found.led_until, now)
    return found


def fire(connection: Connection, which: Schedule, now: datetime, holder: str = "a") -> list[Decision]:
    """Lead and fire until nothing is due."""
    lead(connection, now, holder=holder)
    told: list[Decision] = []
    while page := App.fire(connection, which, holder, now):
        told += page
    return told


def began(decisions: list[Decision]) -> list[datetime]:
    return [each.slot for each in decisions if each.state == "started"]


def test_a_year_of_slots_fires_once_each_whoever_leads_and_however_long_nobody_does(connection: Connection) -> None:
    """Three beats that come, die before they fire, and go, in three zones, against the walk over every minute."""
    dice = random.Random(7)
    plans = [
        ("0 1-23/6 * * *", "America/New_York"),
        ("30 1,2,3 * * *", "Europe/Berlin"),
        ("15 2 * * sun", "Australia/Lord_Howe"),
    ]
    known = [daily(text, zone, catch_up=CatchUp(each=EVER)) for text, zone in plans]
    now = YEAR[0] - MINUTE
    lead(connection, now, *known, holder="0")
    while now < YEAR[1] + 4 * DAY:
        now += timedelta(minutes=dice.choice([1, 30, 60, 60 * 7, 60 * 24 * 3]))
        holder = str(dice.randrange(3))
        if lead(connection, now, *known, holder=holder) and dice.random() < 0.7:
            for each in known:
                while App.fire(connection, each, holder, now):
                    pass
    for (text, zone), each in zip(plans, known, strict=True):
        rows = connection.execute(
            "SELECT slot, state FROM orchestrator.slots WHERE schedule = %s AND slot <= %s ORDER BY slot",
            (each.name, YEAR[1] - MINUTE),
        ).fetchall()
        assert [slot for slot, _ in rows] == expected_slots(text, zone, *YEAR)
        assert {state for _, state in rows} == {"started"}
    (count,) = connection.execute("SELECT count(*) FROM orchestrator.slots").fetchone() or (0,)
    assert connection.execute("SELECT count(*) FROM orchestrator.runs").fetchone() == (count,)


# -- who leads ---------------------------------------------------------------------------------------------------------
def test_a_leader_leads_until_it_resigns_or_was_not_seen_for_a_lease(connection: Connection) -> None:
    assert lead(connection, BEGIN)
    assert not lead(connection, BEGIN + LEASE, holder="b")
    assert lead(connection, BEGIN + LEASE)
    found = lead(connection, BEGIN + 3 * LEASE, holder="b")
    assert found and found.led_until == BEGIN + LEASE
    store.resign(connection, "app", "b")
    assert lead(connection, BEGIN + 3 * LEASE)
    assert lead(connection, BEGIN - HOUR, holder="b"), "nobody waits for an instant that a wrong clock has left"


def test_who_leads_no_more_cannot_fire(connection: Connection) -> None:
    hourly = schedule()
    lead(connection, BEGIN, hourly)
    assert lead(connection, BEGIN + DAY, holder="b")
    assert App.fire(connection, hourly, "a", BEGIN + DAY) == []
    assert App.fire(connection, hourly, "b", BEGIN + DAY) != []


def test_a_leader_frozen_in_its_transaction_holds_nobody_up_and_is_ended(
    connection: Connection, database_url: str
) -> None:
    hourly, other = schedule(), schedule("other")
    lead(connection, BEGIN, hourly, other)
    with open_connection(database_url, name="frozen") as frozen:
        frozen.execute("BEGIN")
        assert store.hold(frozen, "app", "it", "a", BEGIN)
        assert fire(connection, hourly, BEGIN + HOUR, holder="b") == []
        assert began(fire(connection, other, BEGIN + HOUR, holder="b")) == [BEGIN + HOUR]
        assert frozen.execute("SHOW idle_in_transaction_session_timeout").fetchone() == ("5s",)
        frozen.execute("ROLLBACK")


# -- what changes ------------------------------------------------------------------------------------------------------
def test_a_schedule_begins_when_it_is_declared_and_one_that_changes_where_its_leader_stopped(
    connection: Connection,
) -> None:
    hourly = schedule()
    lead(connection, BEGIN, hourly)
    assert fire(connection, hourly, BEGIN + HOUR - MINUTE) == []
    halves = schedule(timetable=Interval(HOUR / 2), reads="half-hourly", catch_up=CatchUp(each=EVER))
    later = BEGIN + 10 * HOUR
    lead(connection, later, halves, holder="b")
    assert began(fire(connection, halves, later, holder="b"))[0] == BEGIN + HOUR - MINUTE + HOUR / 2


@pytest.mark.parametrize("at_first", [False, True], ids=["later", "at first"])
def test_a_schedule_that_was_bad_for_a_while_catches_up_when_it_is_mended(
    connection: Connection, at_first: bool
) -> None:
    hourly = schedule(catch_up=CatchUp(each=EVER))
    bad = store.Declared("it", "", "", "it cannot be used: it has no argument `wrong`")
    if not at_first:
        lead(connection, BEGIN, hourly)
        assert began(fire(connection, hourly, BEGIN + HOUR)) == [BEGIN + HOUR]
    found = lead(connection, BEGIN + at_first * HOUR, holder="b" if at_first else "a")
    assert found
    store.declare(connection, "app", [bad], found.now, BEGIN + HOUR)
    lead(connection, BEGIN + 3 * HOUR + MINUTE, holder="b")  # it leads all the time, and cannot use the entry
    lead(connection, BEGIN + 4 * HOUR, hourly, holder="c")
    assert began(fire(connection, hourly, BEGIN + 4 * HOUR, holder="c")) == [BEGIN + n * HOUR for n in (2, 3, 4)]


def test_a_schedule_whose_timetable_changes_while_it_is_bad_goes_on_from_where_the_last_leader_stopped(
    connection: Connection,
) -> None:
    hourly = schedule(catch_up=CatchUp(each=EVER))
    lead(connection, BEGIN, hourly)
    fire(connection, hourly, BEGIN + HOUR)
    store.declare(connection, "app", [store.Declared("it", "", "", "it cannot be used")], BEGIN + HOUR, BEGIN + HOUR)
    halves = schedule(timetable=Interval(HOUR / 2), reads="half-hourly", catch_up=CatchUp(each=EVER))
    lead(connection, BEGIN + 2 * HOUR)
    lead(connection, BEGIN + 4 * HOUR, halves, holder="b")
    assert began(fire(connection, halves, BEGIN + 4 * HOUR, holder="b"))[0] == BEGIN + 2 * HOUR + HOUR / 2


def test_a_slot_that_a_person_has_fired_before_beat_comes_to_it_cancels_nothing(connection: Connection) -> None:
    """Beat was away: its latest slot was backfilled, and runs."""
    hourly = schedule(overlap=Overlap.CANCEL)
    lead(connection, BEGIN, hourly)
    told = App.backfill(connection, hourly, BEGIN + HOUR, BEGIN + 2 * HOUR, BEGIN + 2 * HOUR)
    assert [each.state for each in told] == ["started", "waiting"]
    assert fire(connection, hourly, BEGIN + 2 * HOUR + MINUTE) == []
    cancels = "SELECT count(*) FROM orchestrator.arrivals WHERE arrival ->> 'e' = 'cancel'"
    assert connection.execute(cancels).fetchone() == (0,)
    end(connection, told[0].run_id)
    assert began(fire(connection, hourly, BEGIN + 2 * HOUR + MINUTE)) == [BEGIN + 2 * HOUR], "its turn has come"


def test_a_schedule_that_is_gone_fires_no_more_and_keeps_its_place(connection: Connection) -> None:
    hourly, other = schedule(), schedule("other")
    lead(connection, BEGIN, hourly, other)
    lead(connection, BEGIN, other)
    assert store.standing(connection, "app").keys() == {"other"}
    lead(connection, BEGIN, hourly, other)
    assert store.standing(connection, "app").keys() == {"it", "other"}


# -- what was missed ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("catch_up", "fired", "left_out"),
    [
        (CatchUp(), [5], 4),
        (CatchUp(each=EVER), [1, 2, 3, 4, 5], None),
        (CatchUp(last=timedelta(0)), [], 5),
        (CatchUp(each=2 * HOUR, last=timedelta(0)), [4, 5], 3),
        (CatchUp(last=20 * MINUTE), [], 5),
    ],
)
def test_missed_slots_are_caught_up_or_left_out_by_policy_and_on_record(
    connection: Connection, catch_up: CatchUp, fired: list[int], left_out: int | None
) -> None:
    hourly = schedule(catch_up=catch_up)
    lead(connection, BEGIN, hourly)
    told = fire(connection, hourly, BEGIN + 5 * HOUR + 30 * MINUTE)
    assert began(told) == [BEGIN + n * HOUR for n in fired]
    skipped = [each.slot for each in told if each.state == "skipped"]
    assert skipped == ([] if left_out is None else [BEGIN + left_out * HOUR])
    assert fire(connection, hourly, BEGIN + 5 * HOUR + 31 * MINUTE) == []
    assert began(fire(connection, hourly, BEGIN + 6 * HOUR)) == [BEGIN + 6 * HOUR]


@pytest.mark.parametrize("catch_up", [CatchUp(), CatchUp(last=timedelta(0))])
def test_a_slot_that_is_a_little_late_is_not_missed(connection: Connection, catch_up: CatchUp) -> None:
    often = schedule(timetable=Interval(timedelta(seconds=10)), catch_up=catch_up)
    lead(connection, BEGIN, often)
    assert len(began(fire(connection, often, BEGIN + timedelta(seconds=45)))) == 4


def test_a_clock_that_goes_back_fires_nothing_twice(connection: Connection) -> None:
    hourly = schedule()
    lead(connection, BEGIN, hourly)
    assert began(fire(connection, hourly, BEGIN + 2 * HOUR)) == [BEGIN + 2 * HOUR]
    assert fire(connection, hourly, BEGIN + HOUR, holder="b") == []
    assert began(fire(connection, hourly, BEGIN + 3 * HOUR, holder="b")) == [BEGIN + 3 * HOUR]


# -- runs that have not ended ------------------------------------------------------------------------------------------
def end(connection: Connection, own_id: str) -> None:
    connection.execute(
        "UPDATE orchestrator.runs SET state = 'completed', finished_at = orchestrator.now() WHERE id = %s", [own_id]
    )


def test_overlap_skip_leaves_slots_out_while_a_run_has_not_ended(connection: Connection) -> None:
    hourly = schedule(overlap=Overlap.SKIP)
    lead(connection, BEGIN, hourly)
    (first,) = fire(connection, hourly, BEGIN + HOUR)
    (second,) = fire(connection, hourly, BEGIN + 2 * HOUR)
    assert (second.state, second.because) == ("skipped", f"run {first.run_id} has not ended")
    end(connection, first.run_id)
    assert began(fire(connection, hourly, BEGIN + 3 * HOUR)) == [BEGIN + 3 * HOUR]


def test_overlap_queue_runs_the_slots_one_after_the_other(connection: Connection) -> None:
    hourly = schedule(overlap=Overlap.QUEUE)
    lead(connection, BEGIN, hourly)
    told = [*fire(connection, hourly, BEGIN + HOUR), *fire(connection, hourly, BEGIN + 2 * HOUR)]
    told += fire(connection, hourly, BEGIN + 3 * HOUR)
    assert [each.state for each in told] == ["started", "waiting", "waiting"]
    for number in (0, 1):
        end(connection, told[number].run_id)
        assert began(fire(connection, hourly, BEGIN + 3 * HOUR)) == [told[number + 1].slot]


def test_overlap_cancel_has_the_run_before_undone_and_begins_when_it_has_ended(
    connection: Connection, database_url: str
) -> None:
    hourly = schedule(overlap=Overlap.CANCEL)
    child = Child(database_url)
    try:
        lead(connection, BEGIN, hourly)
        (first,) = fire(connection, hourly, BEGIN + HOUR)
        child.drain()
        (second,) = fire(connection, hourly, BEGIN + 2 * HOUR)
        (third, superseded) = (fire(connection, hourly, BEGIN + 3 * HOUR)[0], second)
        assert (second.state, third.state) == ("waiting", "waiting")
        child.drain()
        assert state(connection, first.run_id) == "cancelled"
        assert began(fire(connection, hourly, BEGIN + 3 * HOUR)) == [third.slot]
        states = dict(connection.execute("SELECT run_id, state FROM orchestrator.slots").fetchall())
        assert states[superseded.run_id] == "skipped" and states[third.run_id] == "running"
    finally:
        child.close()


# -- a restore of the database -----------------------------------------------------------------------------------------
def told_of_a_restore(connection: Connection) -> list[str]:
    query = "SELECT run_id FROM orchestrator.arrivals WHERE arrival ->> 'e' = 'restore' ORDER BY run_id"
    return [own_id for (own_id,) in connection.execute(query).fetchall()]


def test_the_runs_of_slots_that_a_restore_may_have_forgotten_hear_of_it_and_later_ones_do_not(
    connection: Connection,
) -> None:
    hourly = schedule(catch_up=CatchUp(each=EVER))
    lead(connection, BEGIN, hourly)
    fire(connection, hourly, BEGIN + HOUR)
    restores.begin(connection, "ann", BEGIN + 3 * HOUR)
    told = fire(connection, hourly, BEGIN + 4 * HOUR)
    assert began(told) == [BEGIN + n * HOUR for n in (2, 3, 4)]
    assert told_of_a_restore(connection) == [each.run_id for each in told[:2]]
    App.trigger(connection, hourly, BEGIN + 4 * HOUR + MINUTE)
    assert len(App.backfill(connection, hourly, BEGIN - HOUR, BEGIN, BEGIN + 5 * HOUR)) == 2
    assert len(told_of_a_restore(connection)) == 2, "what a person orders afterwards has not been there before"


def test_a_slot_that_waited_when_a_restore_came_may_have_run_and_its_run_hears_of_it(connection: Connection) -> None:
    hourly = schedule(overlap=Overlap.QUEUE)
    lead(connection, BEGIN, hourly)
    (first,) = fire(connection, hourly, BEGIN + HOUR)
    (second,) = fire(connection, hourly, BEGIN + 2 * HOUR)
    restores.begin(connection, "ann", BEGIN + 2 * HOUR + MINUTE)
    (third,) = fire(connection, hourly, BEGIN + 3 * HOUR)
    for ended, next_one in ((first, second), (second, third)):
        end(connection, ended.run_id)
        assert began(fire(connection, hourly, BEGIN + 3 * HOUR)) == [next_one.slot]
    assert told_of_a_restore(connection) == [second.run_id]


def test_a_slot_that_beat_makes_up_for_after_a_restore_hears_of_it_also_when_it_has_to_wait(
    connection: Connection,
) -> None:
    hourly = schedule(overlap=Overlap.QUEUE, catch_up=CatchUp(each=EVER))
    lead(connection, BEGIN, hourly)
    (first,) = fire(connection, hourly, BEGIN + HOUR)
    restores.begin(connection, "ann", BEGIN + 3 * HOUR)
    second, third, fourth = fire(connection, hourly, BEGIN + 4 * HOUR)
    for ended, next_one in ((first, second), (second, third), (third, fourth)):
        end(connection, ended.run_id)
        assert began(fire(connection, hourly, BEGIN + 4 * HOUR)) == [next_one.slot]
    assert told_of_a_restore(connection) == [second.run_id, third.run_id]


@pytest.mark.parametrize("overlap", [Overlap.ALLOW, Overlap.QUEUE])
def test_a_backfill_of_slots_that_a_restore_may_have_forgotten_tells_their_runs_of_it(
    connection: Connection, overlap: Overlap
) -> None:
    hourly = daily("0 * * * *", "Europe/Berlin", overlap=overlap)
    lead(connection, BEGIN, hourly)
    (first,) = fire(connection, hourly, BEGIN + HOUR)
    end(connection, first.run_id)
    assert store.pause(connection, "app", hourly.name, "ann", "the database was set back", BEGIN + HOUR + MINUTE)
    restores.begin(connection, "ann", BEGIN + 3 * HOUR)
    assert store.resume(connection, "app", hourly.name, catch_up=False, now=BEGIN + 3 * HOUR + MINUTE)
    told = App.backfill(connection, hourly, BEGIN, BEGIN + 3 * HOUR, BEGIN + 3 * HOUR + MINUTE)
    for each in told:
        fire(connection, hourly, BEGIN + 3 * HOUR + MINUTE)
        end(connection, each.run_id)
    _, *forgotten = [each.run_id for each in told]
    assert told_of_a_restore(connection) == forgotten and len(forgotten) == 2
    assert told[0].slot == BEGIN, "that one lies before what is on record, and had not fired"


# -- people ------------------------------------------------------------------------------------------------------------
def test_a_paused_schedule_fires_nothing_and_goes_on_after_the_pause_or_catches_up(connection: Connection) -> None:
    hourly = schedule()
    lead(connection, BEGIN, hourly)
    assert store.pause(connection, "app", "it", "ann", "too much", BEGIN)
    assert not store.pause(connection, "app", "it", "bob", "me too", BEGIN)
    assert fire(connection, hourly, BEGIN + 2 * HOUR) == []
    assert store.resume(connection, "app", "it", catch_up=False, now=BEGIN + 2 * HOUR + MINUTE)
    assert fire(connection, hourly, BEGIN + 3 * HOUR) == []
    assert store.pause(connection, "app", "it", "ann", "", BEGIN + 3 * HOUR)
    assert store.resume(connection, "app", "it", catch_up=True, now=BEGIN + 5 * HOUR)
    assert began(fire(connection, hourly, BEGIN + 5 * HOUR)) == [BEGIN + 4 * HOUR + MINUTE]


def test_after_a_clock_that_was_ahead_a_pause_lets_a_schedule_go_on_from_now_and_fires_nothing_twice(
    connection: Connection,
) -> None:
    hourly = schedule()
    lead(connection, BEGIN, hourly)
    assert began(fire(connection, hourly, BEGIN + HOUR)) == [BEGIN + HOUR]
    assert began(fire(connection, hourly, BEGIN + 365 * DAY)) == [BEGIN + 365 * DAY]
    back = BEGIN + 2 * HOUR + MINUTE
    assert fire(connection, hourly, back) == []
    assert store.pause(connection, "app", "it", "ann", "the clock was set back", back)
    assert store.resume(connection, "app", "it", catch_up=False, now=back)
    assert began(fire(connection, hourly, back + HOUR)) == [back + HOUR]
    store.pause(connection, "app", "it", "ann", "", BEGIN + 365 * DAY - HOUR)
    assert store.resume(connection, "app", "it", catch_up=False, now=BEGIN + 365 * DAY - HOUR)
    assert fire(connection, hourly, BEGIN + 365 * DAY) == [], "it has fired"


def test_a_trigger_fires_at_once_and_minds_the_overlap_policy(connection: Connection) -> None:
    hourly = schedule(overlap=Overlap.SKIP)
    first = App.trigger(connection, hourly, BEGIN)
    assert first.state == "started" and first.run_id == run_id("app", "it", BEGIN)
    assert App.trigger(connection, hourly, BEGIN + MINUTE).state == "skipped"


def test_a_backfill_fires_what_has_not_fired_and_only_once(connection: Connection) -> None:
    nightly = daily("0 3 * * *", "Europe/Berlin", catch_up=CatchUp())
    lead(connection, BEGIN, nightly)
    assert len(began(fire(connection, nightly, BEGIN + 4 * DAY))) == 1
    since, until = BEGIN - 2 * DAY, BEGIN + 9 * DAY
    told = App.backfill(connection, nightly, since, until, BEGIN + 4 * DAY)
    assert [f"{each.slot:%d}" for each in told] == ["30", "31", "01", "02", "03"], (
        "the 4th has fired, the 5th is to come"
    )
    assert {each.state for each in told} == {"started"}
    assert App.backfill(connection, nightly, since, until, BEGIN + 4 * DAY) == []


def test_a_backfill_does_not_say_that_it_started_what_fired_so_long_ago_that_only_its_run_is_known(
    connection: Connection,
) -> None:
    hourly = daily("0 * * * *", "Europe/Berlin")
    lead(connection, BEGIN, hourly)
    assert len(began(fire(connection, hourly, BEGIN + HOUR))) == 1
    now = BEGIN + HOUR + 40 * DAY
    store.settle(connection, "app", hourly.name, now)
    assert store.forget(connection, "app", 30 * DAY, now=now) == 1
    told = App.backfill(connection, hourly, BEGIN, BEGIN + 2 * HOUR, now)
    assert began(told) == [BEGIN, BEGIN + 2 * HOUR]
    (count,) = connection.execute("SELECT count(*) FROM orchestrator.runs").fetchone() or (0,)
    assert count == 3


def test_a_backfill_of_a_schedule_that_must_not_overlap_runs_in_order(connection: Connection) -> None:
    hourly = schedule(overlap=Overlap.SKIP)
    lead(connection, BEGIN, hourly)
    told = App.backfill(connection, hourly, BEGIN - 3 * HOUR, BEGIN, BEGIN)
    assert [each.state for each in told] == ["started", "waiting", "waiting", "waiting"]
    end(connection, told[0].run_id)
    assert began(fire(connection, hourly, BEGIN)) == [told[1].slot]


def test_a_long_backfill_of_slots_that_wait_looks_at_them_once_a_page(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looked at all of them for each: thousands took minutes, and beat could not come to that schedule."""
    looks: list[int] = []
    look_at = store.open_slots

    def counted(*given: Any) -> list[store.Open]:
        looks.append(1)
        return look_at(*given)

    monkeypatch.setattr(store, "open_slots", counted)
    often = schedule(overlap=Overlap.QUEUE, timetable=Interval(MINUTE))
    lead(connection, BEGIN, often)
    told = App.backfill(connection, often, BEGIN - 299 * MINUTE, BEGIN, BEGIN)
    assert [each.state for each in told] == ["started"] + ["waiting"] * 299
    assert len(looks) == 3


def test_too_long_a_backfill_is_refused_and_fires_nothing(connection: Connection) -> None:
    often = schedule(timetable=Interval(timedelta(seconds=1)))
    with pytest.raises(UsageError, match="more than 10000 slots"):
        App.backfill(connection, often, BEGIN - DAY, BEGIN, BEGIN)
    assert connection.execute("SELECT count(*) FROM orchestrator.slots").fetchone() == (0,)


# -- messages ----------------------------------------------------------------------------------------------------------
def test_a_message_is_sent_again_with_the_same_id_until_it_is_noted(connection: Connection, database_url: str) -> None:
    plain = schedule(start=None)
    lead(connection, BEGIN, plain)
    (decision,) = fire(connection, plain, BEGIN + HOUR)
    sent: list[str] = []

    def die(name: str, slot: datetime, message_id: str) -> None:
        sent.append(message_id)
        raise ConnectionError("the sender dies before it has noted that it sent")

    def send(name: str, slot: datetime, message_id: str) -> None:
        sent.append(message_id)
        with open_connection(database_url, name="other") as other:
            assert App.send_one(other, die, ["it"]) is None, "nobody else sends it meanwhile"

    with pytest.raises(ConnectionError):
        App.send_one(connection, die, ["it"])
    assert App.send_one(connection, send, ["it"]) == "it"
    assert App.send_one(connection, send, ["it"]) is None
    assert sent == [decision.run_id] * 2


def test_decided_slots_are_forgotten_in_the_end_and_do_not_fire_again(connection: Connection) -> None:
    hourly = schedule(catch_up=CatchUp(each=EVER))
    lead(connection, BEGIN, hourly)
    fire(connection, hourly, BEGIN + 5 * HOUR)
    assert store.forget(connection, "app", 2 * HOUR, now=BEGIN + 5 * HOUR) == 2
    assert fire(connection, hourly, BEGIN + 5 * HOUR) == []


def test_ids_are_short_and_printable_whatever_a_schedule_is_called() -> None:
    assert run_id("app", "nightly", BEGIN) == "app/nightly@2026-01-01T00:00:00Z"
    odd = {run_id("app", name, BEGIN) for name in ("x" * 500, "naïve", "a\nb", "")}
    assert len(odd) == 4 and all(each.isascii() and each.isprintable() and len(each) <= 200 for each in odd)


def test_a_slash_in_a_name_makes_no_two_slots_one(connection: Connection) -> None:
    """App `a` with `b/c` and app `a/b` with `c` share a database: one of the two runs never started."""
    for app, name in ("a", "b/c"), ("a/b", "c"):
        decision = Schedules(app, lambda connection, queue, rows: None).trigger(connection, schedule(name), BEGIN)
        assert decision.state == "started"
    assert connection.execute("SELECT count(*) FROM orchestrator.runs").fetchone() == (2,)
    assert run_id("a", "b/c", BEGIN) == "a/b/c@2026-01-01T00:00:00Z"
    odd = {run_id(app, name, BEGIN) for app, name in (("a", "b/ç"), ("a/b", "ç"), ("a/b", "c"), ("a/b/c", ""))}
    assert len(odd) == 4
