"""Drainers on a real database, their steps plain functions: outcomes that race, fail to commit, or come late."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Callable
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection as SqlConnection
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from orchestrator import Effect, PayloadError, Rejected, RetryPolicy, StepFailed, StoreUnavailableError, saga, step
from orchestrator.client import Client
from orchestrator.engine import advance, session
from orchestrator.engine.attempts import Attempts
from orchestrator.machine.journal import Cancel, Operate, Parked, decode_entry, encode
from orchestrator.machine.turn import Script
from orchestrator.retention import Chosen, prune
from orchestrator.settings import Settings
from orchestrator.store import arrivals, liveness, runs, turns
from orchestrator.store.connection import Connection
from orchestrator.store.permits import Permits
from orchestrator.store.turns import Taken
from tests.engine.proxy import Proxy
from tests.engine.stage import Child, entries, kinds, script_of, start, state, work

AT_ONCE = RetryPolicy(initial_interval=timedelta(0), maximum_interval=timedelta(0), maximum_attempts=3)
DONE: list[str] = []


@pytest.fixture(autouse=True)
def fresh() -> None:
    DONE.clear()


@step(retry=AT_ONCE)
def take_back(name: str, result: str | None) -> None:
    DONE.append(f"undo {name} {result}")


@step(compensate=take_back, retry=AT_ONCE)
def act(name: str) -> str:
    DONE.append(f"do {name}")
    if name == "bad":
        raise Rejected(name)
    return f"{name}!"


@step(compensate=take_back, retry=RetryPolicy(maximum_attempts=1))
def act_once(name: str) -> str:
    return act(name)


@step(effect=Effect.NONE, retry=AT_ONCE)
def look(n: int) -> int:
    return n


@step(compensate=take_back, retry=RetryPolicy(maximum_attempts=1))
def order(name: str) -> str:
    raise ConnectionError("no answer")


@order.probe
def find_order(name: str) -> str | None:
    return f"{name} found"


UNFIT = {"NUL": "a\0b", "half a pair": "\ud800", "too much": "x" * 300_000}


@step(transactional=True, retry=AT_ONCE)
def write(conn: SqlConnection, name: str) -> str:
    conn.execute(text("INSERT INTO written VALUES (:name)"), {"name": name})
    return UNFIT.get(name, f"{name} written")


class Base(DeclarativeBase): ...


class Written(Base):
    __tablename__ = "written"
    name: Mapped[str] = mapped_column(primary_key=True)


@step(transactional=True, retry=AT_ONCE)
def write_by_session(session: Session, name: str) -> str:
    session.add(Written(name=name))
    session.flush()
    if name == "twice":
        session.expunge_all()
        session.add(Written(name=name))
        with contextlib.suppress(IntegrityError):
            session.flush()
    if name == "late":
        session.add(Written(name="refused as it is written"))
    return f"{name} written"


ENDINGS: dict[str, Callable[[SqlConnection], object]] = {
    "a statement": lambda connection: connection.execute(text("COMMIT")),
    "the driver": lambda connection: connection.connection.commit(),
    "what it began": lambda connection: connection.get_transaction().commit(),  # type: ignore[union-attr]
}


@step(transactional=True, compensate=take_back, retry=RetryPolicy(maximum_attempts=1))
def commit_by_itself(connection: SqlConnection, name: str, then: str) -> str:
    write.function(connection, name)
    ENDINGS[name](connection)
    if then == "writes on":
        write.function(connection, name)
    if then == "is rejected":
        raise Rejected("though it is written")
    return name


@step(transactional=True, compensate=take_back, retry=RetryPolicy(maximum_attempts=1))
def commit_below_session(session: Session, name: str, then: str) -> str:
    session.add(Written(name=name))
    session.flush()
    ENDINGS[name](session.connection())
    if then == "cannot be written":
        session.add(Written(name="refused"))
    return name


@step(transactional=True, retry=AT_ONCE)
def end_session(session: Session, name: str) -> None:
    session.add(Written(name=name))
    session.flush()
    if name == "commit":
        session.connection().commit()
    session.reset()


PARTS_ENDED: dict[str, Callable[[Session], object]] = {
    "rolled back": lambda session: session.get_transaction().rollback(),  # type: ignore[union-attr]
    "closed": lambda session: session.get_transaction().close(),  # type: ignore[union-attr]
    "below it": lambda session: session.connection().get_nested_transaction().rollback(),  # type: ignore[union-attr]
}


@step(transactional=True, retry=AT_ONCE)
def end_what_it_writes_in(session: Session, how: str) -> None:
    with contextlib.suppress(IntegrityError), session.begin():  # of its own: what becomes of that is its affair
        session.execute(text("INSERT INTO written VALUES ('twice'), ('twice')"))
    session.add(Written(name="before"))
    session.flush()
    if how in PARTS_ENDED:
        PARTS_ENDED[how](session)
    session.add(Written(name="after"))


@event.listens_for(Written, "before_insert")
def refuse_writing(mapper: Any, connection: Any, written: Written) -> None:
    if written.name.startswith("refused"):
        raise ValueError(written.name)


@saga.define
async def in_a_row(names: list[str]) -> list[str]:
    return [await saga.step(act, name) for name in names]


@saga.define
async def ordered_and_acted(name: str) -> list[str]:
    return [await saga.step(order, name), await saga.step(act, name)]


@saga.define
async def tried_once(name: str) -> None:
    with contextlib.suppress(StepFailed):
        await saga.step(act_once, name)
    await saga.wait_signal("go on")


@saga.define
async def once_only(n: int) -> int:
    return await saga.once("n", lambda: n)


@saga.define
async def side_by_side(n: int) -> int:
    return sum(await asyncio.gather(*(saga.step(look, i) for i in range(n))))


@saga.define
async def written(names: list[str]) -> list[str]:
    return [await saga.step(write, name) for name in names]


@saga.define
async def written_side_by_side(names: list[str]) -> None:
    await asyncio.gather(*(saga.step(write, name) for name in names))


@saga.define
async def committed_by_itself(name: str, then: str) -> str:
    return await saga.step(commit_by_itself, name, then)


@saga.define
async def committed_below_session(name: str, then: str) -> str:
    return await saga.step(commit_below_session, name, then)


@saga.define
async def session_ended(name: str) -> None:
    await saga.step(end_session, name)


@saga.define
async def part_ended(how: str) -> None:
    await saga.step(end_what_it_writes_in, how)


@saga.define
async def written_by_session(names: list[str]) -> list[str]:
    return [await saga.step(write_by_session, name) for name in names]


@saga.define
async def written_and_looked_at(name: str) -> int:
    await saga.step(write, name)
    return sum(await asyncio.gather(saga.step(look, 1), saga.step(look, 2)))


@saga.define
async def in_links(n: int) -> None:
    await saga.step(act, str(n))
    if n == 0:
        saga.continue_as_new(1)


@saga.define
async def written_with_a_finally(name: str) -> None:
    try:
        await saga.step(write, name)
        await saga.wait_signal("never")
    finally:
        saga.step(look, 99)


@saga.define
async def collecting(n: int) -> int:
    gc.collect()
    return await saga.step(look, n)


@pytest.fixture
def table(connection: Connection) -> None:
    connection.execute("CREATE TABLE written (name text)")


@pytest.fixture
def unique(connection: Connection, table: None) -> None:
    connection.execute("ALTER TABLE written ADD PRIMARY KEY (name)")


def drain_all(connection: Connection, *children: Child) -> None:
    """Drain until nothing is due for any of them."""
    while any(child.drain() for child in children) or connection.execute(
        "SELECT EXISTS (SELECT FROM orchestrator.work WHERE fence IS NULL AND reserved_at IS NULL "
        "AND due_at <= orchestrator.now())"
    ).fetchone() == (True,):
        pass


# -- the ordinary way --------------------------------------------------------------------------------------------------
def test_a_run_from_start_to_end(child: Child, connection: Connection) -> None:
    start(connection, in_a_row, ["a", "b"])
    assert child.drain() == 2
    assert (state(connection), work(connection)) == ("completed", [])
    assert kinds(connection) == ["asked", "settled", "asked", "settled", "returned", "ended"]
    assert liveness.children(connection, child.incarnation) == []


def test_a_run_with_an_undo(child: Child, connection: Connection) -> None:
    start(connection, in_a_row, ["a", "b", "bad"])
    drain_all(connection, child)
    assert state(connection) == "compensated"
    assert DONE == ["do a", "do b", "do bad", "undo b b!", "undo a a!"]


def test_a_sequential_step_costs_one_journal_row(child: Child, connection: Connection) -> None:
    start(connection, in_a_row, [str(n) for n in range(50)])
    assert child.drain() == 50
    (rows,) = connection.execute("SELECT count(*) FROM orchestrator.journal").fetchone()  # type: ignore[misc]
    assert rows == 51, "one turn for the start, one for every outcome"


# -- parallel outcomes -------------------------------------------------------------------------------------------------
def test_two_drainers_that_meet_at_a_run_leave_arrivals_and_lose_none(
    new_child: Callable[..., Child], connection: Connection
) -> None:
    left, right = new_child(), new_child()
    start(connection, side_by_side, 60)
    threads = [left.in_background(), right.in_background()]
    for thread in threads:
        thread.join(20)
    drain_all(connection, left, right)
    assert state(connection) == "completed"
    (output,) = connection.execute("SELECT output FROM orchestrator.runs").fetchone()  # type: ignore[misc]
    assert output == sum(range(60))
    assert len(left.runner.calls) + len(right.runner.calls) == 60
    assert connection.execute("SELECT count(*) FROM orchestrator.arrivals").fetchone() == (0,)
    assert len({key for _, key, _ in left.runner.calls + right.runner.calls}) == 60


def test_an_outcome_that_meets_a_locked_run_is_an_arrival_and_nobody_waits(
    child: Child, connection: Connection, database_url: str
) -> None:
    left: list[Any] = []
    with psycopg.connect(database_url) as locked:

        def lock_for_the_first(taken: Any) -> None:
            if len(child.runner.calls) == 1:
                locked.execute("SELECT FROM orchestrator.runs WHERE id = 'run' FOR UPDATE")
            else:
                left.append(connection.execute("SELECT arrival ->> 'key' FROM orchestrator.arrivals").fetchall())
                locked.rollback()

        child.runner.after = lock_for_the_first
        start(connection, side_by_side, 2)
        drain_all(connection, child)
    assert left == [[(child.runner.calls[0][1],)]]
    assert state(connection) == "completed"
    assert len(child.runner.calls) == 2


def test_parallel_outcomes_cost_a_turn_each_at_most(child: Child, connection: Connection) -> None:
    start(connection, side_by_side, 200)
    drain_all(connection, child)
    (rows,) = connection.execute("SELECT count(*) FROM orchestrator.journal").fetchone()  # type: ignore[misc]
    assert rows <= 202
    (largest,) = connection.execute(
        "SELECT max(length(entries::text)) FROM orchestrator.journal WHERE seq > 0"
    ).fetchone()  # type: ignore[misc]
    assert largest < 300 * 32, "a row holds the outcomes of one wave and does not grow with the run"


def test_the_pump_finds_an_arrival_behind_a_timer(child: Child, connection: Connection) -> None:
    @saga.define(name="sleeps for an hour")
    async def sleeps() -> None:
        await asyncio.sleep(3600)

    child.targets.append(sleeps.target)
    start(connection, sleeps)
    child.drain()
    assert [row[:2] for row in work(connection)] == [("", "turn")]
    connection.execute(
        "INSERT INTO orchestrator.arrivals (run_id, at, arrival) "
        "VALUES ('run', orchestrator.now() - interval '5 s', %s)",
        [psycopg.types.json.Json(encode(Cancel("ann", "it is late")))],
    )
    assert liveness.wake_forgotten(connection) == ["celery"]
    child.drain()
    assert state(connection) == "cancelled"


# -- code that changes -------------------------------------------------------------------------------------------------
def versions_of(child: Child, main: Any) -> None:
    child.scripts = lambda name, version: Script(main) if name == in_a_row.name else script_of(name, version)
    child.drainer.close()


def test_drift_parks_with_a_diff_and_goes_on_once_the_code_is_back(child: Child, connection: Connection) -> None:
    async def other(encoded: Any) -> Any:
        await saga.step(look, 1)
        return await in_a_row.script().main(encoded)

    child.runner.after = lambda taken: versions_of(child, other) if DONE == ["do a"] else None
    start(connection, in_a_row, ["a", "b"])
    child.drain()
    found = runs.outcomes(connection, ["run"])["run"]
    assert found.state == "parked" and DONE == ["do a"]
    (item,) = found.parked
    assert item["role"] == "drift" and "look#0" in item["why"] and "act#0" in item["why"]  # type: ignore[index,call-overload]
    assert kinds(connection)[:2] == ["asked", "settled"], "the outcome is on record"
    child.scripts = script_of
    child.drainer.close()
    with connection.transaction():
        arrivals.leave(connection, "run", encode(Operate("retry", "", "ann", "rolled back")))
    child.drain()
    assert (state(connection), DONE) == ("completed", ["do a", "do b"])


def test_code_that_raises_before_it_comes_to_what_is_recorded_parks_with_its_error(
    child: Child, connection: Connection
) -> None:
    """That it drifted, and "the saga ended", was all that was told, and no traceback."""

    async def broken(encoded: Any) -> Any:
        raise PayloadError("the saga requires currency today, which was not recorded")

    child.runner.after = lambda taken: versions_of(child, broken) if DONE == ["do a"] else None
    start(connection, in_a_row, ["a", "b"])
    child.drain()
    forms: list[Any] = [form for _, _, row in runs.history(connection, "run") for form in row]
    (parked,) = [entry for entry in map(decode_entry, forms) if isinstance(entry, Parked)]
    assert parked.role == "drift" and parked.error is not None
    assert "the saga function raised PayloadError: the saga requires currency" in parked.why
    assert "in broken" in parked.error["traceback"]


def test_a_code_error_parks_and_a_cancel_undoes_without_the_code(child: Child, connection: Connection) -> None:
    async def broken(encoded: Any) -> Any:
        await saga.step(act, "a")
        raise KeyError("oops")

    versions_of(child, broken)
    start(connection, in_a_row, ["a", "b"])
    child.drain()
    assert state(connection) == "parked" and DONE == ["do a"]
    child.scripts = lambda name, version: None  # the code is gone for good
    child.drainer.close()
    with connection.transaction():
        arrivals.leave(connection, "run", encode(Cancel("ann", "")), anyone=True)
    child.drain()
    assert (state(connection), DONE) == ("cancelled", ["do a", "undo a a!"])


def test_a_cancel_before_the_first_turn_needs_no_code(child: Child, connection: Connection) -> None:
    child.scripts = lambda name, version: None
    start(connection, in_a_row, ["a"])
    with connection.transaction():
        arrivals.leave(connection, "run", encode(Cancel("ann", "")), anyone=True)
    child.drain()
    assert (state(connection), DONE) == ("cancelled", [])


# -- leases that are lost ----------------------------------------------------------------------------------------------
def lose_the_lease(connection: Connection, child: Child) -> None:
    assert liveness.declare_dead(connection, child.incarnation)
    connection.execute("UPDATE orchestrator.work SET deadline_at = orchestrator.now() WHERE fence IS NOT NULL")
    liveness.give_back_dead(connection)
    child.reborn()


def test_a_child_that_stops_and_was_declared_dead_waits_for_no_other_life(child: Child, connection: Connection) -> None:
    """Its companion is not started again: for ten minutes it tried to record what had come of its step."""

    def orphan(taken: Any) -> None:
        assert liveness.declare_dead(connection, child.incarnation)
        child.stopping = True
        held = child.drainer._session.connection
        assert held is not None
        held.close()

    child.runner.after = orphan
    start(connection, in_a_row, ["a"])
    with pytest.raises(StoreUnavailableError, match="while it was stopping"):
        child.drain()


def test_a_late_success_is_an_entry_and_changes_nothing_if_another_attempt_succeeded(
    new_child: Callable[..., Child], connection: Connection
) -> None:
    slow, quick = new_child(), new_child()

    def overtake(taken: Any) -> None:
        slow.runner.before = lambda taken: None
        lose_the_lease(connection, slow)
        quick.drain()

    slow.runner.before = overtake
    start(connection, in_a_row, ["a"])
    slow.drain()
    drain_all(connection, quick)
    assert state(connection) == "completed"
    assert [entry["attempt"] for entry in entries(connection) if entry["e"] == "settled"] == [2]
    assert len({context.idempotency_key for child in (slow, quick) for context in child.runner.contexts}) == 1
    assert DONE == ["do a", "do a"]


def test_a_late_success_after_the_undo_has_begun_orders_the_undo_again_with_its_result(
    new_child: Callable[..., Child], connection: Connection
) -> None:
    slow, quick = new_child(), new_child()

    def overtake(taken: Any) -> None:
        slow.runner.before = lambda taken: None
        lose_the_lease(connection, slow)
        with connection.transaction():
            arrivals.leave(connection, "run", encode(Cancel("ann", "")))

        def late(undoing: Any) -> None:
            quick.runner.before = lambda taken: None
            release.set()
            background.join(10)

        quick.runner.before = late
        undoers.append(quick.in_background())
        assert release.wait(10)

    release, undoers = threading.Event(), list[threading.Thread]()
    slow.runner.before = overtake
    start(connection, in_a_row, ["a"])
    background = slow.in_background()
    background.join(20)
    undoers[0].join(20)
    drain_all(connection, quick)
    assert "late" in kinds(connection)
    assert state(connection) == "cancelled"
    assert DONE[0] == "do a" and DONE[-1] == "undo a a!"
    keys = [c.idempotency_key for c in quick.runner.contexts if c.idempotency_key.split(":")[-1] != "undo"]
    assert keys and all(":undo" in key for key in keys), "the second undo has a key of its own"


def test_a_late_success_whose_commit_was_not_answered_is_undone_once(
    new_child: Callable[..., Child], connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where somebody took it in before the connection was back, it was told, and undone, a second time."""
    slow, quick = new_child(), new_child()

    def overtake(taken: Any) -> None:
        slow.runner.before = lambda taken: None
        lose_the_lease(connection, slow)
        quick.drain()

    def break_connection(name: str, own: Any = None) -> None:
        if name == "late.after":
            monkeypatch.undo()
            quick.drain()
            own.close()
            raise psycopg.OperationalError("the connection was lost")

    slow.runner.before = overtake
    monkeypatch.setattr(advance, "failpoint", break_connection)
    start(connection, tried_once, "a")
    slow.drain()
    drain_all(connection, quick)
    assert kinds(connection).count("late") == 1
    assert DONE == ["undo a None", "do a", "undo a a!"]


