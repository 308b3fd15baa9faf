"""Clocks that are wrong, and disks that are full."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.acceptance.running import until
from tests.faults.rabbitmq import MissingProgram
from tests.faults.scene import LOADED, Scene
from tests.faults.servers import Servers

_LIBRARIES = "/usr/lib/*/faketime/libfaketime.so.1"


@pytest.mark.debian
def test_wall_clocks_that_are_an_hour_off_and_jump_are_no_matter(scene: Scene) -> None:
    """One worker lives an hour ahead and one an hour behind, and then it is the other way round.

    They jump by being started again: what moves under a running process here is its monotonic clock as well.
    """
    library = next(Path("/").glob(_LIBRARIES.lstrip("/")), None)
    if library is None:
        raise MissingProgram("This test needs libfaketime, which is not installed here: apt-get install -y faketime")
    workers = [scene.worker(LD_PRELOAD=str(library)) for _ in range(2)]
    load = scene.load(runs=44)
    for count, offsets in ((15, ("+3600", "-3600")), (44, ("-7200", "+7200"))):
        for worker, offset in zip(workers, offsets, strict=True):
            if worker.is_alive:
                scene.signal(worker, signal.SIGKILL)
            worker.launch(FAKETIME=offset)
            scene.fault("clock off")
        load.until_ended(count)
    scene.judge(LOADED, load)


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


def _fill(folder: Path) -> Path:
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
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
                with contextlib.suppress(AssertionError):  # with room left in the log all may still go well
                    until(lambda refused=refused: scene.office.refusals > refused, "a start is refused", 4.0)  # type: ignore[misc]
                filler.unlink()
                _revive(servers)
            scene.judge(LOADED, load, within_s=180.0)
        finally:
            scene.close()
            servers.stop()


def _revive(servers: Servers) -> None:
    try:
        psycopg.connect(servers.postgres_url, connect_timeout=5).close()
    except psycopg.OperationalError:
        with contextlib.suppress(ProcessLookupError, OSError):
            servers.stop_postgres()
        servers.start_postgres()
