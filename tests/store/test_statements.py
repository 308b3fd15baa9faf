"""The statements of the hot path: what they write, what they refuse, whom they wait for, by which index."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from threading import Thread
from typing import Any

import psycopg
import pytest

from orchestrator.store import arrivals, attempts, circles, gates, liveness, pauses, runs, turns
from orchestrator.store.connection import Connection, open_connection
from orchestrator.store.turns import Commit, Committed, Taken
from tests.acceptance.running import until
from tests.databases import Databases

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RESERVATION = timedelta(milliseconds=100)
CALL = {"a": {}, "t": 60.0}
Connect = Callable[[], Connection]


def start(connection: Connection, run_id: str = "r", **options: Any) -> None:
    new = runs.Start(id=run_id, saga="s", version=1, input={}, queue="q", **options)
    assert runs.start(connection, new)


def take(connection: Connection, child: int = 1, limit: int = 4, **options: Any) -> list[Taken]:
    given: dict[str, Any] = {"queues": ["q"], "targets": ["s@1", "t"], "incarnation": 1}
    given["fences"] = range(100 + child, 100 + child + limit)
    return turns.take(connection, **{**given, **options}, child=child, reservation=RESERVATION)


def lane(key: str) -> int:
    """Return the lane that tests give to the work of a key."""
    return int.from_bytes(key.encode())


def asked(key: str, fence: int | None = None) -> dict[str, Any]:
    row = {
        "lane": lane(key),
        "key": key,
        "role": "do",
        "target": "t",
        "queue": "q",
        "task": "t",
        "priority": 0,
        "attempt": 0,
    }
    return {**row, "call": CALL, "due": None, "fence": fence}


def turn(position: int = 0, **options: Any) -> Commit:
    given: dict[str, Any] = {"run_id": "r", "at": NOW, "entries": [{"e": "deadline"}], "incarnation": 1, "child": 1}
    given |= {"state": "running", "target": "s@1", "queue": "q", "position": position}
    return Commit(**{**given, **options})


def commit(connection: Connection, position: int = 0, **options: Any) -> Committed:
    return turns.commit_turn(connection, turn(position, **options))


def summary(**changes: Any) -> dict[str, Any]:
    known = {"output": None, "error": None, "left_effects": [], "parked": [], "past_pivot": False}
    return {**known, **changes}


def rows(connection: Connection, table: str) -> list[tuple[Any, ...]]:
    order = {"work": "run_id, key", "runs": "id", "journal": "run_id, seq", "arrivals": "id"}[table]
    return connection.execute(f"SELECT * FROM orchestrator.{table} ORDER BY {order}").fetchall()  # type: ignore[arg-type]


def everything(connection: Connection) -> list[list[tuple[Any, ...]]]:
    return [rows(connection, table) for table in ("runs", "work", "journal", "arrivals")]


def keys(connection: Connection) -> list[tuple[str, bool]]:
    found = connection.execute("SELECT key, fence IS NOT NULL FROM orchestrator.work ORDER BY key").fetchall()
    return [(key, begun) for key, begun in found]


@pytest.fixture
def begun(connection: Connection) -> int:
    """A run whose step k is begun; returns the fence."""
    start(connection)
    take(connection)
    assert commit(connection, holds_turn=True, work=[asked("k")]).written
    (taken,) = take(connection)
    assert (taken.key, taken.attempt, taken.fence) == ("k", 1, 101)
    return 101


# -- starting ----------------------------------------------------------------------------------------------------------
def test_a_start_with_a_taken_id_writes_nothing(connection: Connection) -> None:
    start(connection)
    before = everything(connection)
    assert not runs.start(connection, runs.Start(id="r", saga="other", version=1, input=[1], queue="q"))
    assert everything(connection) == before


def test_countdown_eta_and_deadline_are_counted_by_the_database(connection: Connection) -> None:
    new = runs.Start(id="r", saga="s", version=1, input={}, queue="q", delay=60.0, deadline=10.0)
    assert runs.start(connection, new, now=NOW)
    new = runs.Start(id="r2", saga="s", version=1, input={}, queue="q", delay=1.0, eta=NOW + timedelta(days=1))
    assert runs.start(connection, new, now=NOW)
    found = connection.execute("SELECT due_at FROM orchestrator.work ORDER BY run_id").fetchall()
    assert [due for (due,) in found] == [NOW + timedelta(seconds=60), NOW + timedelta(days=1)]
    run = runs.run(connection, "r")
    assert run is not None and run["deadline_at"] == NOW + timedelta(seconds=70)


# -- taking ------------------------------------------------------------------------------------------------------------
def test_a_turn_is_reserved_for_a_moment_and_no_attempt_is_counted(connection: Connection) -> None:
    start(connection)
    (taken,) = take(connection)
    assert (taken.role, taken.fence, taken.attempt) == ("turn", None, 0)
    assert taken.run is not None and (taken.run.saga, taken.run.position) == ("s", 0)
    assert take(connection, child=2) == []
    connection.execute("UPDATE orchestrator.work SET reserved_at = reserved_at - interval '101 ms'")
    assert [each.run_id for each in take(connection, child=2)] == ["r"]


def test_a_turn_whose_holder_is_gone_is_counted_and_taken_alone(connection: Connection) -> None:
    for run_id in ("r", "r2"):
        start(connection, run_id)
    life = worker(connection)

    def take_over(child: int) -> list[tuple[str, int]]:
        connection.execute("UPDATE orchestrator.work SET reserved_at = reserved_at - interval '101 ms'")
        return [(each.run_id, each.attempt) for each in take(connection, child, incarnation=life)]

    assert liveness.enter(connection, life, 1, ["q"]) is not None
    assert take_over(1) == [("r", 0), ("r2", 0)]
    assert take_over(2) == [("r", 0), ("r2", 0)], "its holder may only be slow"
    assert take_over(3) == [("r", 2)], "nobody drains as child 2"
    assert take_over(4) == [("r", 3)]
    connection.execute("UPDATE orchestrator.work SET due_at = due_at - interval '1 s' WHERE run_id = 'r2'")
    assert take_over(5) == [("r2", 2)]
    turns.give_back(connection, ["r"], life, 4)
    connection.execute("UPDATE orchestrator.work SET reserved_at = NULL")
    assert take_over(6) == [("r2", 1), ("r", 1)], "who has given it back was not ended by it"


def test_what_has_been_due_for_longer_can_be_passed_over(connection: Connection) -> None:
    for run_id in ("r", "r2"):
        start(connection, run_id)
    connection.execute("UPDATE orchestrator.work SET due_at = due_at - interval '10 s' WHERE run_id = 'r'")
    assert [each.run_id for each in take(connection, back=timedelta(seconds=5))] == ["r2"]
    assert [each.run_id for each in take(connection)] == ["r"]


def test_priority_goes_before_time_and_what_nobody_here_can_do_is_left(connection: Connection) -> None:
    for number, priority in enumerate((0, 9, 0, 5)):
        start(connection, f"r{number}", priority=priority)
    connection.execute("UPDATE orchestrator.work SET due_at = due_at - interval '1 s' WHERE run_id = 'r2'")
    connection.execute("UPDATE orchestrator.work SET target = 'else@1' WHERE run_id = 'r3'")
    start(connection, "later", delay=60.0)
    assert [each.run_id for each in take(connection)] == ["r1", "r2", "r0"]


def test_only_one_step_is_begun_at_a_time(connection: Connection) -> None:
    start(connection)
    take(connection)
    commit(connection, holds_turn=True, work=[asked("a"), asked("b")])
    assert [each.key for each in take(connection)] == ["a"]
    assert keys(connection) == [("a", True), ("b", False)]
    assert [each.key for each in take(connection, child=2)] == ["b"]
    assert take(connection, child=3) == []


def test_a_row_that_somebody_holds_is_skipped_without_waiting(connect: Connect) -> None:
    one, two = connect(), connect()
    start(one, "a")
    start(one, "b")
    with one.transaction():
        assert [each.run_id for each in take(one, limit=1)] == ["a"]
        two.execute("SET lock_timeout = '100ms'")
        assert [each.run_id for each in take(two, child=2)] == ["b"]


# -- committing a turn -------------------------------------------------------------------------------------------------
def test_a_turn_is_written_whole(connection: Connection, begun: int) -> None:
    done = commit(connection, 1, done=[(lane("k"), begun)], work=[asked("l")], wake=NOW, rewake=True)
    assert (done.written, done.owed) == (True, False)
    assert keys(connection) == [("", False), ("l", False)]
    assert [(seq, entries) for _, seq, _, entries in rows(connection, "journal")] == [
        (0, [{"e": "deadline"}]),
        (1, [{"e": "deadline"}]),
    ]
    run = runs.run(connection, "r")
    assert run is not None and (run["position"], run["state"]) == (2, "running")


@pytest.mark.parametrize(
    "wrong", [{"position": 0}, {"position": 2}, {"done": [(lane("k"), 7)]}, {"done": [(lane("other"), 101)]}]
)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_wrong_position_or_fence_writes_nothing_at_all(
    connection: Connection, database_url: str, begun: int, wrong: dict[str, Any], shared: bool, goes_on: bool
) -> None:
    arrivals.leave(connection, "r", {"e": "cancel"})
    before = everything(connection)
    options: dict[str, Any] = {"position": 1, "done": [(lane("k"), begun)], "shared": shared}
    options |= {"work": [asked("l")], "withdraw": ["k"], "wake": NOW, "rewake": True, "summary": summary()}
    if goes_on:
        options |= {"next": asked("n"), "next_fence": 9}
    assert not commit(connection, **{**options, **wrong}).written
    assert everything(connection) == before
    with psycopg.connect(database_url) as callers:
        callers.execute("CREATE TABLE mine (x int)")
        assert not commit(callers, **{**options, **wrong}).written
        callers.execute("INSERT INTO mine VALUES (1)")
    assert everything(connection) == before
    assert connection.execute("SELECT x FROM mine").fetchall() == [(1,)], "the caller's transaction lives on"


def test_the_next_step_is_begun_in_the_same_transaction(connection: Connection, begun: int) -> None:
    attempts.heartbeat(connection, "r", lane("k"), begun, {"done": 1})
    assert commit(connection, 1, done=[(lane("k"), begun)], next={**asked("n"), "attempt": 1}, next_fence=9).written
    (held,) = attempts.held(connection, 1, 1)
    assert (held.key, held.attempt, held.fence, held.call) == ("n", 1, 9, CALL)
    assert connection.execute("SELECT details, stop, begun_at IS NULL FROM orchestrator.work").fetchone() == (
        None,
        False,
        False,
    )


def updated_in_place(connection: Connection) -> int:
    """Return how many rows of work this transaction, and perhaps some before it, has updated within their page."""
    row = connection.execute("SELECT pg_stat_get_xact_tuples_hot_updated('orchestrator.work'::regclass)").fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("together", [False, True])
def test_going_on_with_the_next_step_changes_no_index(connection: Connection, begun: int, together: bool) -> None:
    goes_on = turn(1, done=[(lane("k"), begun)], next={**begins("n"), "lane": lane("k")}, next_fence=9)
    with connection.transaction():
        before = updated_in_place(connection)
        if together:
            assert turns.commit_turns(connection, [goes_on])["r"].written
        else:
            assert turns.commit_turn(connection, goes_on).written
        assert updated_in_place(connection) == before + 1
    (held,) = attempts.held(connection, 1, 1)
    assert (held.lane, held.key, held.fence) == (lane("k"), "n", 9)


def test_a_step_that_is_given_back_was_due_when_it_began_however_long_its_lane_is_there(
    connection: Connection, begun: int
) -> None:
    connection.execute("UPDATE orchestrator.work SET due_at = due_at - interval '1 hour'")
    assert commit(
        connection, 1, done=[(lane("k"), begun)], next={**begins("n"), "lane": lane("k")}, next_fence=9
    ).written
    assert attempts.give_back(connection, attempts.held(connection, 1, 1)) == ["q"]
    assert [(each.key, each.attempt) for each in take(connection, back=timedelta(seconds=10))] == [("n", 1)]


def test_reserving_a_turn_changes_no_index(connection: Connection) -> None:
    start(connection)
    with connection.transaction():
        before = updated_in_place(connection)
        assert take(connection)
        assert updated_in_place(connection) == before + 1


def test_a_step_that_is_taken_says_where_its_run_stands(connection: Connection) -> None:
    start(connection)
    take(connection)
    commit(connection, holds_turn=True, work=[asked("k")])
    commit(connection, 1)
    (taken,) = take(connection)
    assert (taken.key, taken.run, taken.position) == ("k", None, 2)


def test_a_shared_run_is_not_waited_for_and_one_alone_is(connect: Connect) -> None:
    one, two = connect(), connect()
    start(one)
    two.execute("SET lock_timeout = '200ms'")
    with one.transaction():
        one.execute("SELECT FROM orchestrator.runs WHERE id = 'r' FOR UPDATE")
        assert not commit(two, shared=True).written
        with pytest.raises(psycopg.errors.LockNotAvailable):
            commit(two, shared=False)
    assert commit(two, shared=True).written


def test_the_run_is_locked_before_its_work(connect: Connect, begun: int) -> None:
    """One order for all: whoever waits for the run holds no row of its work."""
    one, two = connect(), connect()
    with one.transaction():
        one.execute("SELECT FROM orchestrator.runs WHERE id = 'r' FOR UPDATE")
        assert not commit(two, 1, done=[(lane("k"), begun)]).written
        one.execute("SELECT FROM orchestrator.work WHERE key = 'k' FOR UPDATE NOWAIT")


def test_withdrawal_takes_back_what_was_not_begun_and_tells_the_rest(connection: Connection, begun: int) -> None:
    assert commit(connection, 1, work=[asked("l")], withdraw=["k", "missing"]).written
    done = commit(connection, 2, withdraw=["k", "l"])
    assert (done.written, done.owed) == (True, True)
    assert [arrival for *_, arrival in rows(connection, "arrivals")] == [{"e": "withdrawn", "key": "l"}]
    assert attempts.heartbeat(connection, "r", lane("k"), begun, None) is True, "it is told to stop"
    assert attempts.heartbeat(connection, "r", lane("k"), 5, None) is None, "it has lost its fence"


@pytest.mark.parametrize("first", ["is told to stop", "is given back"])
def test_what_is_given_back_and_withdrawn_at_the_same_time_is_not_begun_again(connect: Connect, first: str) -> None:
    giver, driver, watcher = connect(), connect(), connect()
    start(giver)
    take(giver)
    commit(giver, holds_turn=True, work=[asked("k")])
    take(giver)
    held = attempts.held(giver, 1, 1)
    waits = "SELECT count(*) FROM pg_locks WHERE pid = %s AND NOT granted"
    give_back, withdraw = partial(attempts.give_back, giver, held), partial(commit, driver, 1, withdraw=["k"])
    one, two = (driver, giver) if first == "is told to stop" else (giver, driver)
    now, then = (withdraw, give_back) if first == "is told to stop" else (give_back, withdraw)
    other = Thread(target=then)
    with one.transaction():
        now()
        other.start()
        until(lambda: watcher.execute(waits, [two.info.backend_pid]).fetchone() == (1,), "the second one waits")
    other.join(30.0)
    assert [arrival for *_, arrival in rows(watcher, "arrivals")] == [{"e": "withdrawn", "key": "k"}]
    assert [taken.role for taken in take(watcher)] in ([], ["turn"])


def test_an_end_clears_the_work_and_waits_for_what_was_left_meanwhile(connection: Connection, begun: int) -> None:
    arrivals.leave(connection, "r", {"e": "cancel"})
    ((arrival_id, *_),) = rows(connection, "arrivals")
    end: dict[str, Any] = {"state": "terminated", "ended": True, "summary": summary()}
    refused = commit(connection, 1, **end)
    assert (refused.written, refused.owed) == (False, True)
    assert commit(connection, 1, consumed=[arrival_id], **end).written
    assert (rows(connection, "work"), rows(connection, "arrivals")) == ([], [])
    run = runs.run(connection, "r")
    assert run is not None and run["finished_at"] is not None
    assert not arrivals.arrive(connection, "r", [(lane("k"), begun, {"e": "outcome"})])


@pytest.mark.parametrize("together", [False, True])
def test_an_end_takes_in_an_outcome_that_was_just_being_left(connect: Connect, begun: int, together: bool) -> None:
    """Its author is committing it, perhaps with rows of the application: it is neither lost nor passed over."""
    author, driver, watcher = connect(), connect(), connect()
    end = turn(1, state="terminated", ended=True, summary=summary())
    written: list[bool] = []

    def finish() -> None:
        done = turns.commit_turns(driver, [end]).get("r") if together else turns.commit_turn(driver, end)
        written.append(done is not None and done.written)

    ending = Thread(target=finish)
    with author.transaction():
        assert arrivals.arrive(author, "r", [(lane("k"), begun, {"e": "outcome"})]) == {lane("k")}
        ending.start()
        waits = "SELECT count(*) FROM pg_locks WHERE pid = %s AND NOT granted"
        until(lambda: watcher.execute(waits, [driver.info.backend_pid]).fetchone() == (1,), "the end waits")
    ending.join(30.0)
    assert written == [False]
    ((arrival_id, *_),) = rows(driver, "arrivals")
    end.consumed = [arrival_id]
    finish()
    assert written == [False, True] and rows(driver, "arrivals") == []


# -- committing turns of many runs with one statement ------------------------------------------------------------------
@pytest.fixture
def three(connection: Connection) -> list[str]:
    """Three runs whose step k is begun with the fences 1, 2 and 3."""
    names = ["a", "b", "c"]
    for name in names:
        start(connection, name)
    take(connection)
    first = [turn(run_id=name, holds_turn=True, next=begins("k"), next_fence=n) for n, name in enumerate(names, 1)]
    assert sorted(turns.commit_turns(connection, first)) == names
    assert work_of(connection) == [("a", "k", 1), ("b", "k", 2), ("c", "k", 3)]
    return names


def begins(key: str) -> dict[str, Any]:
    return {**asked(key), "attempt": 1}


def work_of(connection: Connection) -> list[tuple[Any, ...]]:
    return connection.execute("SELECT run_id, key, fence FROM orchestrator.work ORDER BY run_id, key").fetchall()


def test_each_run_gets_its_own_turn(connection: Connection, three: list[str]) -> None:
    end: dict[str, Any] = {"state": "completed", "ended": True, "summary": summary(output={"x": 1})}
    done = turns.commit_turns(
        connection,
        [
            turn(1, run_id="a", done=[(lane("k"), 1)], next=begins("l"), next_fence=11),
            turn(1, run_id="b", done=[(lane("k"), 2)], work=[asked("m"), asked("n")]),
            turn(1, run_id="c", done=[(lane("k"), 3)], **end),
        ],
    )
    assert {name: (one.written, one.owed) for name, one in done.items()} == dict.fromkeys(three, (True, False))
    assert work_of(connection) == [("a", "l", 11), ("b", "m", None), ("b", "n", None)]
    (held,) = attempts.held(connection, 1, 1)
    assert (held.run_id, held.key, held.attempt, held.call) == ("a", "l", 1, CALL)
    run = runs.run(connection, "c")
    assert run is not None and (run["state"], run["output"], run["position"]) == ("completed", {"x": 1}, 2)
    assert run["finished_at"] is not None
    assert [(run_id, seq) for run_id, seq, *_ in rows(connection, "journal")] == [
        (name, seq) for name in three for seq in (0, 1)
    ]


def test_a_run_that_was_moved_or_is_locked_is_left_out(
    connect: Connect, connection: Connection, three: list[str]
) -> None:
    assert commit(connection, 1, run_id="a").written
    other = connect()
    with other.transaction():
        other.execute("SELECT FROM orchestrator.runs WHERE id = 'b' FOR UPDATE")
        done = turns.commit_turns(
            connection,
            [turn(1, run_id=name, done=[(lane("k"), n)]) for n, name in enumerate(three, 1)],
        )
    assert list(done) == ["c"]
    assert work_of(connection) == [("a", "k", 1), ("b", "k", 2)]


@pytest.mark.parametrize("lock", ["FOR SHARE", "FOR NO KEY UPDATE"])
def test_a_run_that_was_locked_before_is_as_good_as_any_other(
    connect: Connect, connection: Connection, three: list[str], lock: str
) -> None:
    """Its row tells that somebody had it, and not that they are through."""
    connect().execute(f"SELECT FROM orchestrator.runs WHERE id = 'b' {lock}")  # type: ignore[arg-type]
    done = turns.commit_turns(
        connection, [turn(1, run_id=name, done=[(lane("k"), n)]) for n, name in enumerate(three, 1)]
    )
    assert sorted(done) == three


def test_a_run_that_another_is_just_moving_is_left_out_and_not_waited_for(
    connect: Connect, connection: Connection, three: list[str]
) -> None:
    other = connect()
    with other.transaction():
        commit(other, 1, run_id="b")
        done = turns.commit_turns(
            connection, [turn(1, run_id=name, done=[(lane("k"), n)]) for n, name in enumerate(three, 1)]
        )
    assert sorted(done) == ["a", "c"]
    assert work_of(connection) == [("b", "k", 2)]
    assert [row[:2] for row in rows(connection, "journal")] == [(name, seq) for name in three for seq in (0, 1)]


@pytest.mark.parametrize(
    "how", [{"next": begins("l"), "next_fence": 9}, {}, {"state": "completed", "ended": True, "summary": summary()}]
)
def test_one_lost_fence_takes_all_of_them_back(connection: Connection, three: list[str], how: dict[str, Any]) -> None:
    before = everything(connection)
    fences = {"a": 1, "b": 77, "c": 3}
    commits = [turn(1, run_id=name, done=[(lane("k"), fence)], **how) for name, fence in fences.items()]
    assert turns.commit_turns(connection, commits) == {}
    assert everything(connection) == before


def test_outcomes_of_one_run_are_one_turn(connection: Connection) -> None:
    start(connection)
    take(connection)
    commit(connection, holds_turn=True, work=[asked("a"), asked("b"), asked("c")])
    taken = take(connection, short=["t"])
    assert [each.key for each in taken] == ["a", "b", "c"], "short steps begin together"
    done = [(each.lane, each.fence or 0) for each in taken]
    assert turns.commit_turns(connection, [turn(1, done=done, next=begins("d"), next_fence=5)])["r"].written
    assert work_of(connection) == [("r", "d", 5)]


def test_attempts_among_others_are_tried_again_later(connection: Connection, three: list[str]) -> None:
    again = [
        turn(
            1,
            run_id=name,
            done=[(lane("k"), n)],
            work=[{**asked("k"), "attempt": 1, "due": "2036-01-01T00:00:00+00:00"}],
        )
        for n, name in enumerate(three, 1)
    ]
    assert sorted(turns.commit_turns(connection, again)) == three
    assert work_of(connection) == [(name, "k", None) for name in three]


def test_an_end_among_others_waits_for_what_was_left_meanwhile(connection: Connection, three: list[str]) -> None:
    arrivals.leave(connection, "b", {"e": "cancel"})
    ((arrival_id, *_),) = rows(connection, "arrivals")
    end: dict[str, Any] = {"state": "terminated", "ended": True, "summary": summary()}
    ends = [turn(1, run_id=name, done=[(lane("k"), n)], **end) for n, name in enumerate(three, 1)]
    assert sorted(turns.commit_turns(connection, ends)) == ["a", "c"]
    assert work_of(connection) == [("b", "", None), ("b", "k", 2)]
    ends[1].consumed = [arrival_id]
    assert turns.commit_turns(connection, [ends[1]])["b"].owed is False
    assert (rows(connection, "work"), rows(connection, "arrivals")) == ([], [])


@pytest.mark.parametrize("asked_again", [False, True])
def test_a_held_turn_among_others_goes_sleeps_or_stays_if_it_was_asked_for(
    connection: Connection, asked_again: bool
) -> None:
    later = NOW + timedelta(days=9000)
    for name in ("gone", "next", "sleeps"):
        start(connection, name)
    take(connection)
    if asked_again:
        for name in ("gone", "next", "sleeps"):
            arrivals.owe_turn(connection, name)
    turns.commit_turns(
        connection,
        [
            turn(run_id="gone", holds_turn=True),
            turn(run_id="next", holds_turn=True, next=begins("k"), next_fence=1),
            turn(run_id="sleeps", holds_turn=True, wake=later, next=begins("k"), next_fence=2),
        ],
    )
    left = [("next", "k", 1), ("sleeps", "", None), ("sleeps", "k", 2)]
    stays = [("gone", "", None), ("next", "", None)] if asked_again else []
    assert work_of(connection) == sorted([*left, *stays])
    due = connection.execute("SELECT due_at FROM orchestrator.work WHERE run_id = 'sleeps' AND key = ''").fetchone()
    assert (due == (later,)) is not asked_again, "what was asked for meanwhile is due now"


# -- turns that are owed -----------------------------------------------------------------------------------------------
def test_owing_a_turn_lifts_a_reservation_so_that_its_holder_cannot_delete_it(connection: Connection) -> None:
    start(connection)
    take(connection)
    assert turns.holds_turn(connection, "r", 1, 1)
    with connection.transaction():
        assert arrivals.leave(connection, "r", {"e": "cancel"}) == "q"
    assert not turns.holds_turn(connection, "r", 1, 1)
    done = commit(connection, holds_turn=True)
    assert (done.written, done.owed) == (True, True)
    assert keys(connection) == [("", False)]
    assert [each.run_id for each in take(connection, child=2)] == ["r"]


def test_a_held_turn_is_deleted_or_moved_to_its_next_wake(connection: Connection) -> None:
    start(connection)
    take(connection)
    assert commit(connection, holds_turn=True, wake=NOW + timedelta(days=9000)).written
    assert [due for (due,) in connection.execute("SELECT due_at FROM orchestrator.work").fetchall()] == [
        NOW + timedelta(days=9000)
    ]
    arrivals.owe_turn(connection, "r")
    take(connection)
    assert commit(connection, 1, holds_turn=True).written
    assert keys(connection) == []
    assert arrivals.owe_turn(connection, "nobody") is None


def test_a_turn_that_somebody_asked_for_meanwhile_is_not_passed_on_to_who_has_the_code(connection: Connection) -> None:
    start(connection)
    for meanwhile in (False, True):
        assert [taken.role for taken in take(connection, child=1)] == ["turn"]
        if meanwhile:
            arrivals.owe_turn(connection, "r", anyone=True)
        turns.pass_on(connection, "r", 1, 1)
        assert [taken.role for taken in take(connection, child=2, targets=[turns.ANYONE])] == ["turn"] * meanwhile
        connection.execute("UPDATE orchestrator.work SET reserved_at = NULL")


def test_arrivals_need_the_fence_and_are_left_once(connection: Connection, begun: int) -> None:
    assert not arrivals.arrive(connection, "r", [(lane("k"), 7, {"e": "outcome"})])
    outcome: Any = {"e": "outcome", "key": "k", "role": "do", "attempt": 1, "worker": "w"}
    assert arrivals.arrive(connection, "r", [(lane("gone"), 1, {}), (lane("k"), begun, outcome)]) == {lane("k")}
    assert not arrivals.arrive(connection, "r", [(lane("k"), begun, {"e": "outcome"})])
    assert arrivals.waiting(connection, "r")
    assert attempts.recorded(connection, "r", "k", "do", 1, "w")
    assert not attempts.recorded(connection, "r", "k", "do", 2, "w")
    assert not attempts.recorded(connection, "r", "k", "undo", 1, "w")


def test_a_new_fence_waits_for_a_commit_in_flight(connect: Connect, begun: int) -> None:
    one, two = connect(), connect()
    two.execute("SET lock_timeout = '100ms'")
    with one.transaction():
        assert commit(one, 1, done=[(lane("k"), begun)]).written
        with pytest.raises(psycopg.errors.LockNotAvailable):
            attempts.refence(two, "r", lane("k"), [begun], 5)
    assert not attempts.refence(two, "r", lane("k"), [begun], 5)


# -- liveness ----------------------------------------------------------------------------------------------------------
def worker(connection: Connection, **options: Any) -> int:
    given: dict[str, Any] = {"node": "n", "host": "h", "pid": 1, "queues": ["q"], "targets": ["t"], "slots": 2}
    return liveness.register(connection, **{**given, **options})


def test_a_lease_is_renewed_until_it_is_declared_dead(connection: Connection) -> None:
    incarnation = worker(connection)
    assert liveness.renew(connection, incarnation)
    ((_, beats, *_),) = liveness.alive(connection)
    assert liveness.renew(connection, incarnation)
    assert not liveness.declare_dead(connection, incarnation, beats), "it has renewed since"
    assert liveness.declare_dead(connection, incarnation, beats + 1)
    assert not liveness.declare_dead(connection, incarnation)
    assert not liveness.renew(connection, incarnation)
    assert not liveness.enter(connection, incarnation, 1, ["q"])


def test_rings_help_up_to_the_free_slots(connection: Connection) -> None:
    assert runs.rings_needed(connection, "q", 5) == 0
    first, second = worker(connection), worker(connection, slots=1)
    assert [runs.rings_needed(connection, "q", n) for n in (1, 5)] == [1, 3]
    assert liveness.enter(connection, first, 1, ["q"]) and liveness.enter(connection, first, 1, ["q"])
    assert runs.rings_needed(connection, "q", 5) == 2
    liveness.declare_dead(connection, first)
    assert runs.rings_needed(connection, "q", 5) == 1, "neither the slots nor the marks of the dead count"
    liveness.leave(connection, second, 1)
    assert runs.rings_needed(connection, "elsewhere", 5) == 0


def begin(connection: Connection, run_id: str = "r", **options: Any) -> tuple[set[str], int]:
    new = runs.Start(id=run_id, saga="s", version=1, input={}, queue="q", **options)
    return runs.start_and_look(connection, [new], "q")


def test_nothing_is_left_for_a_run_that_is_not_there(connection: Connection) -> None:
    assert arrivals.leave(connection, "gone", {"e": "cancel"}) is None
    assert rows(connection, "arrivals") == []


def test_a_start_says_whether_to_ring(connection: Connection) -> None:
    incarnation = worker(connection, slots=1)
    assert begin(connection) == ({"r"}, 1)
    assert begin(connection) == (set(), 0), "the id is taken"
    assert begin(connection, "later", delay=60.0, priority=3, deadline=5.0, tags={"a": 1}) == ({"later"}, 0)
    later = runs.run(connection, "later")
    assert later is not None and (later["priority"], later["tags"]) == (3, {"a": 1})
    assert later["deadline_at"] - later["started_at"] == timedelta(seconds=5)
    assert later["started_at"] > NOW
    assert liveness.enter(connection, incarnation, 1, ["q"])
    assert begin(connection, "heard") == ({"heard"}, 0), "every slot drains, and looks once more before it leaves"
    connection.execute("INSERT INTO orchestrator.pruned VALUES ('gone', 's', 'completed', now())")
    assert begin(connection, "gone") == (set(), 0)


def test_who_leaves_waits_for_a_start_that_counts_on_it(connect: Connect) -> None:
    caller, child, watcher = connect(), connect(), connect()
    incarnation = worker(caller, slots=1)
    assert liveness.enter(child, incarnation, 1, ["q"])
    leaving = Thread(target=liveness.leave, args=(child, incarnation, 1))
    with caller.transaction():
        assert begin(caller) == ({"r"}, 0)
        leaving.start()
        waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = %s AND NOT granted"
        until(lambda: watcher.execute(waits, [child.info.backend_pid]).fetchone() == (1,), "who leaves waits")
    leaving.join(30.0)
    assert [taken.run_id for taken in take(child)] == ["r"]


def test_a_start_neither_counts_on_nor_waits_for_who_is_leaving(connect: Connect) -> None:
    caller, child = connect(), connect()
    incarnation = worker(caller, slots=1)
    assert liveness.enter(child, incarnation, 1, ["q"])
    with child.transaction():
        liveness.leave(child, incarnation, 1)
        assert begin(caller) == ({"r"}, 1), "the mark can still be seen, and nobody looks any more"


def test_a_start_that_waits_for_its_id_keeps_nobody_from_leaving(connect: Connect) -> None:
    slow, caller, child, watcher = connect(), connect(), connect(), connect()
    incarnation = worker(child, slots=1)
    assert liveness.enter(child, incarnation, 1, ["q"])
    again = Thread(target=begin, args=(caller,))
    with slow.transaction():
        start(slow)  # in a transaction of the application, which may take long
        again.start()
        waits = "SELECT count(*) FROM pg_locks WHERE pid = %s AND NOT granted"
        until(lambda: watcher.execute(waits, [caller.info.backend_pid]).fetchone() == (1,), "the second start waits")
        child.execute("SET lock_timeout = '10s'")
        liveness.leave(child, incarnation, 1)
    again.join(30.0)


def test_what_is_due_is_counted_per_queue_that_somebody_serves(connection: Connection) -> None:
    worker(connection)
    for number in range(3):
        start(connection, f"r{number}", priority=number)
    start(connection, "later", delay=60.0)
    assert liveness.due(connection, RESERVATION) == {"q": 3}
    assert liveness.due(connection, RESERVATION, limit=2) == {"q": 2}
    take(connection, limit=1)
    assert liveness.due(connection, RESERVATION) == {"q": 2}


def test_expired_attempts_are_given_back_in_pages_that_pumps_share(connect: Connect, begun: int) -> None:
    one, two = connect(), connect()
    one.execute("UPDATE orchestrator.work SET expires_at = now() - interval '1 hour'")
    assert liveness.expired_children(one, 1) == [1]
    with one.transaction():
        assert liveness.give_back_expired(one) == ["q"]
        two.execute("SET lock_timeout = '100ms'")
        assert liveness.give_back_expired(two) == []
    ((*_, arrival),) = rows(one, "arrivals")
    assert (arrival["key"], arrival["attempt"], arrival["verdict"], arrival["role"]) == ("k", 1, "doubt", "do")
    assert arrival["quiet"], "its process may be at work until its deadline"
    assert keys(one) == [("", False)]


def test_a_lost_attempt_of_a_transactional_step_certainly_had_no_effect(connection: Connection, begun: int) -> None:
    connection.execute("""UPDATE orchestrator.work SET call = '{"a": {}, "t": 60, "n": 1}'""")
    assert liveness.give_back_dead(connection) == ["q"], "incarnation 1 is not among the living"
    ((*_, arrival),) = rows(connection, "arrivals")
    assert arrival["verdict"] == "failed" and not arrival.get("quiet")


@pytest.mark.parametrize("timer", [True, False])
def test_forgotten_arrivals_are_found_behind_a_timer_too(connection: Connection, begun: int, timer: bool) -> None:
    if timer:
        assert commit(connection, 1, wake=NOW + timedelta(days=9000), rewake=True).written
    connection.execute(
        "INSERT INTO orchestrator.arrivals (run_id, at, arrival) VALUES ('r', now() - interval '2 s', '{}')"
    )
    assert liveness.wake_forgotten(connection) == ["q"]
    assert liveness.wake_forgotten(connection) == [], "its turn is due now"


def test_what_another_turn_took_while_a_run_was_read_is_not_read_as_new(connect: Connect) -> None:
    """Else that turn's outcomes would be taken a second time, on top of the journal that has them."""
    reader, other = connect(), connect()
    start(other)
    arrivals.leave(other, "r", {"e": "cancel"})
    (arrival,) = (row[0] for row in rows(other, "arrivals"))
    execute, statements = reader.execute, []

    def overtaken(query: Any, *values: Any) -> Any:
        statements.append(query)
        if len(statements) == 2:
            assert commit(other, consumed=[arrival]).written
        return execute(query, *values)

    reader.execute = overtaken  # type: ignore[method-assign]
    loaded = turns.load(reader, {"r": 0})["r"]
    assert len(statements) == 3
    if loaded.run.position == 1:  # a pipeline may be read as late as that
        assert loaded.arrivals == []
    else:
        assert not commit(other, loaded.run.position).written, "it is out of date, and is told so"