def test_a_late_success_after_the_end_is_undone_by_a_run_of_its_own(
    new_child: Callable[..., Child], connection: Connection
) -> None:
    slow, quick = new_child(), new_child()

    def overtake(taken: Any) -> None:
        slow.runner.before = lambda taken: None
        lose_the_lease(connection, slow)
        with connection.transaction():
            arrivals.leave(connection, "run", encode(Cancel("ann", "")))
        quick.drain()
        assert state(connection) == "cancelled"

    slow.runner.before = overtake
    start(connection, in_a_row, ["a"])
    slow.drain()
    drain_all(connection, quick)
    (correcting,) = connection.execute("SELECT id, state FROM orchestrator.runs WHERE parent_id = 'run'").fetchall()
    assert correcting[1] == "compensated"
    assert DONE == ["undo a None", "do a", "undo a a!"]
    contexts = [*slow.runner.contexts, *quick.runner.contexts]
    (did,) = [context.idempotency_key for context in contexts if not context.undoes]
    undid = {context.idempotency_key: context.undoes for context in contexts if context.undoes}
    assert list(undid.values()) == [did, did], "each undo has a key of its own, and can find what was done"


def test_a_late_success_of_a_run_that_was_pruned_is_told_in_the_log(
    new_child: Callable[..., Child], connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    slow, quick = new_child(), new_child()

    def overtake(taken: Any) -> None:
        slow.runner.before = lambda taken: None
        lose_the_lease(connection, slow)
        with connection.transaction():
            arrivals.leave(connection, "run", encode(Cancel("ann", "")))
        quick.drain()
        assert prune(connection, Chosen(timedelta(0))).total == 1

    slow.runner.before = overtake
    start(connection, in_a_row, ["a"])
    slow.drain()
    assert DONE == ["undo a None", "do a"]
    assert connection.execute("SELECT count(*) FROM orchestrator.arrivals").fetchone() == (0,)
    (told,) = [line.getMessage() for line in caplog.records if line.levelname == "ERROR"]
    assert "has succeeded, and its run is not there any more" in told and "Nothing undoes what it did" in told


def test_a_correcting_run_needs_no_saga_code(new_child: Callable[..., Child], connection: Connection) -> None:
    """Its run has ended, and so the version of its saga may not be deployed any more."""
    slow, quick, newer = new_child(), new_child(), new_child()
    newer.targets.remove(in_a_row.target)

    def overtake(taken: Any) -> None:
        slow.runner.before = lambda taken: None
        lose_the_lease(connection, slow)
        with connection.transaction():
            arrivals.leave(connection, "run", encode(Cancel("ann", "")))
        quick.drain()
        slow.stopping = True

    slow.runner.before = overtake
    start(connection, in_a_row, ["a"])
    slow.drain()
    newer.drain()
    assert DONE == ["undo a None", "do a", "undo a a!"]


def test_a_stale_transactional_step_is_rolled_back(
    new_child: Callable[..., Child], connection: Connection, table: None
) -> None:
    slow, quick = new_child(), new_child()

    def overtake(taken: Any) -> None:
        slow.runner.before = lambda taken: None
        lose_the_lease(connection, slow)
        quick.drain()

    slow.runner.before = overtake
    start(connection, written, ["a"])
    slow.drain()
    drain_all(connection, quick)
    assert state(connection) == "completed"
    assert connection.execute("SELECT name FROM written").fetchall() == [("a",)]
    assert "late" not in kinds(connection)


@pytest.mark.parametrize("name", UNFIT)
def test_a_transactional_step_whose_result_cannot_be_stored_leaves_no_row(
    child: Child, connection: Connection, table: None, name: str
) -> None:
    start(connection, written, ["a", name])
    drain_all(connection, child)
    assert state(connection) == "failed"
    query = "SELECT error ->> 'message' FROM orchestrator.runs"
    (message,) = connection.execute(query).fetchone()  # type: ignore[misc]
    assert "ended rejected after 3 attempt(s): PayloadError" in message
    assert connection.execute("SELECT name FROM written").fetchall() == [("a",)]


@pytest.mark.parametrize(
    ("name", "why"),
    [("twice", "UsageError: what its Session had written was rolled back"), ("late", "ValueError: refused")],
)
def test_a_session_whose_rows_are_not_all_written_fails_its_step(
    child: Child, connection: Connection, unique: None, name: str, why: str
) -> None:
    start(connection, written_by_session, ["a", name])
    drain_all(connection, child)
    (message,) = connection.execute("SELECT error ->> 'message' FROM orchestrator.runs").fetchone()  # type: ignore[misc]
    assert (state(connection), f"ended rejected after 3 attempt(s): {why}" in message) == ("failed", True)
    assert connection.execute("SELECT name FROM written").fetchall() == [("a",)]


@pytest.mark.parametrize("then", ["returns", "writes on", "is rejected"])
@pytest.mark.parametrize("name", ENDINGS)
def test_a_step_that_commits_its_transaction_by_itself_is_in_doubt_and_undone(
    child: Child, connection: Connection, table: None, name: str, then: str
) -> None:
    start(connection, committed_by_itself, name, then)
    drain_all(connection, child)
    assert connection.execute("SELECT name FROM written").fetchall() == [(name,)]
    (attempted,) = [entry for entry in entries(connection) if entry["e"] == "attempted"]
    assert "TransactionEnded" in str(attempted["error"])
    assert (state(connection), DONE) == ("compensated", [f"undo {name} None"])


@pytest.mark.parametrize("then", ["returns", "cannot be written"])
@pytest.mark.parametrize("name", ENDINGS)
def test_a_step_that_commits_below_its_session_is_in_doubt_and_undone(
    child: Child, connection: Connection, table: None, name: str, then: str
) -> None:
    start(connection, committed_below_session, name, then)
    drain_all(connection, child)
    assert connection.execute("SELECT name FROM written").fetchall() == [(name,)]
    (attempted,) = [entry for entry in entries(connection) if entry["e"] == "attempted"]
    assert "TransactionEnded" in str(attempted["error"])
    assert (state(connection), DONE) == ("compensated", [f"undo {name} None"])


@pytest.mark.parametrize("name", ["commit", "reset"])
def test_neither_a_session_is_reset_nor_its_connection_committed(
    child: Child, connection: Connection, table: None, name: str
) -> None:
    start(connection, session_ended, name)
    drain_all(connection, child)
    (message,) = connection.execute("SELECT error ->> 'message' FROM orchestrator.runs").fetchone()  # type: ignore[misc]
    assert f"UsageError: {name}() on the connection of a transactional step" in message
    assert connection.execute("SELECT name FROM written").fetchall() == []


def test_instants_are_in_utc_after_a_transactional_step_whatever_the_zone_of_the_database_is(
    child: Child, connection: Connection, table: None
) -> None:
    """A deadline, or the pause before the next attempt, was an hour off in the night in which a clock is set back."""
    connection.execute(f"ALTER DATABASE {connection.info.dbname} SET timezone TO 'Europe/Berlin'".encode())
    start(connection, written, ["a", "b", "c"])
    drain_all(connection, child)
    assert state(connection) == "completed"
    assert [context.deadline.tzinfo for context in child.runner.contexts] == [UTC] * 3


@pytest.fixture(params=["repeatable read", "serializable"])
def strict(connection: Connection, request: pytest.FixtureRequest) -> None:
    """A database whose transactions see it as it was when they began, unless they say otherwise."""
    name = connection.info.dbname
    connection.execute(f"ALTER DATABASE {name} SET default_transaction_isolation TO '{request.param}'".encode())


def test_a_cancel_that_comes_within_a_transactional_step_is_heard_whatever_its_transaction_sees(
    strict: None, child: Child, connection: Connection, table: None
) -> None:
    """It was left before the run ended, which went to its end as if nothing had come."""

    def cancel(taken: Taken) -> None:
        with connection.transaction():
            arrivals.leave(connection, "run", encode(Cancel("ann", "")))

    child.runner.after = cancel
    start(connection, written, ["a"])
    drain_all(connection, child)
    assert state(connection) == "cancelled"
    assert connection.execute("SELECT name FROM written").fetchall() == [("a",)]


def test_transactional_steps_side_by_side_do_not_fail_each_other_whatever_their_transactions_see(
    strict: None, new_child: Callable[..., Child], connection: Connection, table: None
) -> None:
    """Each of them moves the run, which the others saw as it was when they began."""
    first, second = new_child(), new_child()

    def overtake(taken: Taken) -> None:
        first.runner.after = lambda taken: None
        second.drain()

    first.runner.after = overtake
    start(connection, written_side_by_side, ["a", "b", "c"])
    drain_all(connection, first, second)
    assert state(connection) == "completed"
    assert kinds(connection).count("attempted") == 0
    assert connection.execute("SELECT name FROM written ORDER BY name").fetchall() == [("a",), ("b",), ("c",)]


@pytest.mark.parametrize("how", ["not at all", *PARTS_ENDED])
def test_a_session_whose_rows_the_step_has_taken_back_fails_its_step(
    child: Child, connection: Connection, unique: None, how: str
) -> None:
    start(connection, part_ended, how)
    drain_all(connection, child)
    rows = connection.execute("SELECT name FROM written ORDER BY name").fetchall()
    if how == "not at all":
        assert (state(connection), rows) == ("completed", [("after",), ("before",)])
        return
    (message,) = connection.execute("SELECT error ->> 'message' FROM orchestrator.runs").fetchone()  # type: ignore[misc]
    assert "ended rejected after 3 attempt(s): UsageError: the step has ended, by get_transaction()" in message
    assert (state(connection), rows) == ("failed", [])


# -- commits whose answer is lost --------------------------------------------------------------------------------------
def swallow_at(proxy: Proxy, child: Child, key: str, asked: Callable[[bytes], bool]) -> None:
    def arm(taken: Any) -> None:
        if key in taken.key and taken.attempt == 1 and not proxy.swallowed:
            proxy.swallow(asked)

    child.runner.after = arm


def test_an_outcome_whose_commit_was_not_answered_is_not_recorded_twice(
    new_child: Callable[..., Child], connection: Connection, proxy: Proxy
) -> None:
    child = new_child(dsn=proxy.url)
    start(connection, in_a_row, ["warm", "up"], run_id="warm")
    child.drain()
    DONE.clear()
    swallow_at(proxy, child, "act#1", lambda data: True)
    start(connection, in_a_row, ["a", "b", "c"])
    drain_all(connection, child)
    assert proxy.swallowed == 1
    assert (state(connection), DONE) == ("completed", ["do a", "do b", "do c"])
    assert kinds(connection).count("settled") == 3


def test_what_was_begun_with_the_answer_of_a_probe_is_run_though_the_commit_was_not_answered(
    new_child: Callable[..., Child], connection: Connection, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    child = new_child(dsn=proxy.url)
    start(connection, ordered_and_acted, "warm", run_id="warm")
    drain_all(connection, child)
    DONE.clear()
    child.runner.after = lambda taken: (
        proxy.swallow(lambda data: True) if taken.role == "probe" and not proxy.swallowed else None
    )
    start(connection, ordered_and_acted, "a")
    drain_all(connection, child)
    assert proxy.swallowed == 1
    assert (state(connection), DONE) == ("completed", ["do a"])
    assert [entry["key"] for entry in entries(connection) if entry["e"] == "attempted"] == [f"{order.name}#0"]
    assert "is refused" not in caplog.text


def test_a_connection_that_breaks_before_the_commit_is_recorded_on_the_next(
    new_child: Callable[..., Child], connection: Connection, proxy: Proxy
) -> None:
    child = new_child(dsn=proxy.url)

    def cut(taken: Any) -> None:
        if taken.attempt == 1 and "#1" in taken.key:
            proxy.cut()
            proxy.restore()

    child.runner.after = cut
    start(connection, in_a_row, ["a", "b", "c"])
    drain_all(connection, child)
    assert (state(connection), DONE) == ("completed", ["do a", "do b", "do c"])


@pytest.mark.parametrize("role", ["do", "undo"])
def test_a_connection_that_breaks_again_while_it_is_found_out_what_became_of_a_commit_costs_no_attempt(
    new_child: Callable[..., Child], connection: Connection, proxy: Proxy, role: str
) -> None:
    """The new fence is set, and nobody says so: it is known for its own all the same."""
    child = new_child(dsn=proxy.url)

    def cut(taken: Any) -> None:
        if taken.role == role:
            child.runner.after = lambda taken: None
            proxy.cut()
            proxy.restore()
            proxy.swallow(lambda data: b"SET fence" in data)

    child.runner.after = cut
    start(connection, in_a_row, ["a", "bad"])
    drain_all(connection, child)
    assert proxy.swallowed == 1
    assert (state(connection), DONE) == ("compensated", ["do a", "do bad", "undo a a!"])
    assert {"attempted", "late"} & set(kinds(connection)) == set()


def end_backends_of_children(connection: Connection) -> None:
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name LIKE 'orchestrator child%'"
    )


def test_who_stands_still_within_a_transaction_keeps_its_rows_for_no_longer_than_half_a_minute(
    child: Child, connection: Connection
) -> None:
    """Where a machine is paused, or gone without a word, Postgres hears of it after two hours by its defaults."""
    start(connection, tried_once, "a")
    child.drain()
    own = child.drainer._session.connection
    assert own is not None
    assert own.execute("SHOW idle_in_transaction_session_timeout").fetchone() == ("30s",)


def test_an_outcome_is_recorded_although_its_child_stood_still_within_the_transaction(
    child: Child, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Postgres has ended its session: the drain ended, and what it had begun was in doubt."""

    def stand_still(name: str, own: Any = None) -> None:
        if name == "arrive.left":
            monkeypatch.undo()
            own.execute("SELECT set_config('idle_in_transaction_session_timeout', '100', true)")
            time.sleep(0.3)

    def lock_the_run(taken: Any) -> None:
        child.runner.before = lambda taken: None
        monkeypatch.setattr(advance, "failpoint", stand_still)
        monkeypatch.setattr(turns, "commit_turn", lambda *args: turns.Committed(False, False, None))

    child.runner.before = lock_the_run
    start(connection, in_a_row, ["a"])
    child.drain()
    assert (state(connection), DONE) == ("completed", ["do a"])


def test_a_terminated_backend_costs_no_step(child: Child, connection: Connection) -> None:
    def terminate(taken: Any) -> None:
        if "#1" in taken.key:
            end_backends_of_children(connection)

    child.runner.after = terminate
    start(connection, in_a_row, ["a", "b", "c"])
    drain_all(connection, child)
    assert (state(connection), DONE) == ("completed", ["do a", "do b", "do c"])


def test_a_transactional_step_whose_commit_was_not_answered_took_effect_once(
    new_child: Callable[..., Child], connection: Connection, proxy: Proxy, table: None
) -> None:
    child = new_child(dsn=proxy.url)
    swallow_at(proxy, child, "write#0", lambda data: b"COMMIT" in data)
    start(connection, written, ["a", "b"])
    drain_all(connection, child)
    assert proxy.swallowed == 1
    assert state(connection) == "completed"
    assert connection.execute("SELECT name FROM written").fetchall() == [("a",), ("b",)]


def test_a_transactional_step_whose_connection_breaks_before_the_commit_is_done_again_once(
    new_child: Callable[..., Child], connection: Connection, proxy: Proxy, table: None
) -> None:
    child = new_child(dsn=proxy.url)

    def cut(taken: Any) -> None:
        if taken.attempt == 1 and "#0" in taken.key:
            proxy.cut()
            proxy.restore()

    child.runner.after = cut
    start(connection, written, ["a", "b"])
    drain_all(connection, child)
    assert state(connection) == "completed"
    assert connection.execute("SELECT name FROM written").fetchall() == [("a",), ("b",)]


def test_a_connection_that_breaks_right_after_the_commit_of_a_transactional_step_costs_no_attempt(
    child: Child, connection: Connection, table: None
) -> None:
    """What was begun with the commit is gone on with: it was begun by who is still here."""

    def committed(taken: Any, outcome: Any) -> None:
        if "write" in taken.key:
            end_backends_of_children(connection)

    child.runner.finished = committed  # type: ignore[method-assign]
    start(connection, written_and_looked_at, "a")
    drain_all(connection, child)
    assert (state(connection), "attempted" in kinds(connection)) == ("completed", False)
    assert sorted(child.runner.calls) == [("do", key, 1) for key in sorted({call[1] for call in child.runner.calls})]


def test_code_that_a_refused_commit_has_left_behind_asks_for_nothing_in_another_run(
    child: Child, connection: Connection
) -> None:
    """Its run went on without that commit, and what is left of it is found by the garbage collector at any time."""
    connection.execute("CREATE TABLE written (name text UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    connection.execute("INSERT INTO written VALUES ('a')")
    gc.collect()
    gc.disable()
    try:
        start(connection, written_with_a_finally, "a")
        drain_all(connection, child)
        assert state(connection) == "failed"
        start(connection, collecting, 1, run_id="other")
        drain_all(connection, child)
    finally:
        gc.enable()
    assert [entry["args"] for entry in entries(connection, "other") if entry["e"] == "asked"] == [{"n": 1}]


@pytest.mark.parametrize("statement", [b"set_config", b"SAVEPOINT", b"commit_turn_2"])
def test_a_transaction_that_breaks_at_any_moment_is_a_failed_attempt_and_ends_no_drain(
    new_child: Callable[..., Child], connection: Connection, proxy: Proxy, table: None, statement: bytes
) -> None:
    child = new_child(dsn=proxy.url)
    start(connection, written, ["a"], run_id="warm")
    drain_all(connection, child)
    start(connection, written, ["b"])
    run = child.runner.invoke_in_transaction

    def armed(taken: Any, *others: Any) -> Any:
        if taken.attempt == 1:
            proxy.swallow(lambda data: statement in data)
        return run(taken, *others)

    child.runner.invoke_in_transaction = armed  # type: ignore[method-assign]
    child.drain()
    assert proxy.swallowed == 1
    drain_all(connection, child)
    (failed,) = [entry for entry in entries(connection) if entry["e"] == "attempted"]
    assert failed["error"]["type"] == "OperationalError" and not failed.get("doubt", True)
    assert connection.execute("SELECT name FROM written").fetchall() == [("a",), ("b",)]


@pytest.mark.parametrize("statement", [b"take_3", b"commit_turn_2"])
def test_a_step_whose_begin_was_not_answered_is_run_in_the_attempt_that_was_begun(
    new_child: Callable[..., Child], connection: Connection, proxy: Proxy, statement: bytes
) -> None:
    """The begin is committed, the child never hears of it: it finds out, and no attempt is lost."""
    child = new_child(dsn=proxy.url)
    start(connection, side_by_side, 2, run_id="warm")
    drain_all(connection, child)
    child.drainer.close()
    start(connection, in_a_row, ["a"])
    begun = "SELECT count(*) FROM orchestrator.work WHERE fence IS NOT NULL"
    if statement == b"take_3":  # a retry that is due is begun by taking it
        turn = child.drainer._take()
        connection.execute("UPDATE orchestrator.work SET reserved_at = NULL")
        own, advancer = child.drainer._session.ready()
        first = advancer.start_turn(own, turn[0])[0]
        connection.execute(
            "UPDATE orchestrator.work SET fence = NULL, incarnation = NULL, reserved_at = NULL, attempt = 0"
        )
        assert first.key.endswith("act#0")
        child.drainer.close()
    proxy.swallow(lambda data: statement in data)
    child.drain()
    assert proxy.swallowed == 1
    assert connection.execute(begun).fetchone() == (0,)
    assert (state(connection), DONE) == ("completed", ["do a"])
    assert child.runner.calls[-1] == ("do", child.runner.calls[-1][1], 1) and "attempted" not in kinds(connection)


@pytest.mark.parametrize("how", ["INSERT", "UPDATE"], ids=["with a turn", "taken"])
def test_a_step_whose_begin_is_committed_after_its_answer_was_given_up_is_run(
    child: Child, connection: Connection, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Where a synchronous standby is away a commit takes longer than a child waits; nobody ran what it had begun."""
    monkeypatch.setattr(session, "WORKER_PATIENCE_S", 0.3)
    connection.execute(
        f"""CREATE FUNCTION stall() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF NEW.fence IS NOT NULL THEN
                    PERFORM pg_advisory_xact_lock_shared(42);
                END IF;
                RETURN NULL;
            END $$;
            CREATE CONSTRAINT TRIGGER stall AFTER {how} ON orchestrator.work
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION stall();
            SELECT pg_advisory_lock(42)"""
    )
    start(connection, side_by_side, 2)
    thread = child.in_background()
    thread.join(1.5)
    connection.execute("SELECT pg_advisory_unlock(42)")
    thread.join(20)
    drain_all(connection, child)
    assert state(connection) == "completed"
    assert sorted(attempt for _, _, attempt in child.runner.calls) == [1, 1]


@pytest.mark.parametrize("what", ["function_of", "ready"])
def test_a_connection_that_cannot_be_had_before_the_code_runs_costs_no_attempt(
    child: Child, connection: Connection, table: None, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def begin(self: Attempts, taken: Taken) -> list[Taken]:
        monkeypatch.setattr(owner, what, fail)
        return run(self, taken)

    def fail(*_: Any) -> Any:
        monkeypatch.undo()
        raise StoreUnavailableError("all database connections of this worker were in use")

    run, owner = Attempts.run, advance.Advancer if what == "function_of" else session.Session
    monkeypatch.setattr(Attempts, "run", begin)
    start(connection, *((once_only, 1) if what == "function_of" else (written, ["a"])))
    child.drain()
    assert state(connection) == "completed"
    assert "attempted" not in kinds(connection)


def test_a_step_of_a_later_link_whose_begin_was_not_answered_is_not_taken_for_the_one_that_ran_before_it(
    new_child: Callable[..., Child], connection: Connection, proxy: Proxy
) -> None:
    child = new_child(dsn=proxy.url)
    start(connection, in_links, 0)
    child.runner.after = lambda taken: proxy.swallow(lambda data: b'"k":1' in data.replace(b" ", b""))
    child.runner.before = lambda taken: setattr(child.runner, "after", lambda taken: None) if DONE else None
    child.drain()
    assert proxy.swallowed == 1
    assert (state(connection), DONE) == ("completed", ["do 0", "do 1"])
    assert "attempted" not in kinds(connection)


def test_an_outcome_with_which_its_run_went_on_as_new_is_known_if_the_commit_was_not_answered(
    new_child: Callable[..., Child], connection: Connection, proxy: Proxy
) -> None:
    child = new_child(dsn=proxy.url)
    start(connection, in_links, 0)
    child.runner.after = lambda taken: proxy.swallow(lambda data: b'"continue"' in data) if len(DONE) == 1 else None
    child.drain()
    assert proxy.swallowed == 1
    assert (state(connection), DONE) == ("completed", ["do 0", "do 1"])
    assert kinds(connection, "run~1") == ["asked", "settled", "continue", "ended"]


def test_what_a_child_began_and_could_not_record_is_in_doubt_and_not_run_as_if_it_were_new(
    child: Child, connection: Connection
) -> None:
    """A drain that ended in the middle of a step is followed by another one."""

    def end(taken: Any) -> None:
        child.runner.after = lambda taken: None
        raise SystemExit

    child.runner.after = end
    start(connection, in_a_row, ["a"])
    with pytest.raises(SystemExit):
        child.drain()
    child.drain()
    drain_all(connection, child)
    assert (state(connection), DONE) == ("completed", ["do a", "do a"])
    assert [attempt for _, _, attempt in child.runner.calls] == [1, 2]


# -- stopping, limits --------------------------------------------------------------------------------------------------
def test_a_child_that_stops_finishes_its_step_and_begins_no_other(child: Child, connection: Connection) -> None:
    def stop(taken: Any) -> None:
        child.stopping = True

    child.runner.after = stop
    start(connection, in_a_row, ["a", "b"])
    start(connection, in_a_row, ["c"], run_id="other")
    connection.execute("UPDATE orchestrator.work SET due_at = due_at - interval '1 s' WHERE run_id = 'run'")
    assert child.drain() == 1
    assert DONE == ["do a"]
    (row,) = work(connection)
    assert row[1:] == ("do", 0, False), "the next step waits for another child, no attempt burned"
    assert kinds(connection) == ["asked", "settled", "asked"]
    assert [row[2:] for row in work(connection, "other")] == [(0, False)]


def test_a_drain_ends_after_its_share_and_rings_for_the_rest(
    new_child: Callable[..., Child], connection: Connection
) -> None:
    child = new_child(drain_steps=3)
    start(connection, in_a_row, ["a"], run_id="first")
    for n in range(20):
        start(connection, side_by_side, 1, run_id=f"r{n}")
    child.drain()
    assert 0 < len(child.runner.calls) < 21
    assert "celery" in child.rings
    drain_all(connection, child)
    assert {state(connection, f"r{n}") for n in range(20)} == {"completed"}


def test_a_drain_that_ends_rings_for_others_and_not_for_its_own_child_where_a_doorbell_waits_for_that(
    new_child: Callable[..., Child], connection: Connection
) -> None:
    """Those that came while it was busy with another task would never get fewer, and tasks wait behind each of them."""
    child = new_child(drain_steps=3)
    child.rung = True
    start(connection, in_a_row, [f"{n}" for n in range(9)])
    start(connection, in_a_row, ["other"], run_id="other")
    assert (child.drain(), child.rings) == (3, [])
    new_child()
    assert (child.drain(), child.rings) == (3, ["celery"])


def test_a_drain_goes_on_while_no_other_task_waits_for_its_child(
    new_child: Callable[..., Child], connection: Connection
) -> None:
    child = new_child(drain_steps=3)
    child.waited_for = False
    start(connection, in_a_row, [f"{n}" for n in range(20)])
    assert child.drain() == 20
    assert (state(connection), child.rings) == ("completed", [])


def test_a_child_brings_a_short_run_to_its_end_however_many_steps_it_ran_while_no_other_task_waits(
    new_child: Callable[..., Child], connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who takes the next step of one instead has to read all that it has done."""
    monkeypatch.setattr("orchestrator.engine.drain._TO_ITS_END_S", 60.0)
    child = new_child(drain_steps=3)
    child.waited_for = False
    takes: list[list[Taken] | None] = []
    really = turns.take

    def take(*args: Any, **options: Any) -> list[Taken] | None:
        takes.append(really(*args, **options))
        return takes[-1]

    def let_a_second_pass(taken: Taken) -> None:
        child.drainer._until = min(child.drainer._until, time.monotonic())

    monkeypatch.setattr("orchestrator.store.turns.take", take)
    child.runner.before = let_a_second_pass
    start(connection, in_a_row, [f"{n}" for n in range(20)])
    assert child.drain() == 20
    assert [[item.role for item in taken] for taken in takes if taken] == [["turn"]]


def test_a_drain_comes_to_an_end_although_no_other_task_waits(
    new_child: Callable[..., Child], connection: Connection
) -> None:
    """Celery may want to replace its child."""
    child = new_child(drain_seconds=0.1)
    child.waited_for = False
    child.runner.after = lambda taken: time.sleep(0.03)
    start(connection, in_a_row, [f"{n}" for n in range(100)])
    assert 0 < child.drain() < 100
    assert state(connection) == "running" and child.rings


def test_a_bell_that_cannot_be_rung_keeps_no_start_from_succeeding(database_url: str, connection: Connection) -> None:
    def broken(queue: str, times: int) -> None:
        raise OSError("no broker")

    liveness.register(connection, node="n", host="h", pid=1, queues=["celery"], targets=[], slots=1)
    client = Client(Settings.from_environment({}, database_url=database_url), broken, lambda: "celery")
    result = client.start(in_a_row, (["a"],), {}, {})
    assert result.status == "pending"
    client.pool.close()


def test_a_database_that_takes_no_writes_is_away_for_a_while(child: Child, connection: Connection) -> None:
    """As after a failover, as long as a name still leads to what is a standby now."""
    name = connection.info.dbname
    start(connection, in_a_row, ["a"])
    connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on".encode())
    with pytest.raises(StoreUnavailableError, match="takes no writes"):
        child.drain()
    connection.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only".encode())
    child.drain()
    assert state(connection) == "completed"


def test_a_child_that_was_declared_dead_has_nothing_to_wait_for(
    child: Child, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was begun for it is given back; its companion takes the next incarnation, whoever waits."""
    paused: list[float] = []

    def take(*args: Any, **options: Any) -> Any:
        liveness.declare_dead(connection, child.incarnation)
        raise psycopg.OperationalError("the connection was lost while it took")

    monkeypatch.setattr("orchestrator.store.turns.take", take)
    monkeypatch.setattr("orchestrator.engine.drain.time.sleep", paused.append)
    with pytest.raises(StoreUnavailableError, match="declared dead"):
        child.drain()
    assert paused == [0.05], "one pause to look whether the database is back"


def test_a_drain_that_goes_on_begins_nothing_under_an_incarnation_that_was_declared_dead(
    new_child: Callable[..., Child], connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be given to others at once, by every pump, and be done here all the same."""
    monkeypatch.setattr("orchestrator.engine.session._KNOWN_S", 0.0)
    child = new_child()
    child.waited_for = False
    begun: list[bool] = []

    def look(taken: Any) -> None:
        row = connection.execute("SELECT incarnation FROM orchestrator.work WHERE fence IS NOT NULL").fetchone()
        begun.append(row == (child.incarnation,))

    def die(taken: Any) -> None:
        child.runner.after = lambda taken: None
        liveness.declare_dead(connection, child.incarnation)
        child.reborn()
        child.drainer._until = 0.0  # a second is over

    child.runner.before, child.runner.after = look, die
    start(connection, in_a_row, ["a", "b", "c"])
    child.drain()
    assert (begun, state(connection)) == ([True] * 3, "completed")


def test_who_answers_a_doorbell_does_not_wait_for_a_connection_that_others_need(
    child: Child, connection: Connection, tmp_path: Path
) -> None:
    permits = child.drainer._worker.permits = Permits(tmp_path, "plain", 1)
    taken = permits.take()
    start(connection, in_a_row, ["a"])
    assert child.drain() == 0, "who has it looks for more before he gives it back"
    taken.give_back()
    assert child.drain() == 1 and state(connection) == "completed"
    assert permits.take(0.0), "what the drain had is given back"


def test_a_drain_does_not_keep_a_scarce_connection_for_longer_because_no_other_task_waits(
    new_child: Callable[..., Child], connection: Connection, tmp_path: Path
) -> None:
    """Other children have outcomes to record with it, and heartbeats to send."""
    child = new_child(drain_steps=3)
    child.waited_for = False
    child.drainer._worker.permits = Permits(tmp_path, "plain", 1)
    start(connection, in_a_row, [f"{n}" for n in range(20)])
    assert child.drain() == 3
    assert child.rings
