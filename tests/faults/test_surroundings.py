"""Clocks that are wrong or jump, and disks that are full."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from tests.acceptance.running import ROOT, until
from tests.faults.rabbitmq import MissingProgram, RabbitMQ
from tests.faults.scene import LOADED, Scene
from tests.faults.servers import Servers
from tests.faults.test_processes import LONG_LEASE, attempts_lost

_LIBRARIES = "/usr/lib/*/faketime/libfaketime.so.1"


def faketime() -> str:
    """Return the library that lies about the time of day."""
    library = next(Path("/").glob(_LIBRARIES.lstrip("/")), None)
    if library is None:
        raise MissingProgram("This test needs libfaketime, which is not installed here: apt-get install -y faketime")
    return str(library)


# With the monotonic clock left alone, libfaketime 0.9.10 fails every sleep: it takes its end for a time of day.
_SLEEP = """
import select
import time

time.sleep = lambda seconds: select.select([], [], [], seconds) and None
"""


class WallClock:
    """The wall clock of processes, which a test may set while they run; their monotonic clock goes on as it does."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self.set(0)
        (folder / "sitecustomize.py").write_text(_SLEEP)
        self.environment = {
            "LD_PRELOAD": faketime(),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        }

    def set(self, seconds: int) -> None:
        """Let it be so many seconds off from now on."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.replace(self._file)


@pytest.mark.debian
def test_wall_clocks_that_are_hours_off_are_no_matter(scene: Scene) -> None:
    """One worker lives an hour ahead and one an hour behind, and then, started again, it is the other way round."""
    workers = [scene.worker(LD_PRELOAD=faketime()) for _ in range(2)]
    load = scene.load(runs=44)
    for count, offsets in ((15, ("+3600", "-3600")), (44, ("-7200", "+7200"))):
        for worker, offset in zip(workers, offsets, strict=True):
            if worker.is_alive:
                scene.signal(worker, signal.SIGKILL)
            worker.launch(FAKETIME=offset)
            scene.fault("clock off")
        load.until_ended(count)
    scene.judge(LOADED, load)


@pytest.mark.debian
def test_wall_clocks_that_jump_under_running_workers_cost_nothing(scene: Scene, tmp_path: Path) -> None:
    """There and back by hours, with all processes of a worker: nobody is declared dead, and no attempt is lost."""
    clock = WallClock(tmp_path)
    scene.worker(**LONG_LEASE).start(**clock.environment)
    scene.worker(**LONG_LEASE).start()
    load = scene.load(runs=66, ms=30)
    for number, seconds in enumerate((3600, -3600, 86_400, -7200, 0)):
        load.until_ended(10 + 10 * number)
        clock.set(seconds)
        scene.fault("clock jumped")
    scene.judge(LOADED, load)
    assert attempts_lost(scene) == []
    assert scene.sql("SELECT count(*) FROM orchestrator.incarnations WHERE dead_at IS NOT NULL") == [(0,)]


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A disk in memory; only root may make one."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "tmpfs", str(folder)],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode != 0:
        raise MissingProgram(f"This test needs to be root, to mount a small disk: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(folder: Path, leave: int = 0) -> Path:
    """Fill a disk, but for so many bytes."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while shutil.disk_usage(folder).free > leave or not leave:
            file.write(b"\0" * 65536)
    return filler


@pytest.mark.long
@pytest.mark.parametrize("times", [3])
def test_disks_that_are_full_lose_no_run(tmp_path: Path, times: int) -> None:
    """The data directory and the broker's folder on a disk that fills up; Postgres is started again if it gave up."""
    with small_disk(tmp_path / "disk", 220) as disk:
        servers = Servers(disk / "servers")
        folder = tmp_path / "scene"
        folder.mkdir()
        scene = Scene(servers.url_of(servers.new_database()), servers.broker_url(1), folder)
        try:
            scene.start_workers(2)
            load = scene.load(runs=110, ms=30)
            for number in range(times):
                load.until_ended(10 + 25 * number, within_s=180.0)
                filler = _fill(disk)
                scene.fault("disk full")
                refused = scene.office.refusals
                with pytest.raises(psycopg.Error):  # so full that whoever needs a new page is told, or Postgres ends
                    scene.sql("CREATE TABLE more AS SELECT repeat('x', 1000) FROM generate_series(1, 300000)")
                with contextlib.suppress(AssertionError):  # with room left in the log all may still go well
                    until(lambda refused=refused: scene.office.refusals > refused, "a start is refused", 4.0)  # type: ignore[misc]
                filler.unlink()
                _revive(servers)
            scene.judge(LOADED, load, within_s=180.0)
        finally:
            scene.close()
            servers.stop()


def _is_alarmed(broker: RabbitMQ) -> bool:
    return broker.said.rfind("disk resource limit alarm set") > broker.said.rfind("disk resource limit alarm cleared")


@pytest.mark.long
@pytest.mark.debian
def test_a_rabbitmq_on_a_full_disk_loses_no_run(new_scene: Callable[..., Scene], tmp_path: Path) -> None:
    """First so full that it takes no messages, then to the last byte; it is started again if it gave up.

    Doorbells are published with confirmation: what is not confirmed must not be waited for.
    """
    with small_disk(tmp_path / "disk", 150) as disk:
        broker = RabbitMQ(disk / "rabbitmq")
        try:
            scene = new_scene(broker.new_url())
            scene.start_workers(2, FAULTS_CONFIRM="1")
            load = scene.load(runs=110, ms=30)
            for number, room in enumerate((30 << 20, 0, 30 << 20, 0)):
                load.until_ended(10 + 20 * number, within_s=180.0)
                filler = _fill(disk, leave=room)
                scene.fault("disk full")
                if room:  # it looks every few seconds, and then takes no message from anybody
                    until(lambda: _is_alarmed(broker), "it has seen it", 60.0)
                load.until_ended(20 + 20 * number, within_s=180.0)
                filler.unlink()
                if not broker.answers():
                    broker.restart()
            scene.judge(LOADED, load, within_s=180.0)
        finally:
            broker.stop()


def _revive(servers: Servers) -> None:
    try:
        psycopg.connect(servers.postgres_url, connect_timeout=5).close()
    except psycopg.OperationalError:
        with contextlib.suppress(ProcessLookupError, OSError):
            servers.stop_postgres()
        servers.start_postgres()
