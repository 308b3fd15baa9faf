"""The rehearsal of a restore: Postgres is set back to a moment in the past, the broker and the world outside are not.

Base backup and write-ahead log are those of a real server.  What the runs did after that moment stands in the effect
log alone; probes are answered from it, and so are the questions that a person is asked.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest
from celery import Celery
from kombu import Connection as BrokerConnection

from orchestrator.celery.doorbell import Bell
from orchestrator.engine import restore as engine
from orchestrator.errors import UsageError
from orchestrator.machine import restore
from orchestrator.store import restores
from orchestrator.store.connection import open_connection
from tests.acceptance.running import ROOT, until
from tests.faults.conftest import new_valkey_url
from tests.faults.load import QUEUE
from tests.faults.rabbitmq import RabbitMQ
from tests.faults.scene import BARE, Scene
from tests.faults.servers import Servers
from tests.faults.steps import Stop
from tests.proof import effects

KNOWN = [f"known-{number}" for number in range(8)]
LATER = [f"later-{number}" for number in range(3)]
POSTED = [f"posted-{number}" for number in range(3)]
LEFT = [f"left-{number}" for number in range(12)]
BEAT_STOPS = [Stop(name="s", kind="wire"), Stop(name="t", kind="insist")]


class Restorable(Servers):
    """Servers whose Postgres can be set back to a named moment after its base backup."""

    def back_up(self) -> None:
        """Take a base backup; from now on the write-ahead log is kept."""
        with psycopg.connect(self.postgres_url, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET wal_keep_size = '1GB'")
            connection.execute("SELECT pg_reload_conf()")
        command = [self._programs.postgres_bin / "pg_basebackup", "-D", self._backup, "-c", "fast", "-X", "none"]
        subprocess.run([*command, "-d", self.postgres_url], check=True, capture_output=True)

    def mark(self, name: str) -> None:
        """Name this moment."""
        with psycopg.connect(self.postgres_url, autocommit=True) as connection:
            connection.execute("SELECT pg_create_restore_point(%s)", [name])

    def restore_to(self, name: str) -> None:
        """Crash Postgres, and let it come back as it was at that moment."""
        self.stop_postgres()
        data, lost = self._place.postgres, self._place.postgres.with_name("lost")
        data.rename(lost)
        self._backup.rename(data)
        with (data / "postgresql.auto.conf").open("a") as file:
            file.write(f"restore_command = 'cp {lost}/pg_wal/%f %p'\n")
            file.write(f"recovery_target_name = '{name}'\nrecovery_target_action = 'promote'\n")
        (data / "recovery.signal").touch()
        owner = lost.stat()
        for path in (data, *data.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
        self.start_postgres()
        until(self._is_promoted, "the recovery has ended", 60.0)
        shutil.rmtree(lost)

    def _is_promoted(self) -> bool:
        with psycopg.connect(self.postgres_url) as connection:
            row = connection.execute("SELECT NOT pg_is_in_recovery()").fetchone()
        return bool(row and row[0])

    @property
    def _backup(self) -> Path:
        return self._place.root / "backup"


@pytest.fixture
def restorable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restorable]:
    servers = Restorable(tmp_path_factory.mktemp("restorable"))
    yield servers
    servers.stop()


@pytest.fixture
def town(restorable: Restorable, tmp_path: Path) -> Iterator[Scene]:
    """A scene on servers of its own, backed up before anything happens."""
    scene = Scene(restorable.url_of(restorable.new_database()), new_valkey_url(restorable), tmp_path)
    restorable.back_up()
    yield scene
    scene.close()


@pytest.fixture
def town_of_rabbits(restorable: Restorable, rabbitmq: RabbitMQ, tmp_path: Path) -> Iterator[Scene]:
    """The same with RabbitMQ."""
    scene = Scene(restorable.url_of(restorable.new_database()), rabbitmq.new_url(), tmp_path)
    restorable.back_up()
    yield scene
    scene.close()


def doctor(scene: Scene, *options: str) -> tuple[int, Any]:
    """Ask the doctor; returns the exit code and what it told, as text if it refused."""
    command = [sys.executable, "-m", "celery", "-A", "tests.faults.app", "saga", "doctor", "--json", *options]
    environment = {**os.environ, **scene.environment(proxied=False), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


def done_by(scene: Scene) -> Counter[tuple[str, str]]:
    """Return how often each step of each run had its effect, but for those that only look."""
    log = effects.read(scene.effect_log, growing=True)
    return Counter((e.run, e.key) for e in log if e.event == "effect" and e.direction == "do" and "look" not in e.key)


def start(scene: Scene, run_ids: list[str]) -> None:
    """Start trips to people who can be asked, who cannot, and who refuse, so that the trip goes back."""
    for number, run_id in enumerate(run_ids):
        stops = [Stop(name="a", kind="wire", ms=150), Stop(name="b", kind="look"), Stop(name="c", kind="move", ms=50)]
        stops += [Stop(name="d", kind="insist", ms=150), Stop(name="e", kind="wire", ms=150)]
        if number % 4 == 3:
            stops[3] = Stop(name="x", kind="wire", how=["reject"])
        scene.start(run_id, *stops)


def clerk(scene: Scene) -> None:
    """Answer for whatever waits for a person, as the statements from outside tell."""
    parked = scene.sql("SELECT id, parked FROM orchestrator.runs WHERE state = 'parked'")
    for run_id, items in parked:
        for item in items:
            assert item["why"] == restore.WHY, item
            done = done_by(scene)[run_id, item["key"]]
            with suppress(UsageError):  # the order before this one has been taken meanwhile, and the run has ended
                if done:
                    scene.office.client.operate(run_id, "resolve", item["key"], by="ann", value="d")
                else:
                    scene.office.client.operate(run_id, "retry", item["key"], by="ann")
    time.sleep(0.1)


@pytest.mark.timeout(300)
def test_a_restore_to_a_moment_in_the_past_doubles_no_effect_of_a_run_of_that_moment(
    town: Scene, restorable: Restorable
) -> None:
    workers = town.start_workers(2)
    start(town, KNOWN)
    until(lambda: done_by(town).total() >= 8, "some of it is done", 60.0)
    restorable.mark("noon")
    at_noon = done_by(town).total()
    start(town, LATER)
    until(lambda: done_by(town).total() >= at_noon + 9, "more is done after that moment", 60.0)
    refused = pytest.raises(UsageError, match="workers run on this database")
    with open_connection(town.database_url, name="test") as connection, refused:
        engine.look_after(connection, "ann", always=True)
    for worker in workers:
        town.signal(worker, signal.SIGKILL, whole=True)
    before = done_by(town)
    assert any(run_id in LATER for run_id, _ in before), "a run is lost that had effects"

    restorable.restore_to("noon")
    town.fault("Postgres restored to the past")
    assert {run_id for (run_id,) in town.sql("SELECT id FROM orchestrator.runs")} == set(KNOWN)
    with open_connection(town.database_url, name="test") as connection:
        assert restores.lineage(connection).is_broken
        ahead = engine.look_ahead(connection).found
    code, told = doctor(town, "--after-restore", "--by", "ann")
    assert told == {"dry_run": False, "needed": True, **ahead}
    fates = {item["fate"] for item in told["listed"]}
    assert told["runs"] > 0 and fates and code == ("parked" in fates)
    with open_connection(town.database_url, name="test") as connection:
        assert not restores.lineage(connection).is_broken
        assert not engine.look_after(connection, "ann").needed, "told twice it does nothing"

    start(town, LATER)  # whoever started them does not know of them, and starts them again
    town.start_workers(2)
    town.judge(BARE, meanwhile=lambda: clerk(town), within_s=150.0)
    doubled = {run_id for (run_id, _), times in done_by(town).items() if times > 1}
    assert doubled <= set(LATER)
    assert done_by(town).keys() >= before.keys()
    assert {town.state(run_id) for run_id in KNOWN} == {"completed", "compensated"}


# -- what the broker kept, and beat ------------------------------------------------------------------------------------
@contextmanager
def beat(scene: Scene) -> Iterator[subprocess.Popen[bytes]]:
    """A beat with a slot every second, each of which is made up for if nobody was there; killed at the end."""
    stops = json.dumps([stop.model_dump() for stop in BEAT_STOPS])
    schedule = {"FAULTS_BEAT_S": "1", "FAULTS_BEAT_STOPS": stops, "FAULTS_BEAT_CATCH_UP": "all"}
    environment = {**os.environ, **scene.environment(proxied=False), **schedule, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "celery", "-A", "tests.faults.app", "beat", "--pidfile", ""]
    with (scene.folder / "beat.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait(10.0)


def post(scene: Scene, run_ids: list[str]) -> None:
    """Start trips by message, as a service in any language does: nothing is in the database yet."""
    stops = [Stop(name="p", kind="wire").model_dump(), Stop(name="q", kind="insist").model_dump()]
    with Celery(broker=scene.broker_url, set_as_current=False) as app:
        app.conf.broker_transport_options = {"confirm_publish": True}
        for run_id in run_ids:
            app.send_task("faults.trip", args=[stops], task_id=run_id, queue=QUEUE)


def held(scene: Scene) -> int:
    """Return how many messages the broker has for nobody yet."""
    with BrokerConnection(scene.broker_url) as connection:
        return int(connection.default_channel.queue_declare(QUEUE, passive=True).message_count)


def slots(scene: Scene) -> list[Any]:
    rows = scene.sql("SELECT slot FROM orchestrator.slots WHERE schedule = 'often' AND state = 'started' ORDER BY slot")
    return [slot for (slot,) in rows]


@pytest.mark.long
@pytest.mark.debian
@pytest.mark.timeout(400)
def test_after_a_restore_neither_old_messages_nor_the_slots_of_beat_double_an_effect(
    town_of_rabbits: Scene, restorable: Restorable
) -> None:
    """RabbitMQ keeps doorbells, and messages that start runs, from the time that Postgres has forgotten."""
    town = town_of_rabbits
    workers = town.start_workers(2)
    with beat(town):
        until(lambda: len(slots(town)) >= 2, "beat fires", 60.0)
        start(town, KNOWN)
        until(lambda: len({run_id for run_id, _ in done_by(town)} & {*KNOWN}) >= 4, "some of it is done", 60.0)
        restorable.mark("noon")
        noon = slots(town)[-1]
        start(town, LATER)
        post(town, POSTED)
        until(lambda: {run_id for run_id, _ in done_by(town)} >= {*LATER, *POSTED}, "more is done", 60.0)
        until(lambda: len([slot for slot in slots(town) if slot > noon]) >= 3, "slots after that moment", 60.0)
        for worker in workers:
            town.signal(worker, signal.SIGSTOP, whole=True)
    post(town, LEFT)
    bell = Bell(
        {"hostname": town.broker_url, "ssl": False, "transport_options": {}, "heartbeat": 0}, timedelta(hours=1)
    )
    assert bell.ring(QUEUE, 20)
    bell.close()
    for worker in workers:
        town.signal(worker, signal.SIGKILL, whole=True)
    until(lambda: held(town) >= len(LEFT) + 20, "what dead workers had taken is back", 60.0)
    before = done_by(town)

    restorable.restore_to("noon")
    town.fault("Postgres restored to the past")
    assert slots(town)[-1] <= noon and not {*LATER, *POSTED} & {
        run for (run,) in town.sql("SELECT id FROM orchestrator.runs")
    }
    code, told = doctor(town)
    assert code == 2 and "restored" in {each["code"] for each in told["findings"]}
    code, told = doctor(town, "--after-restore", "--by", "ann")
    assert told["runs"] > 0 and code == ("parked" in {item["fate"] for item in told["listed"]})

    start(town, LATER)
    post(town, POSTED)  # who sent them was told of no end, and sends them again
    town.start_workers(2)
    now = town.sql("SELECT clock_timestamp()")[0][0]
    with beat(town):
        until(lambda: slots(town)[-1] > now, "beat has caught up", 60.0)
    town.judge(BARE, meanwhile=lambda: clerk(town), within_s=200.0)
    until(lambda: held(town) == 0, "the broker is empty", 30.0)
    doubled = {run_id for (run_id, _), times in done_by(town).items() if times > 1}
    assert doubled <= {*LATER, *POSTED}
    assert done_by(town).keys() >= before.keys()
    assert {town.state(run_id) for run_id in (*POSTED, *LEFT)} == {"completed"}
    assert {later - earlier for earlier, later in pairwise(slots(town))} == {timedelta(seconds=1)}
