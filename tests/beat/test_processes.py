"""Several beats at once, killed, frozen, cut off, and told wrong times: no slot is lost, none fires twice."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import psycopg
import pytest
from celery import Celery
from kombu import Queue

from orchestrator import failpoints, store
from tests.acceptance.running import ROOT
from tests.beat.conftest import REPORT, Beat, Hall
from tests.crash.points import BEAT
from tests.engine.proxy import Proxy
from tests.faults.rabbitmq import MissingProgram, RabbitMQ

pytestmark = pytest.mark.timeout(400)

_FAKETIME = "usr/lib/*/faketime/libfaketime.so.1"
_JUMP = """
CREATE OR REPLACE FUNCTION orchestrator.now() RETURNS timestamptz LANGUAGE sql STABLE
    AS $$SELECT statement_timestamp() + interval '{}'$$
"""


@pytest.mark.parametrize("beats", [pytest.param(2, marks=pytest.mark.long), 3])
def test_leaders_that_are_killed_and_frozen_lose_and_double_no_slot(hall: Hall, beats: int) -> None:
    for _ in range(beats):
        hall.start()
    killed = hall.until_leads()
    hall.until_more("saga")
    killed.signal(signal.SIGKILL)
    hall.start()
    frozen = hall.until_leads(but=killed)
    hall.until_more("plain")
    frozen.signal(signal.SIGSTOP)
    hall.until_leads(but=frozen)
    hall.until_more("saga")
    frozen.signal(signal.SIGCONT)
    hall.until_more("plain")
    hall.judge("saga", "plain", died=2)


# -- for minutes -------------------------------------------------------------------------------------------------------
# Each returns how many senders may have died with a message sent that is not noted.
def _kill(hall: Hall, victim: Beat) -> int:
    victim.signal(signal.SIGKILL)
    hall.start()
    return 1


def _stop(hall: Hall, victim: Beat) -> int:
    victim.stop()
    hall.start()
    return 1


def _freeze(hall: Hall, victim: Beat) -> int:
    victim.signal(signal.SIGSTOP)
    hall.until_leads(but=victim)
    hall.until_more("saga")
    victim.signal(signal.SIGCONT)
    return 1


def _kill_all(hall: Hall, victim: Beat) -> int:
    alive = [beat for beat in hall.beats if beat.is_alive]
    for beat in alive:
        beat.signal(signal.SIGKILL)
    for _ in alive:
        hall.start()
    return 1


def _jump(hall: Hall, victim: Beat) -> int:
    """Let the database's clock jump ahead, and back when those slots have fired."""
    hall.sql(_JUMP.format("15 s"))
    hall.until_more("saga", 16)
    hall.sql(_JUMP.format("0 s"))
    return 0


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("beats", [2, 3])
def test_minutes_of_everything_that_can_befall_beats_lose_and_double_no_slot(hall: Hall, beats: int) -> None:
    dice = random.Random(beats)
    hall.entries["minutes"] = {"task": REPORT, "schedule": "* * * * *", "options": {"catch_up": "all"}}
    for _ in range(beats):
        hall.start()
    befell: Counter[str] = Counter()
    died = 0
    until = time.monotonic() + 180.0
    while time.monotonic() < until:
        leader = hall.until_leads()
        others = [beat for beat in hall.beats if beat.is_alive and beat is not leader]
        harm = dice.choice([_kill, _kill, _freeze, _freeze, _stop, _kill_all, _jump])
        victim = leader if harm is _freeze or dice.random() < 0.7 else dice.choice(others)
        died += harm(hall, victim)
        hall.until_leads(but=None if victim.is_alive else victim)
        hall.until_more("saga", dice.randrange(1, 4))
        befell[harm.__name__] += 1
    print(dict(befell))
    hall.judge("saga", "plain", died=died)
    fired = hall.slots("saga")
    full = [slot for slot in fired[:-2] if slot.second == 0]
    assert [slot for slot in hall.slots("minutes") if slot < fired[-2]] == full
    assert len(fired) > 120 and len(full) >= 2 and len(befell) >= 4


def test_a_leader_that_is_stopped_hands_over_at_once(hall: Hall) -> None:
    an_hour = {"ORCHESTRATOR_LEASE": "3600"}
    first = hall.start(**an_hour, BEATS="{}")
    hall.until_leads()
    second = hall.start("--max-interval", "1", **an_hour)
    hall.until(lambda: "another beat leads" in second.said, "it stands by")
    assert first.stop() == 0
    assert hall.until_leads(but=first) is second
    hall.until_more("saga", 1)


