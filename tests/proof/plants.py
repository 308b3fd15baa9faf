"""One broken promise at a time: the smallest change to what a real engine made that breaks this promise alone.

Owns the plants, at least one for each rule of the checker, and what the checker is told of the town.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psycopg

from tests.engine.stage import start
from tests.proof import town
from tests.proof.checker import Report, Seen, check
from tests.proof.conftest import Place
from tests.proof.effects import Effect

SEEN = Seen(faults=3, redeliveries=1)
TAKE = "tests.proof.town.take#{}"
WRITE = "tests.proof.town.write_down#0"


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


@plant("an ended run holds a lock")
def forget_a_lock(place: Place) -> None:
    place.execute(
        "INSERT INTO orchestrator.locks (name, run_id, handle, key, asked_at) VALUES ('till', 'kept', 'k', 'k', now())"
    )


@plant("a child was kept without its root")
def keep_a_child(place: Place) -> None:
    place.execute("UPDATE orchestrator.runs SET root_id = 'undone', parent_id = 'undone' WHERE id = 'kept'")


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


@plant("journal time is ahead of the database's clock")
def live_in_the_future(place: Place) -> None:
    place.execute("UPDATE orchestrator.journal SET at = at + interval '1 day' WHERE run_id = 'kept' AND seq = "
                  "(SELECT max(seq) FROM orchestrator.journal WHERE run_id = 'kept')")  # fmt: skip


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
        "INSERT INTO orchestrator.work (run_id, lane, key, role, target, queue, due_at, attempt, fence) "
        "VALUES ('parked', 1, %s, 'undo', 't', 'celery', now(), 1, 7)",
        [TAKE.format(0)],
    )


@plant("two rows of work have one key")
def ask_for_an_attempt_twice(place: Place) -> None:
    place.execute(
        "INSERT INTO orchestrator.work (run_id, lane, key, role, target, queue, due_at, attempt) "
        "SELECT 'parked', lane, %s, 'undo', 't', 'celery', now(), 99 FROM generate_series(1, 2) AS lane",
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
        "INSERT INTO orchestrator.work (run_id, lane, key, role, target, queue, due_at, attempt) "
        "VALUES ('parked', 1, %s, 'do', 't', 'celery', now(), 1)",
        [TAKE.format(0)],
    )


def without(place: Place, run: str, key: str, direction: str) -> None:
    with place.effects() as lines:
        lines[:] = [e for e in lines if (e.run, e.key, e.direction) != (run, key, direction)]


@plant("a recorded success has no effect")
def lose_an_effect(place: Place) -> None:
    without(place, "kept", TAKE.format(0), "do")


@plant("a recorded success has no effect")
def lose_the_effect_of_an_undo(place: Place) -> None:
    without(place, "undone", TAKE.format(1), "undo")


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
    without(place, "undone", TAKE.format(0), "undo")


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
    without(place, "undone", TAKE.format(0), "undo")


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