def test_who_stands_still_while_it_reads_a_run_in_a_transaction_is_ended_by_postgres(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction of a step has locked rows of its application, for which others wait."""
    reader, other = connect(), connect()
    start(other)
    pid, row = reader.info.backend_pid, turns.RunRow

    def stand_still(*values: Any) -> Any:
        gone = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = %s)"
        until(lambda: other.execute(gone, [pid]).fetchone() == (True,), "its transaction is ended", 10.0)
        return row(*values)

    monkeypatch.setattr(turns, "RunRow", stand_still)
    with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout), reader.transaction():
        reader.execute("SELECT set_config('idle_in_transaction_session_timeout', '200', true)")
        assert turns.load(reader, {"r": 0})
        reader.execute("SELECT 1")


# -- plans -------------------------------------------------------------------------------------------------------------
MANY = """
INSERT INTO orchestrator.runs (id, saga, version, input, root_id, queue, started_at, position)
SELECT 'r' || n, 's', 1, '{}', 'r' || n, 'q', now(), 1 FROM generate_series(1, 6000) n;
INSERT INTO orchestrator.journal SELECT 'r' || n, 0, now(), '[]' FROM generate_series(1, 6000) n;
INSERT INTO orchestrator.arrivals (run_id, arrival) SELECT 'r' || n, '{}' FROM generate_series(1, 2000) n;
INSERT INTO orchestrator.work (run_id, key, role, target, queue, due_at)
SELECT 'r' || n, '', 'turn', 's@1', 'q', now() + interval '1 day' FROM generate_series(1, 6000) n;
INSERT INTO orchestrator.work (run_id, lane, key, role, target, queue, due_at, call)
SELECT 'r' || n, 1, 'k', 'do', 't', 'q', now(), '{"a": {}, "t": 60}' FROM generate_series(1, 200) n;
INSERT INTO orchestrator.work (run_id, lane, key, role, target, queue, due_at, call, fence, incarnation, child)
SELECT 'r' || n, 2, 'b', 'do', 't', 'q', now(), '{"a": {}, "t": 60}', n, 1000 + n / 100, 1
FROM generate_series(1, 2000) n;
ANALYZE;
"""


@pytest.fixture(scope="module")
def crowded(_databases: Databases) -> Iterator[str]:
    """URL of a database with many rows."""
    name = _databases.lend()
    with open_connection(_databases.url(name), name="test") as connection:
        connection.execute(MANY)
        worker(connection)
    yield _databases.url(name)
    _databases.take_back(name)


@pytest.fixture
def among_many(crowded: str) -> Iterator[Connection]:
    """A connection to it in a transaction that is rolled back."""
    with open_connection(crowded, name="test") as connection, connection.transaction(force_rollback=True):
        yield connection


@pytest.fixture
def plans(among_many: Connection) -> list[str]:
    """The plan of every statement that this connection runs from now on, inside of functions too."""
    seen: list[str] = []
    among_many.add_notice_handler(lambda notice: seen.append(notice.message_primary or ""))
    among_many.execute("LOAD 'auto_explain'")
    for setting in ("log_min_duration = 0", "log_nested_statements = on", "log_level = notice"):
        among_many.execute(f"SET auto_explain.{setting}")  # type: ignore[arg-type]
    seen.clear()
    return seen


LINE = """
INSERT INTO orchestrator.work (run_id, lane, key, role, target, queue, due_at, call, gate)
SELECT 'r' || n, 3, 'g', 'do', 't', 'q', now() + interval '8766000 hours',
    '{"g": {"gate": "g", "every": 1, "most": 9}}', 'g' || n / 100 FROM generate_series(1, 2000) n;
INSERT INTO orchestrator.gates (name) SELECT 'g' || n FROM generate_series(1, 20) n;
ANALYZE orchestrator.work;
"""


def in_line(connection: Connection) -> None:
    connection.execute(LINE)


def pause(connection: Connection) -> None:
    assert pauses.pause(connection, "saga", "s", "ann", "")


HOT: dict[str, tuple[Callable[[Connection], Any], set[str]]] = {
    "start": (lambda c: start(c), set()),
    "identity": (lambda c: runs.identity(c, "r7"), {"runs_pkey"}),
    "outcomes": (lambda c: runs.outcomes(c, ["r7", "r8"]), {"runs_pkey"}),
    "history": (lambda c: runs.history(c, "r7"), {"journal_pkey"}),
    "outstanding": (lambda c: runs.outstanding(c, "r7"), {"work_pkey"}),
    "take": (lambda c: take(c), {"work_due"}),
    "load": (lambda c: turns.load(c, {"r7": 0, "r8": 0}), {"runs_pkey", "journal_pkey", "arrivals_by_run"}),
    "commit": (
        lambda c: commit(c, 1, run_id="r7", work=[asked("x")], withdraw=["k"], consumed=[7], wake=NOW, rewake=True),
        {"runs_pkey", "work_pkey", "arrivals_pkey"},
    ),
    "commit together": (
        lambda c: turns.commit_turns(
            c,
            [
                turn(1, run_id="r7", done=[(2, 7)], work=[asked("x")], consumed=[7]),
                turn(1, run_id="r8", state="completed", ended=True, summary=summary()),
            ],
        ),
        {"runs_pkey", "work_pkey", "arrivals_pkey", "arrivals_by_run"},
    ),
    "arrive": (lambda c: arrivals.arrive(c, "r7", [(1, 1, {})]), {"work_pkey"}),
    "owe_turn": (lambda c: arrivals.owe_turn(c, "r7"), {"runs_pkey"}),
    "has_arrivals": (lambda c: arrivals.waiting(c, "r7"), {"arrivals_by_run"}),
    "heartbeat": (lambda c: attempts.heartbeat(c, "r7", 1, 1, None), {"work_pkey"}),
    "refence": (lambda c: attempts.refence(c, "r7", 1, [1], 2), {"work_pkey"}),
    "recorded": (lambda c: attempts.recorded(c, "r7", "k", "do", 1, "w"), {"journal_pkey", "arrivals_by_run"}),
    "give_back": (lambda c: turns.give_back(c, ["r7"], 1, 1), {"work_pkey"}),
    "held": (lambda c: attempts.held(c, 1, 1), {"work_begun"}),
    "give_back_dead": (lambda c: liveness.give_back_dead(c), {"work_begun"}),
    "give_back_gone": (lambda c: liveness.give_back_gone(c, 1), {"work_begun"}),
    "give_back_child": (lambda c: liveness.give_back_child(c, 1, 1), {"work_begun"}),
    "give_back_expired": (lambda c: liveness.give_back_expired(c), {"work_begun"}),
    "due": (lambda c: liveness.due(c, RESERVATION), {"work_due"}),
    "leave_arrivals": (lambda c: arrivals.leave_many(c, [("r7", {}), ("r8", {})]), {"runs_pkey"}),
    "admit": (lambda c: (in_line(c), gates.admit(c, "g7")), {"work_gate", "work_pkey"}),
    "lines": (lambda c: (in_line(c), gates.lines(c)), {"work_gate"}),
    "sweep_gates": (lambda c: (in_line(c), gates.sweep(c)), {"work_gate"}),
    "put_aside": (lambda c: (pause(c), pauses.put_aside(c, ["r7"], ["s"], 1, 1)), {"runs_pkey", "work_pkey"}),
    "hold": (lambda c: (pause(c), pauses.tell(c, "s")), {"runs_pkey", "work_pkey"}),
    "let go": (
        lambda c: (pause(c), pauses.tell(c, "s"), pauses.lift(c, "saga", "s", "ann", ""), pauses.tell(c, "s")),
        {"runs_pkey", "work_pkey", "paused_runs_pkey"},
    ),
    "children": (lambda c: circles.children(c, ["r7", "r8"]), {"runs_by_parent"}),
    "neglects": (lambda c: liveness.neglects(c, 1, ["q"], ["t"], RESERVATION), {"work_due"}),
}
LARGE = re.compile(r"Seq Scan on (runs|journal|work|arrivals)\b")


@pytest.mark.parametrize("name", HOT)
def test_every_hot_statement_keeps_its_index(among_many: Connection, plans: list[str], name: str) -> None:
    call, indexes = HOT[name]
    call(among_many)
    if among_many.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS:
        among_many.execute("SELECT 1")  # in a transaction a statement ends, and is explained, when the next one comes
    text = "\n".join(plans)
    assert plans, "auto_explain shows the plans"
    assert not LARGE.search(text), text
    assert {index for index in indexes if index not in text} == set(), text


def test_each_run_hears_what_a_turn_tells_it_in_the_order_in_which_it_is_told(connection: Connection) -> None:
    others = [f"r{n}" for n in range(20)]
    for run_id in ("r", *others):
        start(connection, run_id)
    told = [{"run": run_id, "arrival": {"n": n}, "anyone": True} for n in (1, 2) for run_id in others]
    assert commit(connection, posts=told).written
    heard: dict[str, list[int]] = {}
    for run_id, arrival in connection.execute("SELECT run_id, arrival FROM orchestrator.arrivals ORDER BY id"):
        heard.setdefault(run_id, []).append(arrival["n"])
    assert heard == {run_id: [1, 2] for run_id in others}
