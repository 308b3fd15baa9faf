"""The checker finds each broken promise by its own name, and nothing in a database where all were kept.

Each rule has its plant: the smallest change to a database that a real engine made which breaks this promise alone.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.engine.stage import start
from tests.proof import town
from tests.proof.checker import (
    NOTHING,
    RULES,
    STRICT,
    Baseline,
    Demand,
    Levels,
    Report,
    Seen,
    check,
    refused_in,
    wait_until_settled,
)
from tests.proof.conftest import Place
from tests.proof.effects import Effect

SEEN = Seen(faults=3, redeliveries=1)
TAKE = "tests.proof.town.take#{}"
WRITE = "tests.proof.town.write_down#0"
NO_ALLOWANCE = Levels()


def checked(place: Place, **changes: Any) -> Report:
    """Check the town with all that its story tells."""
    given: dict[str, Any] = {
        "effect_log": place.effect_log,
        "acknowledged": town.STARTED,
        "may_park": ["parked"],
        "refused": town.REFUSED,
        "seen": SEEN,
    }
    return check(place.database_url, **{**given, **changes})


def test_where_every_promise_was_kept_nothing_is_found(place: Place) -> None:
    report = checked(place, canaries=[town.CANARY], places={"log": b"nothing to see"})
    assert report.ok, str(report)
    assert report.seen["runs"] == len(town.STARTED) + 1, "one corrects another"


# -- one plant for each rule -------------------------------------------------------------------------------------------
Plant = Callable[[Place], dict[str, Any] | None]
PLANTS: list[tuple[str, Plant]] = []


def plant(name: str) -> Callable[[Plant], Plant]:
    """Register a plant for the rule of this name; it may return what the check is told besides."""

    def register(function: Plant) -> Plant:
        PLANTS.append((name, function))
        return function

    return register


@plant("an acknowledged start is lost")
def forget_a_run(place: Place) -> None:
    place.execute("DELETE FROM orchestrator.journal WHERE run_id = 'failed'")
    place.execute("DELETE FROM orchestrator.runs WHERE id = 'failed'")


@plant("a run has not ended")
def start_one_that_nobody_takes(place: Place) -> None:
    with psycopg.connect(place.database_url) as connection:
        start(connection, town.visit, ["a"], run_id="waits")


@plant("a run has not ended")
def park_without_being_told(place: Place) -> dict[str, Any]:
    return {"may_park": []}


@plant("an ended run has work or arrivals left")
def leave_a_turn(place: Place) -> None:
    place.execute(
        "INSERT INTO orchestrator.work (run_id, key, role, target, queue, due_at) "
        "VALUES ('kept', '', 'turn', '*', 'celery', now())"
    )


@plant("an ended run has work or arrivals left")
def leave_an_arrival(place: Place) -> None:
    place.execute("""INSERT INTO orchestrator.arrivals (run_id, arrival) VALUES ('kept', '{"e": "cancel"}')""")


@plant("a row belongs to no run")
def leave_an_arrival_for_nobody(place: Place) -> None:
    place.execute("""INSERT INTO orchestrator.arrivals (run_id, arrival) VALUES ('nobody', '{"e": "cancel"}')""")


@plant("a journal has a gap")
def tear_out_a_row(place: Place) -> None:
    place.execute("DELETE FROM orchestrator.journal WHERE run_id = 'kept' AND seq = 1")


@plant("a journal has a gap")
def tear_out_the_last_row(place: Place) -> None:
    place.execute("DELETE FROM orchestrator.journal j WHERE run_id = 'kept' AND seq = "
                  "(SELECT max(seq) FROM orchestrator.journal WHERE run_id = 'kept')")  # fmt: skip


@plant("journal time went back")
def turn_the_clock_back(place: Place) -> None:
    place.execute("UPDATE orchestrator.journal SET at = at - interval '1 day' WHERE run_id = 'kept' AND seq = 2")


def _column(run_id: str, column: str, value: str) -> None:
    def change(place: Place) -> None:
        place.execute(f"UPDATE orchestrator.runs SET {column} = {value} WHERE id = '{run_id}'")

    change.__name__ = f"change_{column}"
    plant("a journal does not fold to its row")(change)


_column("kept", "output", "'[]'")
_column("kept", "past_pivot", "true")
_column("undone", "state", "'failed'")
_column("undone", "error", "NULL")
_column("spot", "left_effects", "'[]' || jsonb_build_array('x')")
_column("parked", "parked", "'[]'")


@plant("a journal does not fold to its row")
def end_a_step_twice(place: Place) -> None:
    with place.journal("kept") as rows:
        settled = next(entry for row in rows for entry in row if entry["e"] == "settled")
        rows[-1].insert(0, settled | {"attempt": 2, "by": "ann"})


@plant("something was written after the end")
def write_after_the_end(place: Place) -> None:
    with place.journal("kept") as rows:
        rows.append([{"e": "cancel", "by": "ann"}])


@plant("an end has changed")
def end_again(place: Place) -> dict[str, Any]:
    before = checked(place)
    place.execute("UPDATE orchestrator.runs SET finished_at = now() WHERE id = 'kept'")
    return {"before": before}


@plant("a total has changed")
def lose_money(place: Place) -> dict[str, Any]:
    place.execute("CREATE TABLE money AS SELECT 99 AS cents")
    return {"conserved": {"money": ("SELECT sum(cents) FROM money", 100)}}


def _attempted(rows: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [entry for row in rows for entry in row if entry["e"] == "attempted"]


@plant("an attempt wrote after the one that followed it")
def swap_attempts(place: Place) -> None:
    with place.journal("spot") as rows:
        first, second = _attempted(rows)
        first["attempt"], second["attempt"] = 2, 1


@plant("an attempt wrote after the one that followed it")
def succeed_with_an_attempt_that_was_given_up(place: Place) -> None:
    with place.journal("late") as rows:
        next(e for row in rows for e in row if e["e"] == "settled")["attempt"] = 1
    with place.effects() as lines:
        lines[:] = [e for e in lines if (e.run, e.attempt) != ("late", 2)]


@plant("an attempt was counted and is not on record")
def forget_an_attempt(place: Place) -> None:
    with place.journal("rewritten") as rows:
        for row in rows:
            row[:] = [entry for entry in row if entry["e"] != "attempted"]


@plant("a row of work is behind its journal")
def begin_an_attempt_again(place: Place) -> None:
    place.execute(
        "INSERT INTO orchestrator.work (run_id, key, role, target, queue, due_at, attempt, fence) "
        "VALUES ('parked', %s, 'undo', 't', 'celery', now(), 1, 7)",
        [TAKE.format(0)],
    )


@plant("a step was begun after its undo")
def fail_after_the_undo(place: Place) -> None:
    with place.journal("undone") as rows:
        row = next(row for row in rows if any(entry["e"] == "undoing" for entry in row))
        row.append({"e": "attempted", "key": TAKE.format(1), "attempt": 2, "error": {}})


@plant("a step was begun after its undo")
def leave_forward_work_after_the_undo(place: Place) -> None:
    place.execute(
        "INSERT INTO orchestrator.work (run_id, key, role, target, queue, due_at, attempt) "
        "VALUES ('parked', %s, 'do', 't', 'celery', now(), 1)",
        [TAKE.format(0)],
    )


def _without(place: Place, run: str, key: str, direction: str) -> None:
    with place.effects() as lines:
        lines[:] = [e for e in lines if (e.run, e.key, e.direction) != (run, key, direction)]


@plant("a recorded success has no effect")
def lose_an_effect(place: Place) -> None:
    _without(place, "kept", TAKE.format(0), "do")


@plant("a recorded success has no effect")
def lose_the_effect_of_an_undo(place: Place) -> None:
    _without(place, "undone", TAKE.format(1), "undo")


@plant("a recorded success has no effect")
def lose_the_effect_of_a_late_success(place: Place) -> dict[str, Any]:
    with place.effects() as lines:
        lines[:] = [e for e in lines if (e.run, e.attempt, e.direction) != ("late", 1, "do") or "take#0" not in e.key]
    return {}


@plant("a recorded success has no effect")
def credit_an_effect_to_another_attempt(place: Place) -> None:
    with place.effects() as lines:
        lines[:] = [replace(e, attempt=1) if (e.run, e.attempt) == ("late", 2) else e for e in lines]


@plant("a step settled as without effect has one")
def do_it_and_call_it_rejected(place: Place) -> None:
    with place.effects() as lines:
        lines.append(Effect("failed", TAKE.format(0), 1, "do"))


@plant("an effect was not intended")
def do_what_nobody_asked_for(place: Place) -> None:
    with place.effects() as lines:
        lines.append(Effect("kept", TAKE.format(9), 1, "do"))


@plant("an effect is of an attempt that was never begun")
def do_it_once_more(place: Place) -> None:
    with place.effects() as lines:
        lines.append(Effect("kept", TAKE.format(0), 2, "do"))


@plant("a late success was dropped")
def forget_a_late_success(place: Place) -> None:
    with place.journal("late") as rows:
        for row in rows:
            row[:] = [entry for entry in row if entry["e"] != "late"]


@plant("a transactional effect happened twice")
def write_twice(place: Place) -> None:
    place.execute("INSERT INTO transactional_effects SELECT * FROM transactional_effects WHERE run_id = 'kept'")


@plant("a transactional effect and its record disagree")
def write_what_was_rejected(place: Place) -> None:
    place.execute("INSERT INTO transactional_effects VALUES ('rejected', %s, 1, 'do', 1)", [WRITE])


@plant("a transactional effect and its record disagree")
def record_what_was_rolled_back(place: Place) -> None:
    place.execute("DELETE FROM transactional_effects WHERE run_id = 'kept'")
    with place.effects() as lines:
        lines.append(Effect("kept", WRITE, 1, "do"))


# -- going back: the run `undone` asked for take 0, write 0, take 1, take 2, and the last was rejected -----------------
@plant("an effect was neither kept nor undone")
def skip_an_undo(place: Place) -> None:
    with place.journal("undone") as rows:
        for row in rows:
            row[:] = [e for e in row if not (e["e"] in ("undoing", "undone") and e["key"] == TAKE.format(0))]
    _without(place, "undone", TAKE.format(0), "undo")


@plant("a late effect was not undone")
def correct_nothing(place: Place) -> None:
    for table, column in (("journal", "run_id"), ("runs", "id")):
        place.execute(f"DELETE FROM orchestrator.{table} WHERE {column} LIKE 'corrected/late/%'")
    with place.effects() as lines:
        lines[:] = [effect for effect in lines if not effect.run.startswith("corrected/late/")]


@plant("a late effect was not undone")
def undo_only_once(place: Place) -> None:
    with place.journal("again") as rows:
        for row in rows:
            row[:] = [entry for entry in row if not (entry["e"] == "undoing" and entry.get("late"))]
        at = [entry["e"] for entry in rows[-1]].index("undone")
        del rows[-1][at]
    with place.effects() as lines:
        lines[:] = [e for e in lines if (e.run, e.direction, e.attempt) != ("again", "undo", 2)]


@plant("an undo was asked for and has no end")
def end_before_the_undo_has(place: Place) -> None:
    with place.journal("undone") as rows:
        for row in rows:
            row[:] = [e for e in row if not (e["e"] == "undone" and e["key"] == TAKE.format(0))]
    _without(place, "undone", TAKE.format(0), "undo")


@plant("something was undone that had no effect")
def undo_what_was_rejected(place: Place) -> None:
    key = TAKE.format(2)
    with place.journal("undone") as rows:
        row = next(row for row in rows if any(entry["e"] == "rollback" for entry in row))
        at = [entry["e"] for entry in row].index("rollback") + 1
        row[at:at] = [{"e": "undoing", "key": key}, {"e": "undone", "key": key, "attempt": 1}]
    with place.effects() as lines:
        lines.insert(0, Effect("undone", key, 1, "undo"))


@plant("undos were not begun in reverse order")
def undo_in_the_order_of_the_requests(place: Place) -> None:
    swapped = {TAKE.format(0): TAKE.format(1), TAKE.format(1): TAKE.format(0)}
    with place.journal("undone") as rows:
        for entry in (entry for row in rows for entry in row if entry["e"] in ("undoing", "undone")):
            entry["key"] = swapped.get(entry["key"], entry["key"])


@plant("two undos of a rollback ran at once")
def begin_an_undo_too_early(place: Place) -> None:
    with place.journal("undone") as rows:
        row = next(row for row in rows if [entry["e"] for entry in row] == ["undone", "undoing"])
        row.reverse()


@plant("undos did not take effect in reverse order")
def undo_out_of_order(place: Place) -> None:
    with place.effects() as lines:
        undos = [n for n, e in enumerate(lines) if (e.run, e.direction, e.event) == ("undone", "undo", "effect")]
        first, last = undos[0], undos[-1]
        lines[first], lines[last] = lines[last], lines[first]


# -- secrets -----------------------------------------------------------------------------------------------------------
_MESSAGE = json.dumps([[{"name": town.CANARY}], {}, {}]).encode()


def _hidden(name: str, data: bytes) -> None:
    def hide(place: Place) -> dict[str, Any]:
        return {"canaries": [town.CANARY], "places": {"a message": data}}

    hide.__name__ = f"show_a_secret_{name}"
    plant("a secret is in the open")(hide)


_hidden("as_it_is", f"ERROR could not take {town.CANARY}".encode())
_hidden("as_json", _MESSAGE)
_hidden("in_hex", town.CANARY.encode().hex().encode())
for _n in range(3):
    _hidden(f"in_base64_{_n}", base64.b64encode(b"x" * _n + town.CANARY.encode() + b" and more"))
    _hidden(f"at_the_end_of_base64_{_n}", base64.b64encode(b"x" * _n + town.CANARY.encode()))


@plant("a secret is in the open")
def write_a_secret_to_a_file(place: Place) -> dict[str, Any]:
    folder = place.effect_log.parent / "logs"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "worker.log").write_text(f"took {town.CANARY}")
    return {"canaries": [town.CANARY], "places": {"logs": folder}}


@plant("a secret was never used")
def look_for_what_was_never_there(place: Place) -> dict[str, Any]:
    return {"canaries": ["nobody ever said this"], "places": {"log": b"nothing"}}


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
    _without(place, "terminated", TAKE.format(0), "do")
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
    baseline = Baseline.take(place.database_url)
    assert checked(place, baseline=baseline, allowance=NO_ALLOWANCE).ok
    with psycopg.connect(place.database_url):
        report = checked(place, baseline=baseline, allowance=NO_ALLOWANCE)
    assert report.names == {"connections did not come back"}


def test_messages_and_memory_that_grow_are_found(place: Place) -> None:
    waiting = [0]
    baseline = Baseline.take(place.database_url, messages=lambda: waiting[0], pids=[])
    waiting[0] = 9
    found = {v.name for v in baseline.compare(pids=[os.getpid()], allowance=NO_ALLOWANCE)}
    assert found == {"messages did not come back", "memory bytes did not come back"}
    assert not list(baseline.compare(allowance=Levels(messages=9)))


def test_rows_that_pile_up_are_found(place: Place) -> None:
    baseline = Baseline.take(place.database_url)
    start_one_that_nobody_takes(place)
    leave_an_arrival(place)
    place.execute("INSERT INTO orchestrator.drainers VALUES (1, 1, '{}')")
    found = {v.name for v in baseline.compare(allowance=NO_ALLOWANCE)}
    assert found == {"work did not come back", "arrivals did not come back", "marks did not come back"}


def test_dead_tuples_that_stay_are_found(place: Place) -> None:
    baseline = Baseline.take(place.database_url)
    with psycopg.connect(place.database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE orchestrator.runs SET (autovacuum_enabled = off)")
        for _ in range(3):
            connection.execute("UPDATE orchestrator.runs SET priority = 0")
        connection.execute("SELECT pg_stat_force_next_flush()")
    found = {v.name for v in baseline.compare(allowance=replace(NO_ALLOWANCE, connections=1))}
    assert found == {"dead tuples did not come back"}


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
    log = "[WARNING] run r-1 step 0/a.b#0: attempt 3 has lost its fence, its outcome is refused\n"
    assert list(refused_in(log, "else")) == [("r-1", "0/a.b#0", 3)]


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
