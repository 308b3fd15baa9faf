"""Turns that share a commit: what is begun never waits behind a step that can take long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import Effect, RetryPolicy, saga, step
from orchestrator.engine import drain, session
from orchestrator.machine.journal import Cancel, encode
from orchestrator.store import arrivals, attempts, liveness
from orchestrator.store.connection import Connection
from tests.engine.proxy import Proxy
from tests.engine.stage import QUEUE, Child, start, state, states, work


@step(effect=Effect.NONE)
def short(thing: str) -> str:
    return thing


@step(effect=Effect.NONE)
def long(thing: str) -> str:
    return thing


@saga.define
async def quick(thing: str) -> None:
    await saga.step(short, thing)
    await saga.step(short, thing)


@step(effect=Effect.NONE, retry=RetryPolicy(timedelta(0), 1.0, timedelta(0), 4))
def shaky(thing: str) -> str:
    TRIED.append(thing)
    if TRIED.count(thing) == 1:
        raise ConnectionError(thing)
    return thing


@saga.define
async def side_by_side(thing: str) -> None:
    await asyncio.gather(
        saga.step(short, "first"), saga.step(short, thing), saga.step(shaky, "a"), saga.step(shaky, "b")
    )


@saga.define
async def three_then_one(thing: str) -> None:
    await asyncio.gather(*(saga.step(short, f"{thing}{n}") for n in range(3)))
    await saga.step(short, "then")


@saga.define
async def slow(thing: str) -> None:
    await saga.step(long, thing)


TRIED: list[str] = []


def begun_beside(child: Child, connection: Connection, task: str) -> list[int]:
    """How many rows were begun in the database, each time that a step of `task` ran."""
    seen: list[int] = []

    def look(taken: Any) -> None:
        if taken.task == task:
            row = connection.execute("SELECT count(*) FROM orchestrator.work WHERE fence IS NOT NULL").fetchone()
            seen.append(row[0] if row else 0)

    child.runner.before = look
    return seen


def test_steps_that_are_known_to_be_short_are_begun_together(child: Child, connection: Connection) -> None:
    child.drainer._attempts.recent_s[short.name] = 0.001
    seen = begun_beside(child, connection, short.name)
    for name in ("a", "b", "c"):
        start(connection, quick, name, run_id=name)
    child.drain()
    assert seen[:3] == [3, 3, 3]


def test_attempts_that_were_lost_together_are_made_again_one_by_one(
    new_child: Callable[..., Child], connection: Connection
) -> None:
    """One of them may be what ended the process: it would take the others along until none has attempts left."""
    late, heir = new_child(), new_child()
    late.drainer._attempts.recent_s[short.name] = heir.drainer._attempts.recent_s[short.name] = 0.001

    def end_the_process(taken: Any) -> None:
        raise KeyboardInterrupt

    late.runner.before = end_the_process
    seen = begun_beside(heir, connection, short.name)
    for name in ("a", "b", "c"):
        start(connection, quick, name, run_id=name)
    with pytest.raises(KeyboardInterrupt):
        late.drain()
    liveness.declare_dead(connection, late.incarnation)
    liveness.give_back_gone(connection, late.incarnation)
    start(connection, quick, "d", run_id="d")
    heir.drain()
    again = [begun for begun, (_, key, attempt) in zip(seen, heir.runner.calls, strict=True) if attempt > 1]
    assert again == [1, 1, 1]
    assert set(states(connection).values()) == {"completed"}


def test_attempts_whose_failure_was_reported_are_made_again_together(child: Child, connection: Connection) -> None:
    """They ended no process, and when a provider is back there are many of them."""
    TRIED.clear()
    child.drainer._attempts.recent_s[shaky.name] = 0.001
    seen = begun_beside(child, connection, shaky.name)
    for name in ("a", "b", "c"):
        start(connection, only_shaky, name, run_id=name)
    child.drain()
    again = [begun for begun, (_, key, attempt) in zip(seen, child.runner.calls, strict=True) if attempt > 1]
    assert again and set(again) == {3}


def test_a_short_step_that_is_interrupted_once_is_still_known_to_be_short(
    child: Child, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has the core, now and then; a step that became long takes long again."""
    clock = SimpleNamespace(now=0.0, took=iter([0.001, 0.03, 0.001, 0.03, 0.03, 0.001]))
    monkeypatch.setattr("orchestrator.engine.attempts.time", SimpleNamespace(monotonic=lambda: clock.now))

    def pass_time(taken: Any) -> None:
        clock.now += next(clock.took)

    child.runner.after = pass_time
    known: list[bool] = []
    child.runner.before = lambda taken: known.append(child.drainer._attempts.is_short(short.name))
    for number in range(3):
        start(connection, quick, "a", run_id=f"{number}")
        child.drain()
    assert known == [False, True, True, True, True, False]


