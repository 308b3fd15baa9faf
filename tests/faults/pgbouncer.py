"""A PgBouncer in transaction mode, of Debian's package, as an ordinary process on loopback.

Owns its folder, its port, and its end.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from tests.acceptance.running import until
from tests.faults.rabbitmq import require
from tests.ports import free_port

_CONF = """\
[databases]
* = host={host} port={port} user={user} password={password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {own}
auth_type = any
pool_mode = transaction
default_pool_size = {size}
max_client_conn = 200
server_reset_query =
unix_socket_dir =
logfile = {folder}/pgbouncer.log
"""


class PgBouncer:
    """Stands before the Postgres of a URL, with so many connections to it."""

    def __init__(self, postgres_url: str, folder: Path, *, size: int) -> None:
        program = require("pgbouncer", "pgbouncer")
        parts = urlsplit(postgres_url)
        folder.mkdir(parents=True)
        port = free_port()
        self._url = parts._replace(netloc=f"{parts.username}@127.0.0.1:{port}")
        conf = folder / "pgbouncer.ini"
        conf.write_text(
            _CONF.format(
                host=parts.hostname, port=parts.port, user=parts.username, password=parts.password, own=port,
                size=size, folder=folder,
            )
        )  # fmt: skip
        command = [program, str(conf)]
        if os.geteuid() == 0:  # which it refuses to run as
            nobody = pwd.getpwnam("nobody")
            for path in (folder, conf):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
            reach = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override")
            ids = (f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups")
            command = [require("setpriv", "util-linux"), *ids, *reach, *command]
        self._folder = folder
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until(lambda: self._answers(port) or self._process.poll() is not None, "PgBouncer answers")
        if self._process.poll() is not None:
            raise AssertionError(f"PgBouncer did not start:\n{self.log}")

    @property
    def log(self) -> str:
        return (self._folder / "pgbouncer.log").read_text(errors="replace")

    @property
    def url(self) -> str:
        """The URL that leads through it; its name of a database is that of Postgres."""
        return self._url.geturl()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(20.0)
        shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _answers(port: int) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1.0):
                return True
        except OSError:
            return False
