"""The audits of the engine: none in a clean database, and each planted error is found once."""

from __future__ import annotations

from datetime import timedelta

import pytest

from orchestrator import Effect, saga, step
from orchestrator.engine.reconcile import reconcile
from orchestrator.machine.journal import LateSuccess, Signal, encode
from orchestrator.store import arrivals
from orchestrator.store.connection import Connection
from tests.engine.stage import Child, start


@step
def undo(text: str) -> None: ...


@step(compensate=undo)
def do(text: str) -> str:
    return text


@saga.define(name="audits.plain")
async def plain(fail: bool) -> str:
    said: str = await saga.step(do, "x")
    if fail:
        raise RuntimeError("on purpose")
    return said


@saga.define(name="audits.asleep")
async def asleep() -> None:
    await saga.sleep(timedelta(days=1))


@saga.define(name="audits.told")
async def told() -> None:
    await saga.wait_signal("go")


@saga.define(name="audits.locked")
async def locked() -> None:
    async with saga.lock("one"):
        await saga.wait_signal("go")


@saga.define(name="audits.parent")
async def parent() -> None:
    await saga.child(told)


@saga.define(name="audits.elder")
async def elder() -> None:
    await saga.child(plain, False)
    await saga.wait_signal("go")


@saga.define(name="audits.linked")
async def linked(left: int) -> None:
    await saga.step(do, "x")
    if left:
        saga.continue_as_new(left - 1)


@step(effect=Effect.PIVOT)
def pay() -> None: ...


@saga.define(name="audits.paying")
async def paying() -> None:
    await saga.wait_signal("go")
    await saga.step(pay)


@saga.define(name="audits.asking")
async def asking() -> None:
    await saga.child(paying)


@pytest.fixture(autouse=True)
def world(connection: Connection, child: Child) -> None:
    """Runs in every situation in which a run may rightly be."""
    start(connection, plain, False, run_id="good")
    start(connection, plain, True, run_id="undone")
    start(connection, plain, True, run_id="late")
    start(connection, asleep, run_id="asleep")
    start(connection, told, run_id="told")
    start(connection, locked, run_id="locked")
    start(connection, parent, run_id="parent")
    start(connection, elder, run_id="elder")
    start(connection, linked, 2, run_id="linked")
    child.drain()
    start(connection, locked, run_id="locked-2")
    with connection.transaction():
        effect = LateSuccess(f"{do.name}#0", "do", 1, "x")  # of an attempt that was overtaken, after the end
        arrivals.leave(connection, "late", encode(effect))
    child.drain()
    start(connection, plain, False, run_id="new")


def breaks(connection: Connection) -> list[tuple[str, str, str]]:
    report = reconcile(connection)
    assert [each.error for each in report.checks] == [None] * 5
    return [(each.name.partition(": ")[2], e["key"], e["problem"]) for each in report.checks for e in each.examples]


def test_a_clean_database_has_none(connection: Connection) -> None:
    states = dict(connection.execute("SELECT id, state FROM orchestrator.runs").fetchall())
    assert {states[name] for name in ("elder", "elder/audits.plain#0", "parent", "parent/audits.told#0")} == {"running"}
    assert {states[name] for name in ("good", "undone", "asleep", "new")} == {
        "completed", "compensated", "running", "pending",
    }  # fmt: skip
    assert breaks(connection) == []
    assert states[CORRECTION] == "compensated"
    report = reconcile(connection)
    assert report.checks[2].name == "engine: locks" and report.checks[2].looked_at == 2
    assert report.exit_code == 0 and report.earlier[0].breaks == 0


def test_a_pivot_that_waits_for_the_root_to_grant_it_is_no_break(connection: Connection, child: Child) -> None:
    start(connection, asking, run_id="root")
    child.drain()
    connection.execute("UPDATE orchestrator.runs SET queue = 'elsewhere' WHERE id = 'root'")  # its turn is to come
    with connection.transaction():
        arrivals.leave(connection, f"root/{paying.name}#0", encode(Signal("go", "1")))
    child.drain()
    asked = connection.execute("SELECT arrival FROM orchestrator.arrivals WHERE run_id = 'root'").fetchall()
    assert [arrival["phase"] for (arrival,) in asked] == ["asked"]
    assert breaks(connection) == []