def test_where_short_steps_came_several_at_once_those_that_follow_are_waited_for(
    child: Child, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    child.drainer._attempts.recent_s[short.name] = 0.001
    paused: list[float] = []

    def pause(seconds: float) -> None:
        paused.append(seconds)
        if paused == [drain._GATHER_S]:
            for name in ("c", "d", "e"):
                start(connection, quick, name, run_id=name)

    monkeypatch.setattr("orchestrator.engine.drain.time.sleep", pause)
    for name in ("a", "b"):
        start(connection, quick, name, run_id=name)
    child.drain()
    commits = "SELECT count(DISTINCT xmin::text), count(*) FROM orchestrator.journal WHERE run_id IN ('c', 'd', 'e')"
    assert connection.execute(commits).fetchone() == (3, 9), "a first turn, an outcome and an end, for three at once"


def test_a_run_that_comes_alone_keeps_nobody_waiting_for_others(
    child: Child, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    child.drainer._attempts.recent_s[short.name] = 0.001
    paused: list[float] = []
    monkeypatch.setattr("orchestrator.engine.drain.time.sleep", paused.append)
    start(connection, quick, "a", run_id="a")
    child.drain()
    assert paused and drain._GATHER_S not in paused


def test_attempts_that_are_tried_again_at_once_keep_their_own_rows(child: Child, connection: Connection) -> None:
    """Not the row of another outcome of its run: as long as its own is there, there would be two of its key."""
    TRIED.clear()
    for task in (short, shaky):
        child.drainer._attempts.recent_s[task.name] = 0.001
    start(connection, side_by_side, "x")
    child.drain()
    assert (sorted(TRIED), state(connection)) == (["a", "a", "b", "b"], "completed")
    count = "SELECT count(DISTINCT seq) FROM orchestrator.history WHERE kind = 'attempted'"
    assert connection.execute(count).fetchone() == (1,), "both failures are in one turn"


@saga.define
async def only_shaky(thing: str) -> None:
    await saga.step(shaky, thing)


def test_outcomes_of_attempts_that_were_given_to_others_meanwhile_are_refused_without_a_fuss(
    new_child: Callable[..., Child], connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    TRIED.clear()
    late, heir = new_child(cache_runs=0), new_child()
    late.drainer._attempts.recent_s[shaky.name] = heir.drainer._attempts.recent_s[shaky.name] = 0.001

    def interrupt(taken: Any) -> None:
        raise KeyboardInterrupt

    def lose_the_lease(taken: Any) -> None:
        if len(late.runner.calls) == 2:
            liveness.declare_dead(connection, late.incarnation)
            liveness.give_back_dead(connection)
            heir.runner.before = interrupt
            with pytest.raises(KeyboardInterrupt):  # it has begun the next attempts
                heir.drain()
            late.reborn()

    late.runner.before = lose_the_lease
    for name in ("a", "b"):
        start(connection, only_shaky, name, run_id=name)
    late.drain()
    heir.runner.before = lambda taken: None
    heir.drain()
    assert (state(connection, "a"), state(connection, "b")) == ("completed", "completed")
    assert caplog.text.count("has lost its fence, its outcome is refused") == 2
    assert "could not be committed together" not in caplog.text


def test_nothing_that_is_begun_waits_behind_a_long_step(child: Child, connection: Connection) -> None:
    child.drainer._attempts.recent_s[short.name] = 0.001
    seen = begun_beside(child, connection, long.name)
    start(connection, slow, "x", run_id="x")
    start(connection, quick, "a", run_id="a")
    start(connection, quick, "b", run_id="b")
    child.drain()
    assert seen == [1]
    states = connection.execute("SELECT DISTINCT state FROM orchestrator.runs").fetchall()
    assert states == [("completed",)]


@saga.define
async def short_then_long(thing: str, many: int) -> None:
    await asyncio.gather(*(saga.step(short, f"{thing}{n}") for n in range(many)))
    await saga.step(long, thing)


@pytest.mark.parametrize("many", [1, 2])
def test_nothing_that_is_begun_after_other_work_waits_behind_a_long_step(
    new_child: Callable[..., Child],
    child: Child,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
    many: int,
) -> None:
    """Runs whose next step is long, and new ones whose first one is, in one wave."""
    other = new_child()
    other.targets.remove(short.name)
    for name in ("a", "b"):
        start(connection, short_then_long, name, many, run_id=name)
    other.drain()
    start(connection, slow, "c", run_id="c")
    start(connection, slow, "d", run_id="d")
    monkeypatch.setattr(child.drainer._attempts, "is_short", lambda task: task == short.name)
    seen = begun_beside(child, connection, long.name)
    child.drain()
    assert (seen, set(states(connection).values())) == ([1] * 4, {"completed"})


def test_a_wave_that_takes_long_all_the_same_is_committed_so_far(
    child: Child, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    child.drainer._attempts.recent_s[short.name] = 0.001
    monkeypatch.setattr(drain, "_LONGEST_WAVE_S", -1.0)
    recorded = "SELECT count(*) FROM orchestrator.journal WHERE entries::text LIKE '%%settled%%'"
    seen = []
    child.runner.before = lambda taken: seen.append((taken.run_id, connection.execute(recorded).fetchone()))
    for name in ("a", "b", "c"):
        start(connection, quick, name, run_id=name)
    assert child.drain() == 6
    assert [count for _, (count,) in seen] == list(range(6)), "each outcome before the next step is run"
    assert sorted(name for name, _ in seen) == ["a", "a", "b", "b", "c", "c"]
    assert {state(connection, name) for name in ("a", "b", "c")} == {"completed"}


def hang(child: Child, run_id: str, meanwhile: Callable[[], object]) -> None:
    """Let the first step of a run hang in this child: its alarm goes off, and the rest of the world goes on."""

    def before(taken: Any) -> None:
        if taken.run_id == run_id:
            child.runner.before = lambda taken: None
            hangs = child.runner.contexts[-1].hangs
            assert hangs is not None
            hangs()
            meanwhile()

    child.drainer._attempts.recent_s[short.name] = 0.001
    child.runner.before = before


def test_where_a_step_hangs_others_get_what_waits_with_it(
    child: Child, new_child: Callable[..., Child], connection: Connection
) -> None:
    other = new_child()
    seen: list[dict[str, str]] = []
    hang(child, "b", lambda: (other.drain(), seen.append(states(connection))))
    for name in ("a", "b", "c"):
        start(connection, quick, name, run_id=name)
    child.drain()
    assert seen == [{"a": "completed", "b": "running", "c": "completed"}]
    assert set(states(connection).values()) == {"completed"}
    ran = [*child.runner.calls, *other.runner.calls]
    assert len(ran) == 6 and {attempt for _, _, attempt in ran} == {1}, "each step once, as its first attempt"
    assert set(child.rings) == {QUEUE}


def test_what_its_run_has_given_up_meanwhile_is_withdrawn_where_it_is_left_to_others(
    child: Child, new_child: Callable[..., Child], connection: Connection
) -> None:
    other = new_child()

    def before(taken: Any) -> None:
        if taken.run_id == "a":
            child.runner.before = lambda taken: None
            arrivals.leave(connection, "b", encode(Cancel("ann")), anyone=True)
            other.drain()
            assert states(connection)["b"] == "compensating"
            hangs = child.runner.contexts[-1].hangs
            assert hangs is not None
            hangs()
            other.drain()

    child.drainer._attempts.recent_s[short.name] = 0.001
    child.runner.before = before
    for name in ("a", "b", "c"):
        start(connection, quick, name, run_id=name)
    child.drain()
    assert states(connection) == {"a": "completed", "b": "cancelled", "c": "completed"}
    assert len([*child.runner.calls, *other.runner.calls]) == 4, "no step of the run that was cancelled"


@pytest.mark.parametrize("happened", [True, False])
def test_what_was_left_to_others_and_not_answered_is_run_once(
    child: Child,
    new_child: Callable[..., Child],
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
    happened: bool,
) -> None:
    really, other = attempts.give_back, new_child()

    def unanswered(connection: Connection, items: Any) -> list[str]:
        if happened:
            really(connection, items)
        raise ConnectionError("the connection is lost")

    monkeypatch.setattr(attempts, "give_back", unanswered)
    hang(child, "b", other.drain)
    for name in ("a", "b", "c"):
        start(connection, quick, name, run_id=name)
    child.drain()
    assert set(states(connection).values()) == {"completed"}
    ran = [*child.runner.calls, *other.runner.calls]
    assert len(ran) == 6 and {attempt for _, _, attempt in ran} == {1}


def test_what_is_left_to_others_by_a_commit_that_was_given_up_is_run_once(
    child: Child, new_child: Callable[..., Child], connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child looked what it still had before that was committed, and ran what others came to have as well."""
    monkeypatch.setattr(session, "WORKER_PATIENCE_S", 0.3)
    connection.execute(
        """CREATE FUNCTION stall() RETURNS trigger LANGUAGE plpgsql AS $$
           BEGIN
               IF OLD.fence IS NOT NULL AND NEW.fence IS NULL THEN
                   PERFORM pg_advisory_xact_lock_shared(42);
               END IF;
               RETURN NULL;
           END $$;
           CREATE CONSTRAINT TRIGGER stall AFTER UPDATE ON orchestrator.work
           DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION stall();
           SELECT pg_advisory_lock(42)"""
    )
    other = new_child()
    hang(child, "b", lambda: None)
    for name in ("a", "b", "c"):
        start(connection, quick, name, run_id=name)
    thread = child.in_background()
    thread.join(1.5)
    connection.execute("SELECT pg_advisory_unlock(42)")
    other.drain()
    thread.join(20)
    other.drain()
    assert set(states(connection).values()) == {"completed"}
    ran = [(taken.run_id, taken.key) for taken in (*child.runner.contexts, *other.runner.contexts)]
    assert sorted(ran) == sorted({*ran}) and len(ran) == 6


def test_a_shared_commit_that_was_not_answered_makes_no_step_run_twice(
    new_child: Callable[..., Child], connection: Connection, proxy: Proxy
) -> None:
    child = new_child(dsn=proxy.url)
    start(connection, quick, "warm", run_id="warm")  # its statements are prepared before the fault
    start(connection, quick, "up", run_id="up")
    child.drain()
    child.drainer._attempts.recent_s[short.name] = 0.001
    ran: list[tuple[str, str]] = []

    def look(taken: Any) -> None:
        ran.append((taken.run_id, taken.key))
        if len(ran) == 3:  # the last of the first wave: what comes next is the commit of all three outcomes
            proxy.swallow(lambda data: b'[{"run":' in data)

    child.runner.before = look
    for name in ("a", "b", "c"):
        start(connection, quick, name, run_id=name)
    child.drain()
    assert proxy.swallowed == 1
    assert len(ran) == len(set(ran)) == 6
    ended = connection.execute("SELECT count(*) FROM orchestrator.runs WHERE state = 'completed'").fetchone()
    assert ended == (5,)
    late = connection.execute("SELECT count(*) FROM orchestrator.history WHERE kind = 'late'").fetchone()
    assert late == (0,)


def test_what_a_turn_of_several_outcomes_began_is_run_once_though_nobody_answered(
    new_child: Callable[..., Child], connection: Connection, proxy: Proxy
) -> None:
    """Each of the outcomes is found to be recorded, and each has led to the same next step."""
    child = new_child(dsn=proxy.url)
    for n in range(3):
        start(connection, three_then_one, "warm", run_id=f"warm {n}")
        child.drain()
        child.drainer._attempts.recent_s[short.name] = 0.001
    ran: list[str] = []

    def look(taken: Any) -> None:
        ran.append(taken.key)
        if len(ran) == 3:
            proxy.swallow(lambda data: b'[{"run":' in data)

    child.runner.before = look
    start(connection, three_then_one, "x")
    child.drain()
    assert proxy.swallowed == 1
    assert (len(ran), len(set(ran)), state(connection)) == (4, 4, "completed")


@saga.define
async def refilled(items: int) -> None:
    numbers = iter(range(items))

    async def work() -> None:
        for number in numbers:
            await saga.step(short, str(number))

    await asyncio.gather(*(work() for _ in range(10)))


@saga.define
async def wide(steps: int) -> None:
    await asyncio.gather(*(saga.step(short, str(number)) for number in range(steps)))
    await saga.wait_signal("go")


def rows(connection: Connection, run_id: str = "run") -> int:
    found = connection.execute("SELECT count(*) FROM orchestrator.journal WHERE run_id = %s", [run_id]).fetchone()
    assert found is not None
    return int(found[0])


def test_a_run_with_many_short_steps_under_way_goes_on_in_waves(child: Child, connection: Connection) -> None:
    child.drainer._attempts.recent_s[short.name] = 0.0001
    start(connection, refilled, 100)
    child.drain()
    assert state(connection) == "completed"
    assert rows(connection) < 30, "not a turn for each outcome, though each asks for the next step"


def test_outcomes_of_a_wave_that_another_process_was_quicker_than_are_left_together(
    new_child: Callable[..., Child], connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "_LONGEST_WAVE_S", 60.0)  # the other one works in the midst of a step
    one, two = new_child(), new_child()
    one.drainer._attempts.recent_s[short.name] = two.drainer._attempts.recent_s[short.name] = 0.0001

    def meanwhile(taken: Any) -> None:
        one.runner.before = lambda taken: None
        two.drain()

    one.runner.before = meanwhile
    start(connection, wide, 40)
    one.drain()
    connection.execute("UPDATE orchestrator.work SET reserved_at = NULL WHERE fence IS NULL")
    assert (len(one.runner.calls), len(two.runner.calls)) == (32, 8)
    assert (rows(connection), work(connection)) == (3, [])


def test_the_coroutines_that_are_kept_are_bounded_by_their_size_as_well(
    new_child: Callable[..., Child], connection: Connection
) -> None:
    child = new_child(cache_runs=10)
    for name in ("a", "b", "c"):
        start(connection, wide, 99, run_id=name)
        child.drain()
    assert child.drainer._session.advancer is not None
    assert [name in child.drainer._session.advancer._runs for name in ("a", "b", "c")] == [False, True, True]


def test_a_run_that_another_child_ended_is_kept_no_longer_than_one_that_lives(
    new_child: Callable[..., Child], connection: Connection
) -> None:
    one, two = new_child(cache_runs=10, drain_steps=1), new_child()
    start(connection, quick, "a", run_id="a")
    one.drain()
    two.drain()
    assert state(connection, "a") == "completed"
    assert one.drainer._session.advancer is not None
    known = one.drainer._session.advancer._runs
    kept = []
    for number in range(10):
        start(connection, slow, "b", run_id=f"b{number}")
        one.drain()
        kept.append("a" in known)
    assert kept == [True] * 9 + [False]
