"""Owns how Postgres is made and started, and as whom: never as root, which it refuses."""

from __future__ import annotations

import os
import pwd
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.embedded.place import HOST, EmbeddedError, Place, Programs, Settings, remove
from orchestrator.embedded.processes import Processes

_USER = "dev"  # not the name of a schema: Postgres looks for unqualified tables in the user's own first
_MAX_CONNECTIONS = 200


def url(settings: Settings) -> str:
    return f"postgresql://{_USER}:{settings.password}@{HOST}:{settings.postgres_port}/postgres"


def run(processes: Processes, programs: Programs, place: Place, settings: Settings) -> subprocess.Popen[bytes]:
    account = _Account.for_postgres(programs, place)
    if not place.postgres.exists():
        _make(programs, place, settings, account)
    command = [*account.prefix, *_command(programs, place, settings)]
    return processes.run("postgres", command, place.log("postgres"), env=_environment(), **account.options)


def is_ready(place: Place, process: subprocess.Popen[bytes]) -> bool:
    return postmaster_pid(place, ready=True) == process.pid


def _command(programs: Programs, place: Place, settings: Settings) -> list[str]:
    options = {
        "listen_addresses": HOST,
        "port": settings.postgres_port,
        "unix_socket_directories": "",
        "max_connections": _MAX_CONNECTIONS,
        "timezone": "UTC",
    }
    flags = [flag for name, value in options.items() for flag in ("-c", f"{name}={value}")]
    return [str(programs.postgres_bin / "postgres"), "-D", str(place.postgres), *flags]


def _make(programs: Programs, place: Place, settings: Settings, account: _Account) -> None:
    """Make the data directory under another name first: killed half-way, it is made anew."""
    remove(place.unfinished)
    place.unfinished.mkdir(0o700)
    account.give(place.unfinished)
    password = place.root / "password.new"
    password.touch(0o600)
    password.write_text(settings.password)
    account.give(password)
    command = [str(programs.postgres_bin / "initdb"), "-D", str(place.unfinished), "-U", _USER]
    command += ["--auth=scram-sha-256", f"--pwfile={password}", "--encoding=UTF8", "--no-instructions"]
    command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
    command += ["-c", "scram_iterations=1"]  # 128 random bits need no stretching, connections become cheap
    made = subprocess.run(
        [*account.prefix, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(),
        check=False,
        **account.options,
    )
    password.unlink()
    if made.returncode != 0:
        raise EmbeddedError(f"initdb failed in {place.root}:\n{made.stdout.decode(errors='replace')}")
    place.unfinished.rename(place.postgres)


def _environment() -> dict[str, str]:
    """Leave out what would change the server's defaults: PG* settings and locales not installed here."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return {**kept, "LC_ALL": "C"}


def postmaster_pid(place: Place, *, ready: bool = False) -> int | None:
    """Read the pid from ``postmaster.pid``; with ``ready`` only if the server says that it is."""
    try:
        lines = (place.postgres / "postmaster.pid").read_text().splitlines()
        return int(lines[0]) if not ready or lines[7].strip() == "ready" else None
    except (FileNotFoundError, IndexError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class _Account:
    """Who runs Postgres: we ourselves or, for root, the owner of the data."""

    owner: tuple[int, int] | None = None
    prefix: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def for_postgres(cls, programs: Programs, place: Place) -> _Account:
        if os.geteuid() != 0:
            return cls()
        uid, gid = _owner(place)
        reach = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override")
        prefix = ("setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", *reach)
        if _works([*prefix, str(programs.postgres_bin / "postgres"), "--version"]):
            return cls((uid, gid), prefix)
        _require_open_path(programs.postgres_bin, place.root)
        return cls((uid, gid), options={"user": uid, "group": gid, "extra_groups": ()})

    def give(self, path: Path) -> None:
        if self.owner is not None:
            os.chown(path, *self.owner)


def _owner(place: Place) -> tuple[int, int]:
    if place.postgres.exists() and place.postgres.stat().st_uid != 0:
        return place.postgres.stat().st_uid, place.postgres.stat().st_gid
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _works(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _require_open_path(*paths: Path) -> None:
    for directory in [parent for path in paths for parent in (path, *path.parents)]:
        if not directory.stat().st_mode & 0o001:
            raise EmbeddedError(
                f"Postgres refuses to run as root, and the user nobody cannot enter {directory}: "
                f"run as an ordinary user, install util-linux (setpriv), or chmod o+x {directory}"
            )
