"""A RabbitMQ of this session's own, from Debian's package, as an ordinary process on loopback.

Owns its folder, its ports, its node, and its end.  Nothing of the system's own RabbitMQ is read or written: node name,
cookie, Erlang's port mapper and the data are private.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import urlsplit

import kombu
import psutil

from tests.faults.servers import kill_all
from tests.ports import free_port

_SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
_CONTROL = _SERVER.with_name("rabbitmqctl")
_USER, _PASSWORD = "faults", "faults"
_HOSTS = 24  # virtual hosts, made at the start: one for each test that asks
_CONF = """\
listeners.tcp.1 = 127.0.0.1:{port}
load_definitions = {definitions}
loopback_users = none
log.console = true
log.console.level = warning
log.file = false
disk_free_limit.absolute = 50MB
heartbeat = 5
"""

# Reads until the pipe to the process that started it closes, which it does however that one ends.
_WATCH = 'read -r _; for group in "$@"; do kill -s KILL -- "-$group"; done'


_folders: dict[int, Path] = {}  # of the brokers of this process, by port


def stored(url: str) -> bytes:
    """Return all that the broker of this process with such a URL has on disk: its messages among it.

    Waits until a message that is sent now is there, so that it is the broker's and not an empty folder that is read.
    Raises: AssertionError if that does not happen.
    """
    parts = urlsplit(url)
    data = _folders[parts.port or 0] / "mnesia"
    probe = secrets.token_hex(16)
    with kombu.Connection(url) as connection:
        queue = connection.SimpleQueue(f"probe-{probe[:8]}")
        queue.put(probe)
        give_up_at = time.monotonic() + 30.0
        while probe.encode() not in (found := _contents(data)):
            assert time.monotonic() < give_up_at, "a message that waits in RabbitMQ is nowhere on its disk"
            time.sleep(0.05)
        queue.queue.delete()
        queue.close()
    return found


def _contents(folder: Path) -> bytes:
    """Return what is in all files of a folder; those that vanish meanwhile are left out."""
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            found.append(path.read_bytes())
    return b"\n".join(found)


class MissingProgram(AssertionError):
    """A test cannot run here; the message says what to install."""


def require(program: str, package: str) -> str:
    """Return the path of a program.  Raises: MissingProgram, which fails the test instead of skipping it."""
    for folder in (*os.environ.get("PATH", "").split(os.pathsep), "/usr/sbin", "/usr/lib/rabbitmq/bin"):
        if (path := Path(folder) / program).is_file():
            return str(path)
    raise MissingProgram(f"This test needs {program}, which is not installed here: apt-get install -y {package}")


class RabbitMQ:
    """A broker that can be killed and started again on the same port with the same data."""

    def __init__(self, folder: Path) -> None:
        require("rabbitmq-server", "rabbitmq-server")
        self._folder = folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        self.port, self._mapper_port, self._dist_port = free_port(), free_port(), free_port()
        _folders[self.port] = self._folder
        self._numbers = iter(range(_HOSTS))
        definitions = self._folder / "definitions.json"
        definitions.write_text(json.dumps(_definitions()))
        (self._folder / "rabbitmq.conf").write_text(_CONF.format(port=self.port, definitions=definitions))
        (self._folder / "plugins").write_text("[].\n")
        self._process: subprocess.Popen[bytes] | None = None
        self._mapper: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    def new_url(self) -> str:
        """Return the URL of a virtual host that nobody has used yet."""
        return self.url(next(self._numbers))

    def url(self, number: int) -> str:
        """Return the URL of a virtual host; there are some two dozen."""
        return f"amqp://{_USER}:{_PASSWORD}@127.0.0.1:{self.port}/h{number % _HOSTS}"

    @property
    def pids(self) -> list[int]:
        """The broker and its port mapper, each the leader of a group."""
        return [process.pid for process in (self._process, self._mapper) if process is not None]

    @property
    def said(self) -> str:
        """What it has logged, in all its lives."""
        return (self._folder / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start it and wait until it answers."""
        environment = self._environment()
        if self._mapper is None:  # ours, and in the foreground: the broker would leave one running for ever
            command = [_mapper_program(), "-port", str(self._mapper_port), "-address", "127.0.0.1"]
            self._mapper = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(_SERVER)], env=environment, cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._watch()
        give_up_at = time.monotonic() + 120.0
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                raise AssertionError(f"RabbitMQ did not start:\n{self.said[-3000:]}")
            time.sleep(0.05)

    def _watch(self) -> None:
        """End both when this process ends, whatever ends it."""
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "watch", *map(str, self.pids)], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def _unwatch(self) -> None:
        if self._watcher is not None and self._watcher.stdin is not None:
            self._watcher.kill()  # before the numbers that it knows are free for others
            self._watcher.wait()
            self._watcher.stdin.close()
            self._watcher = None

    def kill(self) -> None:
        """End it without a farewell."""
        self._unwatch()
        if self._process is not None and self._process.poll() is None:
            kill_all(psutil.Process(self._process.pid))
            self._process.wait(30.0)

    def freeze(self) -> None:
        """Let it stand still: connections to it are made by the kernel, and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def set_memory_limit(self, limit: str) -> None:
        """Let it be short of memory above so much, such as 1MB, which blocks whoever publishes."""
        environment = self._environment()
        command = [_CONTROL, "-n", environment["RABBITMQ_NODENAME"], "set_vm_memory_high_watermark", "absolute", limit]
        subprocess.run([str(each) for each in command], env=environment, check=True, capture_output=True, timeout=60.0)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        top = psutil.Process(self._process.pid)
        for process in (top, *top.children(recursive=True)):
            process.send_signal(number)

    def restart(self) -> None:
        """Kill it and start it again."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """End it for good; its data go."""
        self.kill()
        if self._mapper is not None:
            self._mapper.send_signal(signal.SIGTERM)
            self._mapper.wait(10.0)
            self._mapper = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2.0) as probe:
            probe.settimeout(5.0)
            probe.sendall(b"AMQP\x00\x00\x09\x01")
            return bool(probe.recv(8))
        return False

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_"))}
        return {
            **kept,
            "HOME": str(self._folder),  # where Erlang keeps the cookie
            "PATH": f"{kept.get('PATH', '')}:/usr/sbin:/usr/bin:/bin",
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_PORT": str(self._mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"faults{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self._folder),
            "RABBITMQ_PID_FILE": str(self._folder / "pid"),
            "RABBITMQ_CONF_ENV_FILE": str(self._folder / "none"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 -kernel inet_dist_use_interface {127,0,0,1}",
        }


def _definitions() -> dict[str, object]:
    """Return a user and its virtual hosts, as RabbitMQ reads them at its start."""
    salt = os.urandom(4)
    secret = base64.b64encode(salt + hashlib.sha256(salt + _PASSWORD.encode()).digest()).decode()
    hosts = [f"h{number}" for number in range(_HOSTS)]
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    return {
        "users": [{
            "name": _USER, "password_hash": secret, "hashing_algorithm": "rabbit_password_hashing_sha256",
            "tags": "administrator",
        }],
        "vhosts": [{"name": host} for host in hosts],
        "permissions": [{"user": _USER, "vhost": host, **everything} for host in hosts],
    }  # fmt: skip


def _mapper_program() -> str:
    found = sorted(Path("/usr/lib/erlang").glob("erts-*/bin/epmd"))
    return str(found[-1]) if found else require("epmd", "erlang-base")