@pytest.mark.parametrize("action", ["exit", "raise"])
def test_a_beat_that_dies_or_is_cut_off_at_any_boundary_loses_and_doubles_no_slot(
    hall: Hall, action: str, tmp_path: Path
) -> None:
    """One of the entries cannot be sent, which is noted; a beat resigns when it is stopped."""
    hall.entries["bad"] = {"task": "beats.plain", "schedule": 1.0, "options": {"serializer": "of nobody"}}
    fired = tmp_path / "fired"
    fired.mkdir()
    again = {"beat.lead", "beat.fire", "beat.send"}  # what a beat does more than once in its life
    armed = {
        failpoints.VARIABLE: ";".join(
            f"{name}={action}@{1 + (name.rpartition('.')[0] in again)}" for name in sorted(BEAT)
        ),
        failpoints.FIRED: str(fired),
        "ORCHESTRATOR_LEASE": "0.5",
    }

    def revived(*names: str) -> bool:
        if not hall.beats or not hall.beats[-1].is_alive:
            hall.start(**armed)
        return {path.name for path in fired.iterdir()} >= set(names)

    at_the_end = ("beat.resign.before", "beat.resign.after")
    rest = sorted(BEAT - set(at_the_end))
    hall.until(lambda: revived(*rest), f"all of {rest} have acted")
    acted = {int(path.read_text().split()[1]) for path in fired.iterdir()} if action == "exit" else set()
    hall.until(lambda: not any(beat.is_alive and beat.process.pid in acted for beat in hall.beats), "they have ended")
    for name in at_the_end:
        hall.until(lambda: revived() and hall.until_leads() is hall.beats[-1], "it leads")
        hall.until_more("saga", 1)
        ended = hall.beats[-1].stop()
        assert revived(name), f"{name} has not acted: {ended}"
        assert ended == (failpoints.EXIT_CODE if action == "exit" else 0)
    hall.start(**armed)  # the last point has ended the last one
    hall.until_more("saga")
    hall.until_more("plain")
    hall.beats[-1].stop()
    hall.judge("saga", "plain", died=1 + len(at_the_end))  # a stop ends beat wherever it is


def test_beat_waits_for_a_database_that_is_not_there_not_migrated_and_lost_and_says_each_once(
    hall: Hall, empty_database_url: str
) -> None:
    hall.database_url = empty_database_url
    way = Proxy(empty_database_url)
    way.cut()
    try:
        beat = hall.start(ORCHESTRATOR_DATABASE_URL=way.url)
        hall.until(lambda: "cannot be reached" in beat.said, "it says that the database is away")
        way.restore()
        hall.until(lambda: "has no orchestrator schema" in beat.said, "it says that there is no schema")
        store.migrate(empty_database_url)
        hall.until(lambda: "the database is there; it goes on" in beat.said, "it says that all is well")
        hall.until_more("saga")
        way.cut()
        hall.until(lambda: beat.said.count("cannot be reached") == 2, "it says that the database is away again")
        way.restore()
        hall.until_more("saga")
        assert beat.stop() == 0
    finally:
        way.close()
    assert beat.said.count("cannot be reached") == 2 and beat.said.count("has no orchestrator schema") == 1
    hall.judge("saga", "plain", died=1)


def test_while_the_broker_is_away_sagas_start_and_tasks_are_kept_for_it(hall: Hall) -> None:
    way = Proxy(hall.broker_url)
    try:
        beat = hall.start(CELERY_BROKER_URL=way.url)
        hall.until_more("plain")
        way.cut()
        hall.until(lambda: hall.slots("plain", "sending"), "tasks that cannot be sent")
        hall.until_more("saga")
        assert beat.said.count("the broker cannot be reached") == 1
        way.restore()
        hall.until_more("plain", 5)
        hall.until(lambda: not hall.slots("plain", "sending"), "all are sent")
        assert beat.stop() == 0
    finally:
        way.close()
    hall.judge("saga", "plain", died=1)


def messages(broker_url: str) -> Counter[str]:
    """Take the messages out of Celery's queue; returns their ids, each with how often it was there."""
    found: Counter[str] = Counter()
    with Celery(broker=broker_url, set_as_current=False).connection_for_read() as connection:
        queue = Queue("celery")(connection.default_channel)
        while message := queue.get(no_ack=True):
            found[message.headers["id"]] += 1
    return found


@pytest.mark.debian
@pytest.mark.parametrize("state", ["stands still", "is short of memory"])
def test_while_a_rabbitmq_confirms_nothing_sagas_start_and_tasks_are_kept_for_it(
    hall: Hall, rabbitmq: RabbitMQ, state: str
) -> None:
    """It takes what is sent, and would deliver each copy in the end."""
    hall.broker_url = rabbitmq.new_url()
    beat = hall.start()
    hall.until_more("plain")
    rabbitmq.freeze() if state == "stands still" else rabbitmq.set_memory_limit("1MB")
    try:
        hall.until_more("saga", 8)
        hall.until(lambda: "the broker cannot be reached (it does not confirm" in beat.said, "it says so")
        assert hall.slots("plain", "sending")
    finally:
        rabbitmq.thaw() if state == "stands still" else rabbitmq.set_memory_limit("4GB")
    hall.until_more("plain", 5)
    hall.until(lambda: not hall.slots("plain", "sending"), "all are sent")
    hall.judge("saga")
    sent, there = messages(hall.broker_url), hall.slots("plain", "sent")
    assert set(sent.values()) == {1} and len(there) <= len(sent) <= len(there) + 1, "the last may not be noted any more"


