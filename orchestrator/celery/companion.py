"""The companion: a process beside every worker that renews its lease, is its pump, and sees its children die.

Owns liveness (rule 6).  It is spawned, never forked; it ends when the worker's main process has ended.  Its standard
input is a pipe from the main process (end of file: main is gone), its socket takes one connection from every process
that drains (end of file: that process is gone, and what it had begun is given back at once).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pickle
import selectors
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from time import monotonic
from typing import Any

from orchestrator.celery.doorbell import Bell
from orchestrator.codec import first_line
from orchestrator.engine.lease import begin_life, is_alive
from orchestrator.engine.pump import Pump
from orchestrator.engine.watchdog import Watchdog
from orchestrator.errors import OrchestratorError
from orchestrator.failpoints import failpoint
from orchestrator.settings import Settings
from orchestrator.store import check, liveness
from orchestrator.store.connection import (
    REFUSED,
    UNAVAILABLE,
    WORKER_PATIENCE_S,
    Connection,
    open_connection,
    unavailable,
)

logger = logging.getLogger(__name__)
EX_STUCK = 75  # sysexits.h: EX_TEMPFAIL
_CHILDREN_GRACE_S = 10.0
_AFTER_DUE_S = 0.01  # so that a round finds what the one before it saw coming


@dataclass(slots=True)
class Config:
    """What the main process hands over, on the first line of standard input."""

    dsn: str = field(repr=False)
    broker: dict[str, Any] = field(repr=False)
    socket: str
    node: str
    pid: int
    queues: list[str]
    targets: list[str]
    slots: int
    lease_s: float
    pump_s: float
    reservation_s: float
    prepare: bool
    watchdog_s: float
    doorbell_s: float
    incarnation: int | None = None

    @classmethod
    def of(cls, settings: Settings, **worker: Any) -> Config:
        """Return what the settings say, with what the caller knows of its worker."""
        return cls(
            dsn=settings.dsn,
            lease_s=settings.lease.total_seconds(),
            pump_s=settings.pump_interval.total_seconds(),
            reservation_s=settings.reservation.total_seconds(),
            prepare=settings.prepared_statements,
            watchdog_s=settings.watchdog.total_seconds(),
            doorbell_s=settings.doorbell_expires.total_seconds(),
            **worker,
        )

    def dump(self) -> str:
        """Return it as a line; options of a broker's client may be what JSON alters, such as numbers as keys."""
        return json.dumps({**asdict(replace(self, broker={})), "broker": pickle.dumps(self.broker).hex()})

    @classmethod
    def load(cls, line: bytes) -> Config:
        """Return what the main process has dumped."""
        known = json.loads(line)
        return cls(**{**known, "broker": pickle.loads(bytes.fromhex(known["broker"]))})


@dataclass(slots=True)
class _Child:
    """A process that drains; `ids` are the children it reported."""

    ids: list[int] = field(default_factory=list)
    buffer: bytes = b""


