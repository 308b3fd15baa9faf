"""Failpoints are armed by the environment alone, act once, and cost next to nothing when they are not armed."""

from __future__ import annotations

import os
import subprocess
import sys
import timeit
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from orchestrator.failpoints import EXIT_CODE, FIRED, VARIABLE, arm, failpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm({})


def test_nothing_happens_unless_it_is_armed() -> None:
    failpoint("x")
    arm({VARIABLE: "y=raise"})
    failpoint("x")


def test_it_acts_at_the_hit_that_was_given_and_once() -> None:
    arm({VARIABLE: "x=raise@2; y=raise"})
    failpoint("x")
    with pytest.raises(ConnectionError, match="failpoint x"):
        failpoint("x")
    failpoint("x")
    with pytest.raises(ConnectionError, match="failpoint y"):
        failpoint("y")


def test_it_acts_once_for_all_processes_that_share_a_folder(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: "x=exit", FIRED: str(tmp_path)}
    command = [sys.executable, "-c", "from orchestrator.failpoints import failpoint; failpoint('x'); print('on')"]
    first, second = (subprocess.run(command, cwd=ROOT, env=environment, capture_output=True) for _ in range(2))
    assert (first.returncode, first.stdout) == (EXIT_CODE, b"")
    assert (second.returncode, second.stdout) == (0, b"on\n")
    assert (tmp_path / "x").read_text().startswith("exit ")


@pytest.mark.parametrize("text", ["x", "x=", "=exit", "x=stop", "x=exit@0", "x=exit@-1", "x=exit@one"])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=VARIABLE):
        arm({VARIABLE: text})


def test_a_connection_is_really_broken(database_url: str) -> None:
    arm({VARIABLE: "x=raise"})
    with psycopg.connect(database_url) as connection:
        with pytest.raises(psycopg.OperationalError):
            failpoint("x", connection)
        assert connection.closed


def test_a_connection_of_sqlalchemy_raises_what_sqlalchemy_raises(database_url: str) -> None:
    arm({VARIABLE: "x=raise"})
    url = database_url.replace("postgresql://", "postgresql+psycopg://")
    connection = create_engine(url, poolclass=NullPool).connect()
    with pytest.raises(OperationalError):
        failpoint("x", connection)
    connection.invalidate()
    connection.close()


def test_a_point_that_is_not_armed_costs_less_than_a_microsecond() -> None:
    """About 40 ns on an idle machine; a step comes by ten of them."""
    times = 100_000
    each_s = min(timeit.repeat(lambda: failpoint("x", None), number=times, repeat=5)) / times
    assert each_s < 1e-6
