"""The checker finds each broken promise by its own name, and nothing in a database where all were kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from tests.acceptance.running import until
from tests.proof import town
from tests.proof.checker import (
    NOTHING,
    RULES,
    STRICT,
    Baseline,
    Demand,
    Levels,
    Seen,
    check,
    refused_in,
    wait_until_settled,
)
from tests.proof.conftest import Place
from tests.proof.levels import measure
from tests.proof.plants import PLANTS, TAKE, Plant, checked, leave_an_arrival, start_one_that_nobody_takes, without

# Postgres takes its time to count what tests before left, and to end connections that are closed.
CONNECTIONS_ONLY = Levels(dead_tuples=1_000_000)
OTHERS = Levels(dead_tuples=1_000_000, connections=100)


def test_where_every_promise_was_kept_nothing_is_found(place: Place) -> None:
    report = checked(place, canaries=[town.CANARY], places={"log": b"nothing to see"})
    assert report.ok, str(report)
    assert report.seen["runs"] == len(town.STARTED) + 1, "one corrects another"


# -- one plant for each rule -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "change"), PLANTS, ids=[change.__name__ for _, change in PLANTS])
def test_a_broken_promise_is_found_by_its_own_name(place: Place, name: str, change: Plant) -> None:
    report = checked(place, **(change(place) or {}))
    assert report.names == {name}, str(report)


def test_every_rule_has_its_plant() -> None:
    assert {name for name, _ in PLANTS} == set(RULES)


# -- what must have been seen ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("what", ["acknowledged", "effects", "faults", "redeliveries", "fenced", "redispatches"])
def test_a_run_that_saw_too_little_fails(place: Place, what: str) -> None:
    words = {"acknowledged": "acknowledged start", "effects": "effect", "faults": "fault",
             "redeliveries": "redelivery", "fenced": "fenced write", "redispatches": "re-dispatch"}  # fmt: skip
    demand = replace(STRICT, **{what: 1000})  # type: ignore[arg-type]
    report = checked(place, demand=demand)
    assert report.names == {f"saw no {words[what]}"}


def test_a_state_that_was_to_be_reached_and_was_not_fails(place: Place) -> None:
    place.execute("DELETE FROM orchestrator.journal WHERE run_id = 'terminated'")
    place.execute("DELETE FROM orchestrator.runs WHERE id = 'terminated'")
    without(place, "terminated", TAKE.format(0), "do")
    report = checked(place, acknowledged=set(town.STARTED) - {"terminated"})
    assert report.names == {"saw no run that is terminated"}


def test_an_empty_database_does_not_pass(database_url: str, tmp_path: Path) -> None:
    (tmp_path / "effects").touch()
    report = check(database_url, effect_log=tmp_path / "effects")
    assert len(report.names) == 11 and all(name.startswith("saw no ") for name in report.names)
    assert check(database_url, effect_log=tmp_path / "effects", demand=NOTHING).ok


def test_without_the_trouble_of_the_test_itself_the_town_does_not_pass(place: Place) -> None:
    assert checked(place, seen=Seen()).names == {"saw no fault", "saw no redelivery"}


# -- what piles up -----------------------------------------------------------------------------------------------------
def test_connections_that_stay_open_are_found(place: Place) -> None:
    until(lambda: measure(place.database_url).connections == 0, "earlier connections are gone")
    baseline = Baseline.take(place.database_url)
    assert checked(place, baseline=baseline, allowance=CONNECTIONS_ONLY).ok
    with psycopg.connect(place.database_url):
        report = checked(place, baseline=replace(baseline, within_s=0), allowance=CONNECTIONS_ONLY)
    assert report.names == {"connections did not come back"}


def test_messages_and_memory_that_grow_are_found(place: Place) -> None:
    waiting = [0]
    baseline = Baseline.take(place.database_url, messages=lambda: waiting[0], within_s=0)
    waiting[0] = 9
    found = {v.name for v in baseline.compare(pids=[os.getpid()], allowance=OTHERS)}
    assert found == {"messages did not come back", "memory bytes did not come back"}
    assert not baseline.compare(allowance=replace(OTHERS, messages=9))


def test_rows_that_pile_up_are_found(place: Place) -> None:
    baseline = Baseline.take(place.database_url, within_s=0)
    start_one_that_nobody_takes(place)
    leave_an_arrival(place)
    place.execute("INSERT INTO orchestrator.drainers VALUES (1, 1, '{}')")
    found = {v.name for v in baseline.compare(allowance=OTHERS)}
    assert found == {"work did not come back", "arrivals did not come back", "marks did not come back"}


def test_dead_tuples_that_stay_are_found(place: Place) -> None:
    baseline = Baseline.take(place.database_url, within_s=0)
    with psycopg.connect(place.database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE orchestrator.runs SET (autovacuum_enabled = off)")
        for _ in range(3):
            connection.execute("UPDATE orchestrator.runs SET priority = 0")

    def counted() -> bool:
        return "dead tuples did not come back" in {v.name for v in baseline.compare(allowance=Levels())}

    assert until(counted, "dead tuples are counted")


# -- around it ---------------------------------------------------------------------------------------------------------
def test_while_runs_are_under_way_only_what_always_holds_is_judged(place: Place) -> None:
    start_one_that_nobody_takes(place)
    leave_an_arrival(place)
    assert checked(place, while_running=True).ok


def test_waiting_ends_when_nothing_moves_any_more(place: Place) -> None:
    assert wait_until_settled(place.database_url, 60, may_park=["parked"]) < 60
    looks: list[int] = []
    taken = wait_until_settled(place.database_url, 0.2, meanwhile=lambda: looks.append(1))
    assert taken >= 0.2 and looks, "a run is parked and was not told to be"


def test_what_workers_refused_is_read_from_their_logs() -> None:
    log = "[WARNING] run r-1 step 0/a.b#0: attempt 3 to {} has lost its fence, its outcome is refused\n"
    assert list(refused_in(log.format("do"), "else", log.format("undo"))) == [("r-1", "0/a.b#0", 3)]


def test_without_an_effect_log_the_tables_are_judged_and_the_strict_demand_is_not_met(place: Place) -> None:
    assert checked(place, effect_log=None).names == {"saw no effect"}


def test_a_damaged_effect_log_is_not_passed_over(place: Place) -> None:
    with place.effect_log.open("a") as file:
        file.write('{"run": "ke')
    with pytest.raises(ValueError):
        checked(place)


def test_a_place_that_cannot_be_searched_is_not_passed_over(place: Place, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        checked(place, places={"log": tmp_path / "no such file"})
    with pytest.raises(ValueError, match="is empty"):
        checked(place, places={"logs": tmp_path / "empty"})


def test_as_a_command_it_prints_what_it_found_and_its_exit_code_says_whether_all_is_well(place: Place) -> None:
    ids = place.effect_log.parent / "ids"
    ids.write_text("\n".join(town.STARTED))
    command = [sys.executable, "-m", "tests.proof.checker", "--database-url", place.database_url, "--json",
               "--effect-log", str(place.effect_log), "--acknowledged", str(ids), "--may-park", "parked",
               "--total", "SELECT 1 + 1=2", "--faults", "1"]  # fmt: skip
    good = subprocess.run([*command, "--redeliveries", "1"], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stdout + good.stderr
    assert json.loads(good.stdout)["seen"]["state completed"] == 4
    bad = subprocess.run(command, capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert [v["name"] for v in json.loads(bad.stdout)["violations"]] == ["saw no redelivery"]


def test_the_default_asks_for_everything() -> None:
    assert Demand() == STRICT
    assert STRICT.states == {"completed", "failed", "compensated", "cancelled", "terminated"}
