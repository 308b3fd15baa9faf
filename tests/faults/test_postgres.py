"""A Postgres that crashes, goes away, ends connections, or loses its answers."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from dataclasses import replace

import psycopg
import pytest

from tests.acceptance.running import until
from tests.faults.scene import BARE, LOADED, Scene
from tests.faults.servers import Servers
from tests.faults.steps import Stop


def _restart(scene: Scene, servers: Servers, *, times: int, runs: int) -> None:
    workers = scene.start_workers(2)
    load = scene.load(runs=runs, ms=30)
    for number in range(times):
        load.until_ended(number * runs // (times + 1), within_s=180.0)
        servers.restart_postgres()
        scene.fault("Postgres crashed")
    scene.judge(LOADED, load, within_s=180.0)
    assert all(worker.is_alive for worker in workers)


def test_a_postgres_that_crashes_under_load_loses_no_run(scene: Scene, own_servers: Servers) -> None:
    _restart(scene, own_servers, times=4, runs=66)


@pytest.mark.long
def test_a_postgres_that_crashes_thirty_times_under_load(scene: Scene, own_servers: Servers) -> None:
    _restart(scene, own_servers, times=30, runs=600)


def test_a_postgres_that_is_away_for_longer_than_a_lease_takes_nothing_from_anybody(
    scene: Scene, own_servers: Servers
) -> None:
    """Steps run, on two workers, while the database is away for two leases: none of their attempts is lost."""
    scene.start_workers(2, "-c", "3")
    runs = [f"held-{number}" for number in range(6)]
    for run in runs:
        scene.start(run, Stop(name="a", kind="linger", how=["before"]), Stop(name="b", kind="look"))
    for run in runs:
        scene.until_at(run, "before", within_s=60.0)
    own_servers.stop_postgres()
    scene.fault("Postgres away")
    away_until = time.monotonic() + 4.5
    until(lambda: time.monotonic() > away_until, "two leases have passed")
    for run in runs:
        scene.let_go(run, "before")
    own_servers.start_postgres()
    for run in runs:
        scene.until_state(run, "completed")
        assert scene.effects(run) == ["do 1", "do 1"]
        assert scene.entries(run, "attempted") == []
    scene.judge(BARE)


def test_backends_that_are_terminated_under_load_lose_no_run(scene: Scene) -> None:
    scene.start_workers(2)
    load = scene.load(runs=66, ms=20)
    end_all = """SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()"""
    for count in range(4, 60, 7):
        load.until_ended(count)
        scene.fault("backend terminated", scene.sql(end_all)[0][0])
    scene.judge(LOADED, load)


def test_answers_that_are_lost_after_a_commit_make_nothing_happen_twice(scene: Scene) -> None:
    """Of everything that is asked, commits included, one in forty is done and its answer never comes."""
    dice = random.Random(7)
    scene.start_workers(2, proxied=True)
    load = scene.load(runs=66, office=scene.proxied_office())
    load.until_ended(3)
    scene.database.swallow(lambda data: dice.random() < 1 / 40, times=60)
    load.until_ended(55, within_s=120.0)
    scene.fault("answer lost", scene.database.swallowed)
    scene.database.restore()
    scene.judge(LOADED, load)


def test_a_way_to_postgres_that_breaks_hangs_and_is_slow_loses_no_run(scene: Scene) -> None:
    scene.start_workers(2, proxied=True)
    load = scene.load(runs=66, office=scene.proxied_office())
    for count in (5, 15, 25):
        load.until_ended(count)
        scene.fault("connections reset", scene.database.reset())
    scene.database.delay(0.02)
    scene.fault("answers delayed")
    load.until_ended(35)
    scene.database.hang()
    scene.fault("Postgres half-open")
    hangs_until = time.monotonic() + 4.0
    until(lambda: time.monotonic() > hangs_until, "it hung for two leases")
    scene.database.restore()
    scene.judge(LOADED, load)


def test_a_pump_that_is_interrupted_in_its_sweep_is_no_matter(scene: Scene, own_servers: Servers) -> None:
    """A worker dies with many attempts under way, and Postgres crashes in the middle of giving them back.

    The turns that the sweep has to make due are held up by who makes them due at the same time.
    """
    doomed, _ = scene.start_workers(2, "-c", "4")
    for number in range(8):
        scene.start(f"swept-{number}", Stop(name="a", kind="linger", how=["before", "ok"]))
    at = [scene.until_at(f"swept-{number}", "before", within_s=60.0) for number in range(8)]
    assert len(set(at)) == 8
    begun = "SELECT count(*) FROM orchestrator.work WHERE fence IS NOT NULL"
    with contextlib.suppress(psycopg.OperationalError), psycopg.connect(scene.database_url) as held_up:
        held_up.execute(
            "INSERT INTO orchestrator.work (run_id, key, role, target, queue, due_at) "
            "SELECT id, '', 'turn', '*', queue, orchestrator.now() FROM orchestrator.runs"
        )
        scene.signal(doomed, signal.SIGKILL, whole=True)
        sweeps = """SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
            AND wait_event_type = 'Lock' AND query LIKE '%%INSERT INTO orchestrator.work AS w%%'"""
        until(lambda: scene.sql(sweeps)[0][0], "a pump is in the middle of its sweep", 30.0)
        assert scene.sql(begun) == [(8,)]
        own_servers.restart_postgres()
        scene.fault("Postgres crashed")
    for number in range(8):
        scene.let_go(f"swept-{number}", "before")
    scene.judge(replace(BARE, redispatches=4))