def test_a_database_clock_that_jumps_loses_and_doubles_no_slot(hall: Hall) -> None:
    """An hour ahead, with another beat to take over, and back: then slots that were decided do not come again."""
    hall.entries = {"saga": {**hall.entries["saga"], "schedule": 60.0}, "often": hall.entries["saga"]}
    for _ in range(2):
        hall.start()
    hall.until_more("often", 2)
    hall.sql(_JUMP.format("1 hour"))
    hall.until(lambda: len(hall.slots("saga")) >= 60, "an hour of minutes is caught up with")
    hall.until(lambda: len(hall.slots("often")) >= 3602, "and one of seconds, in pages")
    hall.sql(_JUMP.format("0 s"))
    on_time = "SELECT seen_at < clock_timestamp() + interval '1 min' FROM orchestrator.leaders"
    hall.until(lambda: hall.sql(on_time)[0][0], "whoever leads follows the clock back")
    count = len(hall.slots("often"))
    killed = hall.until_leads()
    killed.signal(signal.SIGKILL)
    hall.until_leads(but=killed)
    assert len(hall.slots("often")) == count
    assert {(later - earlier).total_seconds() for earlier, later in pairwise(hall.slots("saga"))} == {60.0}
    hall.judge("often")


def test_bad_entries_are_named_and_the_others_fire(hall: Hall) -> None:
    bad = {
        "no such zone": {"task": REPORT, "schedule": "0 3 * * *", "options": {"timezone": "Mars/Olympus"}},
        "no schedule": {"task": REPORT, "schedule": "every night"},
        "no such argument": {"task": REPORT, "schedule": 1.0, "kwargs": {"wrong": 1}},
        "no task": {"schedule": 1.0},
        "garbage": 7,
    }
    hall.entries |= bad
    beat = hall.start()
    hall.until_more("saga")
    hall.until_more("plain", 1)
    said = [line for line in beat.said.splitlines() if "beat: entry" in line]
    assert [sum(f"entry {name!r}: it cannot be used" in line for line in said) for name in bad] == [1] * len(bad), said
    rows = dict(hall.sql("SELECT name, problem FROM orchestrator.schedules"))
    assert {name for name, problem in rows.items() if problem} == bad.keys()
    hall.judge("saga", "plain")


@pytest.mark.debian
def test_wall_clocks_of_beats_that_are_off_are_no_matter(hall: Hall) -> None:
    """An hour ahead, two behind, a year ahead; under libfaketime a jump would move the pauses of a process as well."""
    library = next(Path("/").glob(_FAKETIME), None)
    if library is None:
        raise MissingProgram("This test needs libfaketime, which is not installed here: apt-get install -y faketime")
    for offset in ("+3600", "-7200", "+34560000"):
        beat = hall.start(LD_PRELOAD=str(library), FAKETIME=offset)
        hall.until_leads(but=hall.beats[-2] if len(hall.beats) > 1 else None)
        hall.until_more("saga")
        beat.signal(signal.SIGKILL)
    hall.start()
    hall.until_more("plain")
    now = hall.sql("SELECT clock_timestamp()")[0][0]
    assert all(abs((slot - now).total_seconds()) < 600 for slot in hall.slots("saga"))
    hall.judge("saga", "plain", died=3)


@pytest.mark.parametrize("broker", ["valkey", pytest.param("rabbitmq", marks=pytest.mark.debian)])
def test_celerys_own_scheduler_takes_the_same_entries(
    hall: Hall, broker: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    ours = {"catch_up": 60, "overlap": "allow", "timezone": "Europe/Berlin"}
    hall.entries = {
        "plain": {"task": "beats.plain", "schedule": 1.0, "options": {**ours, "expires": 600}},
        "saga": {"task": REPORT, "schedule": 1.0, "options": {**ours, "slot_argument": "of", "overlap": "skip"}},
    }
    if broker == "rabbitmq":
        hall.broker_url = request.getfixturevalue("rabbitmq").new_url()
    hall.start("-S", "celery.beat:PersistentScheduler", "-s", str(tmp_path / "schedule"))
    hall.until(lambda: hall.sql("SELECT id FROM orchestrator.runs"), "a run")
    with Celery(broker=hall.broker_url, set_as_current=False).connection_for_read() as connection:
        queue = connection.SimpleQueue("celery")
        message = queue.get(timeout=30)
        assert message.headers["task"] == "beats.plain"
        queue.close()


def test_the_leader_of_another_app_is_no_matter(hall: Hall) -> None:
    with psycopg.connect(hall.database_url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO orchestrator.leaders VALUES ('other', 'somebody', clock_timestamp(), clock_timestamp())"
        )
    hall.start()
    hall.until_more("saga", 1)
    assert not list(ROOT.glob("celerybeat-schedule*")), "no file is written"
