"""Processes that die, stand still, or are told to go: worker, pool child, companion."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from celery import Celery

from tests.acceptance.running import until
from tests.faults.load import QUEUE
from tests.faults.rabbitmq import MissingProgram
from tests.faults.scene import BARE, LOADED, Scene
from tests.faults.steps import Stop


def test_workers_children_and_companions_are_killed_under_load(scene: Scene) -> None:
    first, second = scene.start_workers(2)
    load = scene.load(runs=77, ms=30)
    for count in (8, 16, 24):
        load.until_ended(count)
        scene.signal(scene.children(first)[0], signal.SIGKILL)
    load.until_ended(32)
    scene.signal(scene.companion(second), signal.SIGKILL)
    load.until_ended(40)
    scene.signal(first, signal.SIGKILL)
    first.launch()
    load.until_ended(50)
    scene.signal(second, signal.SIGKILL, whole=True)
    scene.judge(replace(LOADED, redispatches=1), load)


# -- that stand still for longer than their lease ----------------------------------------------------------------------
def test_what_a_worker_does_after_it_was_given_up_counts_for_nothing(scene: Scene) -> None:
    """Stopped before and after the effect, in ordinary and in transactional steps, for longer than the lease."""
    stopped, heir = scene.start_workers(2, "-c", "4")
    # One that holds rows is over when Postgres ends its transaction, after 4 s; the others have more time than that.
    kinds = [("linger", "before"), ("linger", "after"), ("pay", "before"), ("move", "after")]
    runs = [(f"{kind}-{where}", where) for kind, where in kinds]
    with scene.stopped(heir):  # so that all of them begin in the other one
        for number, (run, where) in enumerate(runs):
            accounts = {"source": 2 * number, "target": 2 * number + 1}
            scene.start(run, Stop(name="a", kind=run.partition("-")[0], how=[where, "ok"], **accounts))
            scene.until_at(run, where)
    with scene.stopped(stopped):
        for run, where in runs:
            scene.until_state(run, "completed")
            scene.let_go(run, where)
    for run in ("linger-before", "linger-after"):
        late = until(lambda run=run: scene.entries(run, "late"), f"the late result of {run} is on record")  # type: ignore[misc]
        assert [entry["attempt"] for entry in late] == [1]
    until(lambda: "has lost its fence, its transaction is rolled back" in stopped.said, "a transaction is rolled back")
    scene.judge(replace(BARE, fenced=2, redispatches=4))


def test_an_undo_is_not_overtaken_by_the_effect_that_it_undoes(scene: Scene) -> None:
    stopped, heir = scene.start_workers(2)
    with scene.stopped(heir):
        result = scene.start("late", Stop(name="a", kind="linger", how=["before"]))
        scene.until_at("late", "before")
    with scene.stopped(stopped):
        scene.office.order(result, "cancelled")
        until(lambda: scene.entries("late", "attempted"), "the attempt is given up", 30.0)
        waits = "SELECT due_at > orchestrator.now() + interval '2 s' FROM orchestrator.work WHERE role = 'undo'"
        assert until(lambda: scene.sql(waits), "the undo is asked for", 30.0) == [(True,)], "it waits for the deadline"
        assert scene.effects("late") == []
        scene.let_go("late", "before")
    scene.until_state("late", "cancelled")
    effects = scene.effects("late")
    assert effects[0] == "do 1" and set(effects[1:]) <= {"undo 1", "undo 2"} and len(effects) > 1
    scene.judge(replace(BARE, fenced=1, redispatches=1))


def test_a_charge_that_lands_after_its_refund_is_refunded_again_or_refused(scene: Scene) -> None:
    """Attempts that stand still for longer than their lease and their time, and then go on as if nothing had happened.

    Their runs are cancelled and undone meanwhile.  One run has ended by then, one is in the middle of its undo, and of
    the third the provider remembers that it was undone.
    """
    stopped, heir = scene.start_workers(2, "-c", "4")
    stops = {
        "ended": Stop(name="a", how=["deaf"]),
        "undoing": Stop(name="a", how=["deaf"], undo=["after", "ok"]),
        "remembered": Stop(name="a", how=["deaf"], remembered=True),
    }
    with scene.stopped(heir):
        results = {run: scene.start(run, stop) for run, stop in stops.items()}
        for run in stops:
            scene.until_at(run, "before")
    with scene.stopped(stopped):
        for result in results.values():
            scene.office.order(result, "cancelled")
        for run in ("ended", "remembered"):
            scene.until_state(run, "cancelled")
        scene.until_at("undoing", "after")
        assert [scene.effects(run) for run in stops] == [["undo 1"]] * 3
        for run in stops:
            scene.let_go(run, "before")
    for run in ("ended", "undoing"):
        late = until(lambda run=run: scene.entries(run, "late"), f"the late success of {run} is on record", 30.0)  # type: ignore[misc]
        assert [(entry["attempt"], entry["result"]) for entry in late] == [(1, "a")]
    scene.let_go("undoing", "after")
    correcting = "ended/late/tests.faults.steps.take#0/1"
    until(lambda: scene.effects(correcting), "a correcting run undoes it", 30.0)
    scene.until_state("undoing", "cancelled")
    scene.judge(replace(BARE, fenced=2, redispatches=3))
    assert scene.effects("ended") == ["undo 1", "do 1"]
    assert scene.effects(correcting)[0] == "undo 1"  # at least once: its attempt, too, may be taken back under load
    undoing = scene.effects("undoing")
    before, after = undoing[: undoing.index("do 1")], undoing[undoing.index("do 1") + 1 :]
    assert before and after and {*before, *after} <= {"undo 1", "undo 2", "undo 3"}, (
        "undone before it landed, and after"
    )
    assert scene.effects("remembered") == ["undo 1"] and scene.entries("remembered", "late") == []


# -- that are told to go -----------------------------------------------------------------------------------------------
# Nobody who only got no processor for a while is taken for dead, and what ends with a lease would be late.
LONG_LEASE = {"ORCHESTRATOR_LEASE": "15"}


def begun_by_the_dead(scene: Scene) -> int:
    query = """SELECT count(*) FROM orchestrator.work w JOIN orchestrator.incarnations i ON i.id = w.incarnation
        WHERE w.fence IS NOT NULL AND i.dead_at IS NOT NULL"""
    return int(scene.sql(query)[0][0])


def living(scene: Scene) -> set[str]:
    return {row[0] for row in scene.sql("SELECT node FROM orchestrator.incarnations WHERE dead_at IS NULL")}


def attempts_lost(scene: Scene) -> list[tuple[str, dict[str, object]]]:
    query = """SELECT run_id, entry FROM orchestrator.history WHERE kind = 'attempted'
        AND entry -> 'error' ->> 'type' IN ('WorkerLost', 'LeaseLost', 'AttemptExpired')"""
    return [(run_id, entry) for run_id, entry in scene.sql(query)]


def test_shutdowns_burn_no_attempt_and_leave_no_lease(scene: Scene) -> None:
    """Warm, soft, and told twice, one after the other while the load goes on."""
    scene.start_workers(1, **LONG_LEASE)
    going = scene.start_workers(3, FAULTS_SOFT="5", **LONG_LEASE)
    load = scene.load(runs=77, ms=30)
    for number, (worker, how) in enumerate(
        zip(going, ([signal.SIGTERM], [signal.SIGQUIT], [signal.SIGTERM, signal.SIGTERM]), strict=True)
    ):
        load.until_ended(8 + 12 * number)
        for each in how:
            scene.signal(worker, each)
        scene.until_gone(worker)
        gone_at = scene.sql("SELECT clock_timestamp()")[0][0]
        node = f"w{2 + number}@faults"
        until(lambda node=node: node not in living(scene), "its lease is given back", 5.0)  # type: ignore[misc]
        ((given_back_at,),) = scene.sql("SELECT dead_at FROM orchestrator.incarnations WHERE node = %s", node)
        assert (given_back_at - gone_at).total_seconds() < 1.0
        assert begun_by_the_dead(scene) == 0
    scene.judge(LOADED, load)
    assert attempts_lost(scene) == []


@pytest.mark.parametrize("how", ["SIGQUIT", "remote control"])
def test_a_worker_begins_no_step_after_it_was_told_to_stop_in_whatever_way(scene: Scene, how: str) -> None:
    """Its drain would go on for a minute, and what is under way at the end of a soft shutdown is interrupted."""
    (worker,) = scene.start_workers(1, FAULTS_SOFT="1.5", ORCHESTRATOR_DRAIN_SECONDS="60")
    scene.start("long", *(Stop(name=str(number), kind="look", ms=200) for number in range(50)))
    until(lambda: scene.effects("long"), "it is on its way")
    if how == "SIGQUIT":
        scene.signal(worker, signal.SIGQUIT)
    else:
        with Celery("tells", broker=scene.broker_url, set_as_current=False) as app:
            app.control.shutdown(destination=["w1@faults"])
        scene.fault("told to shut down")
    assert worker.process is not None
    worker.process.wait(60.0)
    assert scene.entries("long", "attempted") == []
    assert len(scene.effects("long")) < 25
    worker.start()
    scene.judge(BARE)


# -- steps that kill ---------------------------------------------------------------------------------------------------
def test_a_step_that_always_kills_its_worker_comes_to_an_end(scene: Scene) -> None:
    worker = scene.worker().start()
    scene.start("murder", Stop(name="a", kind="insist"), Stop(name="x", how=["murder"]))
    for _ in range(3):
        until(lambda: not worker.is_alive, "the step has killed its worker", 60.0)
        scene.fault("SIGKILL by a step")
        worker.start()
    scene.until_state("murder", "compensated", within_s=60.0)
    assert scene.effects("murder") == ["do 1"] * 2 + ["do 2", "do 3", "undo 1", "undo 1"]
    scene.judge(replace(BARE, redispatches=3))


def test_memory_that_runs_out_costs_an_attempt(scene: Scene) -> None:
    """As an error where a limit is set, as a SIGKILL where none is (by the kernel itself in the next test)."""
    scene.worker().start()
    scene.start("limit", Stop(name="a", kind="insist", how=["eat", "ok"]))
    scene.start("killed", Stop(name="a", kind="insist", how=["die", "ok"]))
    scene.start("in a transaction", Stop(name="b", kind="move", how=["die", "ok"]))
    for run in ("limit", "killed", "in a transaction"):
        scene.until_state(run, "completed")
        scene.fault("out of memory")
    assert [entry["error"]["type"] for entry in scene.entries("limit", "attempted")] == ["MemoryError"]
    scene.judge(replace(BARE, redispatches=2))


@contextmanager
def little_memory(name: str, megabytes: int) -> Iterator[Path]:
    """A group of processes with a limit by the kernel (cgroup v2, or v1); only root may make one."""
    unified, legacy = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
    first = not (legacy / "memory.limit_in_bytes").exists()
    group = (unified if first else legacy) / name
    try:
        group.mkdir()
        (group / ("memory.max" if first else "memory.limit_in_bytes")).write_text(str(megabytes << 20))
    except OSError as error:
        raise MissingProgram(f"This test needs to be root on Linux with a memory controller: {error}") from None
    try:
        yield group
    finally:
        until(lambda: not (group / "cgroup.procs").read_text(), "nobody is left in the group", 30.0)
        group.rmdir()


def killed_for_memory(group: Path) -> int:
    """Return how many processes of a group the kernel has killed for want of memory."""
    events = group / "memory.events"
    told = (events if events.exists() else group / "memory.oom_control").read_text()
    return int(dict(line.split() for line in told.splitlines())["oom_kill"])


@pytest.mark.long
def test_a_pool_child_that_the_kernel_kills_for_want_of_memory_costs_an_attempt(scene: Scene) -> None:
    scene.worker().start()
    scene.start("hog", Stop(name="a", kind="insist", how=["hog", "ok"]), Stop(name="b", kind="move"))
    with little_memory(f"orchestrator-{os.getpid()}", 64) as group:
        (group / "cgroup.procs").write_text(str(scene.until_at("hog", "before")))
        scene.let_go("hog", "before")
        scene.until_state("hog", "completed")
        scene.fault("killed by the kernel", killed_for_memory(group))
    assert [entry["error"]["type"] for entry in scene.entries("hog", "attempted")] == ["WorkerLost"]
    scene.judge(replace(BARE, redispatches=1))


# -- messages that go with a process -----------------------------------------------------------------------------------
def pushes(broker: redis.Redis) -> int:
    """Return how many messages Valkey was ever given."""
    return int(broker.info("commandstats").get("cmdstat_lpush", {"calls": 0})["calls"])


def test_a_message_that_a_dead_worker_had_in_hand_is_not_missed(scene: Scene) -> None:
    """Valkey hands a message to whoever waits for it, be it one that stands still; with that one killed it is gone."""
    doomed = scene.worker().start()
    with redis.Redis.from_url(scene.broker_url) as broker:
        for number in range(20):  # a BRPOP waits for a second: the message may come just after one has ended
            # Who still looks for more work is not rung for.
            until(lambda: not scene.sql("SELECT FROM orchestrator.drainers"), "nobody drains")
            before = pushes(broker)
            scene.signal(doomed, signal.SIGSTOP, whole=True)
            scene.start(missed := f"missed {number}", Stop(name="a"))
            handed_out = pushes(broker) > before and not broker.llen(QUEUE) and not broker.hlen("unacked")
            if handed_out and scene.state(missed) == "pending":
                break
            scene.signal(doomed, signal.SIGCONT, whole=True)
            scene.until_state(missed, "completed")
        else:
            pytest.fail("no message was handed out to who cannot read it")
        scene.signal(doomed, signal.SIGKILL, whole=True)
        assert (scene.state(missed), broker.llen(QUEUE), broker.hlen("unacked")) == ("pending", 0, 0), "it is gone"
    scene.worker().start()
    scene.until_state(missed, "completed")
    scene.judge(BARE)


def test_a_step_that_hangs_keeps_nobody_waiting_who_was_begun_with_it(scene: Scene) -> None:
    """It used to be short, so that it shared a commit with those of other runs."""
    (worker,) = scene.start_workers(1)
    for number in range(40):
        scene.start(f"short {number}", Stop(name="a", kind="linger"))
    for number in range(40):
        scene.until_state(f"short {number}", "completed")
    with scene.stopped(worker):
        for number in range(24):
            how = ["before", "ok"] if number == 3 else ["ok"]
            scene.start(f"beside {number}", Stop(name="a", kind="linger", how=how), Stop(name="b", kind="linger"))
    scene.until_at("beside 3", "before")
    for number in range(24):
        if number != 3:
            scene.until_state(f"beside {number}", "completed")
    hanging = "SELECT key, attempt FROM orchestrator.work WHERE run_id = 'beside 3' AND fence IS NOT NULL"
    assert scene.sql(hanging) == [("tests.faults.steps.linger#0", 1)], "it hangs all the time"
    assert "are left to others" in worker.log.read_text()
    scene.let_go("beside 3", "before")
    scene.until_state("beside 3", "completed")
    scene.judge(BARE)