CORRECTION = f"late/late/{do.name}#0/1"
_ENDED = "finished_at = now() - interval '2 hours'"
PLANTED = {
    "a row is missing": (
        "DELETE FROM orchestrator.journal WHERE run_id = 'good' AND seq = 0",
        "runs", "good", "has no row 0",
    ),
    "the last row is missing": (
        "DELETE FROM orchestrator.journal WHERE run_id = 'told' AND seq = 0",
        "runs", "told", "and it stands at 1",
    ),
    "there is a row too much": (
        "INSERT INTO orchestrator.journal VALUES ('told', 1, now(), '[]')", "runs", "told", "stands at 1",
    ),
    "a row contradicts": (
        "UPDATE orchestrator.journal SET entries = '[{\"e\": \"settled\", \"key\": \"no\", \"outcome\": \"failed\", "
        "\"attempt\": 1}]' WHERE run_id = 'told'",
        "runs", "told", "contradicts",
    ),
    "a state is another": (
        f"UPDATE orchestrator.runs SET state = 'failed', {_ENDED} WHERE id = 'good'",
        "runs", "good", "failed, and completed by its journal",
    ),
    "an end has no instant": (
        "UPDATE orchestrator.runs SET finished_at = NULL WHERE id = 'good'", "runs", "good", "finished_at",
    ),
    "what goes on has ended": (
        f"UPDATE orchestrator.runs SET {_ENDED} WHERE id = 'locked'", "runs", "locked", "finished_at",
    ),
    "an output is another": ("UPDATE orchestrator.runs SET output = '7' WHERE id = 'good'", "runs", "good", "output"),
    "an effect was not undone": (
        "UPDATE orchestrator.journal SET entries = (SELECT json_agg(e) FROM json_array_elements(entries) e "
        "WHERE e ->> 'e' NOT IN ('undoing', 'undone')) WHERE run_id = 'undone'",
        "runs", "undone", "was not undone",
    ),
    "a late effect is undone by nobody": (
        f"DELETE FROM orchestrator.journal WHERE run_id = '{CORRECTION}'; "
        f"DELETE FROM orchestrator.runs WHERE id = '{CORRECTION}'",
        "runs", "late", f"there is no run {CORRECTION} to undo it",
    ),
    "its timer is gone": ("DELETE FROM orchestrator.work WHERE run_id = 'asleep'", "runs", "asleep", "no rule"),
    "its first turn is gone": ("DELETE FROM orchestrator.work WHERE run_id = 'new'", "runs", "new", "no rule"),
    "its place in line is gone": (
        "DELETE FROM orchestrator.locks WHERE run_id = 'locked-2'", "runs", "locked-2", "no rule",
    ),
    "its parent is gone": (
        "UPDATE orchestrator.runs SET parent_id = 'gone' WHERE id = 'linked~1'", "runs", "linked~1", "gone",
    ),
    "its root has ended without it": (
        f"UPDATE orchestrator.runs SET state = 'continued', {_ENDED} WHERE id = 'elder'; "
        "DELETE FROM orchestrator.journal WHERE run_id = 'elder'; DELETE FROM orchestrator.runs WHERE id = 'elder'; "
        "UPDATE orchestrator.runs SET parent_id = NULL WHERE root_id = 'elder'",
        "runs", "elder/audits.plain#0", "no rule",
    ),
    "work without a run": (
        "INSERT INTO orchestrator.work (run_id, key, role, target, queue, due_at) "
        "VALUES ('no', '', 'turn', 't', 'q', now())",
        "work", "no", "no such run",
    ),
    "journal without a run": (
        "INSERT INTO orchestrator.journal VALUES ('no', 0, now(), '[]')", "journal", "no", "no such run",
    ),
    "an arrival without a run": (
        "INSERT INTO orchestrator.arrivals (run_id, arrival) VALUES ('no', '{}')", "arrivals", "no", "no such run",
    ),
    "a lock of an ended run": (
        f"UPDATE orchestrator.runs SET {_ENDED} WHERE id = 'good'; INSERT INTO orchestrator.locks "
        "(name, run_id, handle, key, asked_at) VALUES ('n', 'good', 'h', 'k', now())",
        "locks", "good", "completed, and has rows in locks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_error_is_found_once(connection: Connection, name: str) -> None:
    sql, place, key, words = PLANTED[name]
    for statement in sql.split("; "):
        connection.execute(statement)  # type: ignore[call-overload]
    found = breaks(connection)
    assert [(where, which) for where, which, _ in found] == [(place, key)], found
    assert words in found[0][2]


def test_all_of_them_at_once_are_found_once_each(connection: Connection) -> None:
    """Those that do not touch the same run."""
    chosen = [name for name in PLANTED if PLANTED[name][2] not in ("good", "told", "no")] + [
        "a row is missing", "there is a row too much", "work without a run",
    ]  # fmt: skip
    for name in chosen:
        connection.execute(PLANTED[name][0])  # type: ignore[call-overload]
    assert sorted((where, key) for where, key, _ in breaks(connection)) == sorted(PLANTED[name][1:3] for name in chosen)