class Companion:
    """One companion process; `run` returns when its worker has ended."""

    def __init__(self, config: Config, announce: Callable[[str], None]) -> None:
        self._config = config
        self._announce = announce
        self._bell = Bell(config.broker, timedelta(seconds=config.doorbell_s))
        self._pump = Pump(
            self._ring,
            lease=timedelta(seconds=config.lease_s),
            reservation=timedelta(seconds=config.reservation_s),
            slots=config.slots,
        )
        self._watchdog = Watchdog(timedelta(seconds=config.watchdog_s))
        self._broker_answers = True
        self._selector = selectors.DefaultSelector()
        self._children: dict[socket.socket, _Child] = {}
        self._gone: list[int] = []  # children whose work is still to be given back
        self._connection: Connection | None = None
        self._incarnation = config.incarnation
        self._main_ended_at: float | None = None
        self._retry_at = 0.0
        self._next_due_at = math.inf

    def run(self) -> None:
        """Live as long as the worker; raises SystemExit if it is stuck.

        Raises: OrchestratorError if the start is impossible.
        """
        self._connect()
        if self._incarnation is None:
            self._begin_life()
        self._listen()
        failpoint("companion.begun", self._connection)
        self._announce(f"incarnation {self._incarnation}")
        failpoint("companion.announced", self._connection)
        next_renewal = next_pump = monotonic()
        while not self._over():
            now = monotonic()
            for key, _ in self._selector.select(max(0.0, min(next_renewal, next_pump) - now)):
                key.data(key.fileobj)
            now = monotonic()
            self._safely(self._give_back_gone)
            if now >= next_renewal:
                self._safely(self._renew)
                next_renewal = now + self._config.lease_s / 4
            if now >= next_pump:
                self._next_due_at = math.inf
                self._safely(self._run_pump)
                next_pump = min(now + self._config.pump_s, self._next_due_at)
        self._end_life()

    # -- the database --------------------------------------------------------------------------------------------------
    def _connect(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = open_connection(
                self._config.dsn,
                name=f"companion of {self._config.node}",
                prepare=self._config.prepare,
                patience_s=WORKER_PATIENCE_S,
            )
            check(self._connection)
        return self._connection

    def _safely(self, action: Callable[[], None]) -> None:
        """The database may be away for a while; nobody is judged over a connection that broke."""
        if monotonic() < self._retry_at:
            return
        try:
            action()
        except (*UNAVAILABLE, OrchestratorError) as error:
            logger.warning("companion of %s: %s", self._config.node, str(error).strip().splitlines()[0])
            self._pump.connection_broke()
            if self._connection is not None:
                with contextlib.suppress(Exception):
                    self._connection.close()
            self._connection = None
            self._retry_at = monotonic() + 0.25

    def _begin_life(self) -> None:
        config = self._config
        self._incarnation, rings = begin_life(
            self._connect(),
            node=config.node,
            pid=config.pid,
            queues=config.queues,
            targets=config.targets,
            slots=config.slots,
        )
        for queue in rings:
            self._ring(queue, 1)

    def _renew(self) -> None:
        assert self._incarnation is not None
        if not liveness.renew(self._connect(), self._incarnation):
            logger.warning(
                "worker %s was declared dead while it lives; it goes on as a new incarnation", self._config.node
            )
            self._begin_life()
            for connection in self._children:
                self._tell(connection)

    def _run_pump(self) -> None:
        self._find_gone()
        self._end_stuck_children()
        connection = self._connect()
        pumped = self._pump.run_once(connection)
        if self._is_stuck(connection, any(pumped.rung[queue] for queue in self._config.queues)):
            raise SystemExit(EX_STUCK)
        next_due = pumped.next_due_s
        self._next_due_at = math.inf if next_due is None else monotonic() + max(next_due, 0.0) + _AFTER_DUE_S

    def _find_gone(self) -> None:
        """Children may have died while no companion was there to see it."""
        assert self._incarnation is not None
        children = liveness.children(self._connect(), self._incarnation)
        self._gone += [child for child in children if child not in self._gone and not is_alive(child)]
        self._give_back_gone()

    def _end_stuck_children(self) -> None:
        """A pool child that overran its time or its heartbeat is replaced: the pool starts another one."""
        assert self._incarnation is not None
        for child in liveness.expired_children(self._connect(), self._incarnation):
            if (
                child != self._config.pid
                and _is_process(child)
                and any(child in c.ids for c in self._children.values())
            ):
                logger.warning(
                    "pool child %s of %s hangs in a step past its time and is replaced", child, self._config.node
                )
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)

    def _give_back_gone(self) -> None:
        while self._gone:
            assert self._incarnation is not None
            failpoint("companion.child_gone", self._connection)
            for queue in liveness.give_back_child(self._connect(), self._incarnation, self._gone[-1]):
                self._ring(queue, 1)
            self._gone.pop()
            failpoint("companion.child_buried", self._connection)

    def _is_stuck(self, connection: Connection, rung: bool) -> bool:
        assert self._incarnation is not None
        config = self._config
        rung = rung and self._broker_answers
        return self._watchdog.is_stuck(connection, self._incarnation, config.queues, config.targets, rung=rung)

    def _ring(self, queue: str, times: int) -> None:
        self._broker_answers = self._bell.ring(queue, times)

    # -- processes -----------------------------------------------------------------------------------------------------
    def _listen(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._config.socket)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._config.socket)
        os.chmod(self._config.socket, 0o600)
        listener.listen(256)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(sys.stdin.buffer.fileno(), selectors.EVENT_READ, self._main_spoke)

    def _accept(self, listener: Any) -> None:
        connection, _ = listener.accept()
        connection.settimeout(1.0)
        self._children[connection] = _Child()
        self._selector.register(connection, selectors.EVENT_READ, self._child_spoke)
        self._tell(connection)

    def _tell(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(f"{self._incarnation}\n".encode())

    def _child_spoke(self, connection: Any) -> None:
        try:
            data = connection.recv(4096)
        except OSError:
            data = b""
        child = self._children[connection]
        if data:
            *lines, child.buffer = (child.buffer + data).split(b"\n")
            child.ids += [int(line) for line in lines if line]
            return
        self._selector.unregister(connection)
        connection.close()
        self._gone += self._children.pop(connection).ids

    def _main_spoke(self, descriptor: Any) -> None:
        if not os.read(descriptor, 4096):
            self._selector.unregister(descriptor)
            self._main_ended_at = monotonic()

    def _over(self) -> bool:
        if self._main_ended_at is None:
            return False
        return not self._children or monotonic() - self._main_ended_at > _CHILDREN_GRACE_S

    def _end_life(self) -> None:
        """Main is gone: what its children had begun is given back, at once if they are gone too."""
        shutil.rmtree(os.path.dirname(self._config.socket), ignore_errors=True)
        self._retry_at = 0.0

        def end() -> None:
            assert self._incarnation is not None
            connection = self._connect()
            failpoint("companion.ending", connection)
            liveness.declare_dead(connection, self._incarnation)
            failpoint("companion.ended", connection)
            give_back = liveness.give_back_dead if self._children else None
            queues = give_back(connection) if give_back else liveness.give_back_gone(connection, self._incarnation)
            for queue in queues:
                self._ring(queue, 1)
            self._pump.run_once(connection)

        self._safely(end)


def _is_process(number: int) -> bool:
    """Tell a process from a thread, which cannot be ended alone."""
    try:
        with open(f"/proc/{number}/status", encoding="ascii", errors="replace") as file:
            return f"\nTgid:\t{number}\n" in file.read()
    except OSError:
        return False


def main() -> int:
    """Read the configuration, live, and say on standard output which incarnation this is (or what is wrong)."""
    logging.basicConfig(level=logging.WARNING, format="[%(asctime)s: %(levelname)s/companion] %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when main has ended, so that main can still drain
    first = _first_line()
    if not first:
        return 0
    companion = Companion(Config.load(first), _say)
    try:
        companion.run()
    except (*UNAVAILABLE, OrchestratorError) as error:
        _say(f"error {error if isinstance(error, OrchestratorError) else unavailable(error)}")
        return 1
    except REFUSED as error:
        _say(f"error Postgres refuses: {first_line(error)}; give the role of the database URL the rights of a worker")
        return 1
    return 0


def _say(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # main is gone, as the end of its pipe is about to tell
        os.write(1, f"{line}\n".encode())


def _first_line() -> bytes:
    """Read one line without buffering what comes after it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return line


if __name__ == "__main__":
    sys.exit(main())
