"""Owns how Valkey is started and asked whether it answers."""

from __future__ import annotations

import socket
import subprocess

from orchestrator.embedded.place import HOST, Place, Programs, Settings
from orchestrator.embedded.processes import Processes

_CONF = """\
bind {host}
port {port}
requirepass {password}
dir ./
daemonize no
databases 256
appendonly no
save 3600 1
stop-writes-on-bgsave-error no
"""  # saved at a clean stop only: the broker rings doorbells, what must not be lost is in Postgres


def url(settings: Settings) -> str:
    return f"redis://:{settings.password}@{HOST}:{settings.valkey_port}/0"


def run(processes: Processes, programs: Programs, place: Place, settings: Settings) -> subprocess.Popen[bytes]:
    place.valkey.mkdir(exist_ok=True)
    conf = place.valkey / "valkey.conf"
    conf.touch(0o600)
    conf.write_text(_CONF.format(host=HOST, port=settings.valkey_port, password=settings.password))
    return processes.run("valkey", [str(programs.valkey), conf.name], place.log("valkey"), cwd=place.valkey)


def answers(settings: Settings) -> bool:
    try:
        with socket.create_connection((HOST, settings.valkey_port), timeout=1) as connection:
            connection.sendall(f"AUTH {settings.password}\r\nPING\r\n".encode())
            with connection.makefile("rb") as answer:
                return [answer.readline(), answer.readline()] == [b"+OK\r\n", b"+PONG\r\n"]
    except OSError:
        return False
