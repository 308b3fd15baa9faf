"""Servers that a test may kill: a Postgres, its standby, and a Valkey of this session's own, on ports that they keep.

Owns their processes.  Built from the embedded servers, which start them; those know nothing of being killed.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import threading
import uuid
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg
from psycopg import sql

from orchestrator import store
from orchestrator.embedded import postgres, valkey
from orchestrator.embedded.place import Place, Programs, Settings, settle, take
from orchestrator.embedded.processes import Processes, await_start
from tests.acceptance.running import until


class Servers:
    """A Postgres and a Valkey; each can be ended without a farewell, and started again."""

    def __init__(self, folder: Path) -> None:
        self._programs = Programs.find()
        self._place = Place(folder.resolve())
        self._processes = Processes(take(self._place))
        self._settings = settle(self._place, None, None)
        self._lock = threading.Lock()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.start_postgres()
        self.start_valkey()
        self._template = self.new_database("template0")
        store.migrate(self.url_of(self._template))

    @property
    def postgres_url(self) -> str:
        return postgres.url(self._settings)

    def url_of(self, database: str) -> str:
        return urlsplit(self.postgres_url)._replace(path=f"/{database}").geturl()

    def broker_url(self, number: int) -> str:
        return urlsplit(valkey.url(self._settings))._replace(path=f"/{number}").geturl()

    def new_database(self, template: str = "") -> str:
        """Make a database with the schema in it; returns its name."""
        name = f"faults_{uuid.uuid4().hex}"
        with psycopg.connect(self.postgres_url, autocommit=True) as connection:
            words = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
            connection.execute(words.format(sql.Identifier(name), sql.Identifier(template or self._template)))
        return name

    def drop_database(self, name: str) -> None:
        with psycopg.connect(self.postgres_url, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    # -- Postgres ------------------------------------------------------------------------------------------------------
    def start_postgres(self) -> None:
        process = postgres.run(self._processes, self._programs, self._place, self._settings)
        self._running["postgres"] = process
        self._watch()
        await_start(process, lambda: postgres.is_ready(self._place, process), self._place.log("postgres"))

    def stop_postgres(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """End Postgres; SIGQUIT is its `immediate` mode: no checkpoint, and recovery at the next start."""
        process = self._running["postgres"]
        backends = psutil.Process(process.pid).children()
        process.send_signal(how)
        process.wait(30.0)
        psutil.wait_procs(backends, timeout=30.0)

    def kill_postgres(self) -> None:
        """Kill Postgres with all its processes."""
        process = self._running["postgres"]
        family = [process, *psutil.Process(process.pid).children()]
        kill_all(psutil.Process(process.pid))
        process.wait(30.0)
        psutil.wait_procs(family[1:], timeout=30.0)

    def new_standby(self, folder: Path) -> Standby:
        """Make a replica that every commit waits for."""
        standby = Standby(self._programs, folder, self._settings)
        with psycopg.connect(self.postgres_url, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            connection.execute("SELECT pg_reload_conf()")
            inquiry = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
            until(lambda: connection.execute(inquiry).fetchone() == (1,), "commits wait for the standby", 60.0)
        return standby

    def restart_postgres(self) -> None:
        """Crash Postgres and start it again."""
        self.stop_postgres()
        self.start_postgres()

    # -- Valkey --------------------------------------------------------------------------------------------------------
    def start_valkey(self) -> None:
        process = valkey.run(self._processes, self._programs, self._place, self._settings)
        self._running["valkey"] = process
        self._watch()
        await_start(process, lambda: valkey.answers(self._settings), self._place.log("valkey"))

    def stop_valkey(self) -> None:
        """Kill Valkey; what was in it is gone."""
        self._running["valkey"].kill()
        self._running["valkey"].wait(30.0)

    def restart_valkey(self) -> None:
        self.stop_valkey()
        self.start_valkey()

    def _watch(self) -> None:
        if len(self._running) == 2:
            self._processes.watch(self._running["postgres"], self._running["valkey"])

    def stop(self) -> None:
        self._processes.stop()


class Standby:
    """A streaming replica of a Postgres, until it is promoted."""

    def __init__(self, programs: Programs, folder: Path, primary: Settings) -> None:
        self._place = Place(folder.resolve())
        self._processes = Processes(take(self._place))
        self._settings = replace(settle(self._place, None, None), password=primary.password)
        self._copy(programs, postgres.url(primary))
        process = postgres.run(self._processes, programs, self._place, self._settings)
        self._processes.watch(process, process)
        await_start(process, lambda: postgres.is_ready(self._place, process), self._place.log("postgres"))

    def _copy(self, programs: Programs, primary_url: str) -> None:
        target = self._place.postgres
        command = [str(programs.postgres_bin / "pg_basebackup"), "-d", primary_url, "-D", str(target), "-R"]
        subprocess.run([*command, "--checkpoint=fast"], check=True, capture_output=True)
        if os.geteuid() == 0:  # Postgres refuses to run as root
            nobody = pwd.getpwnam("nobody")
            for path in (target, *target.rglob("*")):
                os.chown(path, nobody.pw_uid, nobody.pw_gid, follow_symlinks=False)

    @property
    def url(self) -> str:
        return postgres.url(self._settings)

    def promote(self) -> None:
        """Make it the primary."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            assert connection.execute("SELECT pg_promote(true, 60)").fetchone() == (True,)

    def stop(self) -> None:
        self._processes.stop()


def kill_all(process: psutil.Process) -> None:
    """Kill a process and all that it has started."""
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(ProcessLookupError):  # it has gone by itself meanwhile
            os.kill(each.pid, signal.SIGKILL)
