"""schedules: what beat fires and when, and what people may order."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import psycopg
import pytest
import redis
from celery.schedules import crontab

from tests.cli.conftest import Terminal

CHECKOUT = "tests.cli.shop.checkout"
ENTRIES = {
    "nightly": {
        "task": CHECKOUT, "schedule": crontab(minute="0", hour="3"), "args": ({"id": "nightly"},),
        "options": {"timezone": "Europe/Berlin", "overlap": "skip"},
    },
    "often": {"task": CHECKOUT, "schedule": timedelta(hours=1), "args": ({"id": "often"},)},
    "plain": {"task": "celery.ping", "schedule": 3600},
    "lost": {"task": CHECKOUT, "schedule": crontab(), "options": {"timezone": "Mars/Olympus"}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def entries(terminal: Terminal) -> Iterator[None]:
    terminal.shop.app.conf.beat_schedule = ENTRIES
    yield
    terminal.shop.app.conf.beat_schedule = {}


def listed(terminal: Terminal, name: str, *options: str) -> dict[str, object]:
    found = {each["name"]: each for each in terminal.json("schedules", *options)["schedules"]}
    assert found.keys() == {*ENTRIES, "celery.backend_cleanup", "orchestrator.reconcile"}, "Celery's own and ours"
    entry: dict[str, object] = found[name]
    return entry


def test_the_list_has_each_entry_with_its_next_slots_and_what_is_wrong_with_it(terminal: Terminal) -> None:
    nightly = listed(terminal, "nightly", "--next", "3")
    assert (nightly["task"], nightly["timetable"]) == (CHECKOUT, "0 3 * * * Europe/Berlin")
    assert isinstance(nightly["next"], list) and len(nightly["next"]) == 3
    assert "there is no time zone 'Mars/Olympus'" in str(listed(terminal, "lost")["problem"])
    said = terminal.run("schedules", columns=200).stdout
    assert "0 3 * * * Europe/Berlin" in said and "every 3600 s" in said
    assert "'lost': it cannot be used: there is no time zone 'Mars/Olympus'" in said
    assert "No beat leads, so nothing fires" in said


def test_the_list_says_which_beat_leads(terminal: Terminal) -> None:
    with psycopg.connect(terminal.database_url) as connection:
        connection.execute(
            "INSERT INTO orchestrator.leaders VALUES ('shop', 'here 123 abc', clock_timestamp(), clock_timestamp())"
        )
    assert "Beat: here 123, seen" in terminal.ok("schedules")
    assert terminal.json("schedules")["leader"]["beat"] == "here 123 abc"


def test_a_schedule_is_paused_with_name_and_reason_and_resumed(terminal: Terminal) -> None:
    assert "nightly is paused" in terminal.ok("schedules", "pause", "nightly", "--by", "ann", "--reason", "audit")
    assert listed(terminal, "nightly")["paused"] and listed(terminal, "nightly")["next"] == []
    assert "paused by ann: audit" in terminal.run("schedules", columns=200).stdout
    assert terminal.json("schedules", "pause", "nightly")["changed"] is False
    assert "fires again" in terminal.ok("schedules", "resume", "nightly")
    assert "is not paused" in terminal.ok("schedules", "resume", "nightly", "--catch-up")
    assert listed(terminal, "nightly")["paused"] is None


def test_a_trigger_starts_a_run_at_once_unless_its_policy_refuses(terminal: Terminal) -> None:
    first = terminal.json("schedules", "trigger", "nightly")
    assert first["state"] == "started" and terminal.json("show", first["id"])["saga"] == CHECKOUT
    refused = terminal.run("schedules", "trigger", "nightly")
    assert refused.exit_code == 1 and f"run {first['id']} has not ended" in refused.stdout
    assert listed(terminal, "nightly")["last"]


def test_a_trigger_of_a_plain_task_sends_it(terminal: Terminal) -> None:
    sent = terminal.json("schedules", "trigger", "plain")
    with redis.Redis.from_url(terminal.broker_url) as client:
        assert [sent["id"].encode() in message for message in client.lrange("celery", 0, -1)] == [True]  # type: ignore[union-attr]


def test_a_backfill_fires_each_slot_of_a_range_once(terminal: Terminal) -> None:
    days = ("--since", "2026-03-28T00:00+01:00", "--until", "2026-03-30T23:00+02:00")
    slots = terminal.json("schedules", "backfill", "nightly", *days)["slots"]
    assert [each["slot"] for each in slots] == [
        f"2026-03-{day}T0{hour}:00:00+00:00" for day, hour in ((28, 2), (29, 1), (30, 1))
    ]
    assert [each["state"] for each in slots] == ["started", "waiting", "waiting"]
    assert "There is no slot in that time" in terminal.ok("schedules", "backfill", "nightly", *days)


@pytest.mark.parametrize(
    ("since", "until", "said"),
    [
        ("0001-01-01T00:00+14:00", "0001-01-03T00:00Z", "There is no slot in that time"),
        ("0001-01-01T00:00+14:00", "9999-12-31T23:59-12:00", "more than 10000 slots"),
        ("9999-12-31T23:59-12:00", "9999-12-31T23:59-12:00", "There is no slot in that time"),
    ],
)
def test_a_backfill_may_begin_and_end_at_the_ends_of_time(
    terminal: Terminal, since: str, until: str, said: str
) -> None:
    result = terminal.run("schedules", "backfill", "nightly", "--since", since, "--until", until)
    assert said in result.output and not isinstance(result.exception, OverflowError)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ("trigger", "nobody"),
            1,
            "'nobody'; there are: 'celery.backend_cleanup', 'nightly', 'often', 'orchestrator.reconcile', 'plain'",
        ),
        (("trigger", "lost"), 1, "there is no time zone 'Mars/Olympus'"),
        (("pause", "nobody"), 1, "there is no schedule 'nobody'"),
        (("backfill", "nightly", "--since", "yesterday", "--until", "2026-01-01T00:00Z"), 2, "with its zone"),
        (("backfill", "nightly", "--since", "2026-01-01", "--until", "2026-01-01T00:00Z"), 2, "with its zone"),
        (("backfill", "nightly", "--since", "2026-01-01T00:00Z"), 2, "Missing option '--until'"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    terminal: Terminal, arguments: tuple[str, ...], code: int, said: str
) -> None:
    result = terminal.run("schedules", *arguments, columns=200)
    assert (result.exit_code, said in result.output) == (code, True), result.output


def test_without_a_schema_it_says_how_to_make_one(terminal: Terminal, on: object, empty_database_url: str) -> None:
    result = on(empty_database_url, terminal.broker_url).run("schedules")  # type: ignore[operator]
    assert result.exit_code == 1 and "saga migrate" in result.output
