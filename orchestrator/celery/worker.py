"""What an Orchestrator adds to a worker: the companion before the pool, a first ring when it is ready, a flag to stop.

Owns the bond between a worker's main process, its companion and its pool children.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import mmap
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

from celery import bootsteps, signals
from celery.concurrency import solo
from celery.worker import state

from orchestrator import saga as sagas
from orchestrator.celery.companion import EX_STUCK, Config
from orchestrator.celery.doorbell import DRAIN, connection_options
from orchestrator.celery.events import quiet_logs
from orchestrator.celery.wire import JSON
from orchestrator.engine import lead
from orchestrator.engine.commit import Identity
from orchestrator.errors import OrchestratorError, StoreUnavailableError

logger = logging.getLogger(__name__)
_VARIABLE = "ORCHESTRATOR_WORKER"
_START_S = 20.0
_STUCK_GRACE_S = 10.0
_COLD_S = 45.0  # a pool child that is told to end may take half a minute of it, until main has read what it has sent
_LOOK_S = 0.25  # between looks whether tasks wait for a child
# Three bytes that a worker shares with its children: that it stops; that no task but drains waits for one of them; that
# a drain does.  Then, after some room, which of them takes all that comes.
_LEAD_AT = 8
_SHARED = _LEAD_AT + lead.SIZE
_said = mmap.mmap(-1, _SHARED)


def stopping() -> bool:
    """Tell whether this worker's main process has begun to shut down."""
    return _said[0] != 0


def waited_for() -> bool:
    """Tell whether tasks other than drains wait for a child of this worker, or main does not know."""
    return _said[1] == 0


def rung() -> bool:
    """Tell whether a doorbell waits for a child of this worker."""
    return _said[2] != 0


def lead_here() -> lead.Lead:
    """Return what this thread, a child of its worker, shares with the others of who takes all that comes."""
    return lead.Lead(memoryview(_said)[_LEAD_AT:], threading.get_native_id())


def _share(folder: Path) -> None:
    """Share what main says with whoever knows this folder, spawned children too."""
    global _said
    with (folder / "said").open("a+b") as file:
        file.truncate(_SHARED)
        _said = mmap.mmap(file.fileno(), _SHARED)


class CompanionStep(bootsteps.StartStopStep):
    """Starts the companion before the pool, which does not wait for it, and again if it dies."""

    requires = ("celery.worker.components:Timer",)
    orchestrator: ClassVar[Any]

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._folder = ""
        self._watching = True
        self._incarnation: int | None = None
        self._forking = threading.Lock()
        self._ends_at = math.inf
        if worker.pool_cls.is_green:  # whose Popen forks in Python, and would wait here for the lock of `exclude_forks`
            raise SystemExit(
                "orchestrator: a pool of greenlets (gevent, eventlet) cannot drive sagas; start this worker with "
                "-P prefork, threads or solo"
            )
        accepted = worker.app.conf.accept_content
        if accepted is not None and not {"json", JSON} & set(accepted):
            raise SystemExit(
                "orchestrator: this worker takes no JSON, and so hears no doorbell; add 'json' to accept_content"
            )
        _limit_all_but_drains(worker)  # here, for of steps that are created the pool may be the first

    def create(self, worker: Any) -> None:
        """Start the companion's process; `hear` waits for it while the worker is about to take its first message."""
        quiet_logs(self.orchestrator.settings_at_start().show_payloads)
        self.orchestrator.take_over()
        self._folder = tempfile.mkdtemp(prefix="orchestrator-")
        _share(Path(self._folder))
        self._config = self._configure(worker)
        os.environ[_VARIABLE] = json.dumps(
            {
                "socket": self._config.socket,
                "queues": self._config.queues,
                "node": self._config.node,
                "slots": self._config.slots,
            }
        )
        signals.worker_shutting_down.connect(_begin_stop, weak=False)
        self._stop_from_the_beginning(worker)
        signals.worker_ready.connect(self._ring_own_queues, weak=False)
        signals.worker_before_create_process.connect(_share_memory, weak=False)
        self.exclude_forks()
        if not issubclass(worker.pool_cls, solo.TaskPool):  # which takes no message before it has done the last one
            worker.timer.call_repeatedly(_LOOK_S, _look_who_waits, (worker,))
        self._launch()

    def hear(self) -> None:
        """Wait until the companion lives; what it cannot live with ends the worker with one sentence."""
        if self._incarnation is not None:
            return
        try:
            self._await_life()
        except OrchestratorError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise SystemExit(f"orchestrator: {error}") from None
        threading.Thread(target=self._watch, name="orchestrator companion", daemon=True).start()

    def _stop_from_the_beginning(self, worker: Any) -> None:
        """Say that the worker stops before a soft shutdown waits: Celery says so later, and interrupts what is begun.

        It waits in a signal handler, and after that for the pool: for ever, if the handler came between the two parts
        of a message to a pool child, which waits for the second.
        """
        wait = worker.wait_for_soft_shutdown

        def begin_stop_and_wait() -> None:
            _begin_stop()
            self._ends_at = monotonic() + worker.app.conf.worker_soft_shutdown_timeout + _COLD_S
            wait()

        worker.wait_for_soft_shutdown = begin_stop_and_wait

    def _configure(self, worker: Any) -> Config:
        app = worker.app
        targets = sorted(name for name in app.tasks if not name.startswith("celery."))
        targets += [saga.target for saga in sagas.registry.sagas.values()]
        return Config.of(
            self.orchestrator.settings,
            broker=connection_options(app),
            socket=os.path.join(self._folder, "companion"),
            node=worker.hostname,
            pid=os.getpid(),
            queues=sorted(app.amqp.queues.consume_from),
            targets=targets,
            slots=_slots(worker),
            incarnation=self._incarnation,
        )

    def exclude_forks(self) -> None:
        """Let no pool child be forked while a companion is being started.

        It would hold the pipe whose end the starting thread waits for, and keep this worker without a companion.
        """
        os.register_at_fork(
            before=self._forking.acquire, after_in_parent=self._forking.release, after_in_child=self._forked
        )

    def _spawn(self) -> None:
        self._launch()
        self._await_life()

    def _launch(self) -> None:
        with self._forking:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.celery.companion"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._config.dump()}\n")
        self._process.stdin.flush()

    def _await_life(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _START_S)
        line = self._process.stdout.readline().strip() if ready else ""
        if not line.startswith("incarnation "):
            self._process.kill()
            raise StoreUnavailableError(
                line.removeprefix("error ") or f"the companion did not start within {_START_S:g} s"
            )
        self._incarnation = self._config.incarnation = int(line.split()[1])

    def _watch(self) -> None:
        """Start the companion again when it dies; without it, this worker would soon be declared dead."""
        while self._watching:
            process = self._process
            if process is not None and process.poll() == EX_STUCK:
                _end_stuck()
            if monotonic() > self._ends_at:
                logger.critical("this worker's cold shutdown does not come to an end; it is ended")
                os._exit(1)
            if process is not None and process.poll() is not None and self._watching:
                logger.warning(
                    "the companion of this worker ended (exit code %s); starting it again", process.returncode
                )
                with contextlib.suppress(OrchestratorError, OSError):
                    self._spawn()
            time.sleep(0.2)

    def _forked(self) -> None:
        """A child must not hold the pipe whose end tells the companion that main is gone."""
        self._forking.release()
        self._watching = False
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                os.close(process.stdin.fileno())

    def _ring_own_queues(self, sender: Any = None, **_: Any) -> None:
        for queue in self._config.queues:
            self.orchestrator.bell.ring(queue, self._config.slots)

    def start(self, worker: Any) -> None:
        """Nothing: the companion was started before the pool."""

    def close(self, worker: Any) -> None:
        """Say that the worker stops: not each way in which it can be told to sends a signal of Celery's."""
        _begin_stop()

    def stop(self, worker: Any) -> None:
        """Stop watching; the companion ends this life when the process has ended, with whatever children it had."""
        self._watching = False

    terminate = stop


class CompanionHeard(bootsteps.StartStopStep):
    """Waits for the companion after the neighbours were asked for a second, and before any message is taken."""

    requires = ("celery.worker.consumer.mingle:Mingle",)

    def start(self, consumer: Any) -> None:
        """Raises: SystemExit if the companion cannot live."""
        for step in consumer.controller.steps:
            if isinstance(step, CompanionStep):
                step.hear()


def _limit_all_but_drains(worker: Any) -> None:
    """Let the worker's time limits hold for each task but the drain, before they are the pool's own.

    They would strike anywhere in a drain: in saga code, whose run would be undone for it.
    """
    for task in worker.app.tasks.values():
        if task.name != DRAIN:
            task.time_limit = task.time_limit or worker.time_limit
            task.soft_time_limit = task.soft_time_limit or worker.soft_time_limit
    worker.time_limit = worker.soft_time_limit = None


def _slots(worker: Any) -> int:
    """Return how many can drain at once: whoever is said to be idle is rung for, and has to answer."""
    if issubclass(worker.pool_cls, solo.TaskPool):
        return 1  # whatever its concurrency, which is by default the number of CPUs
    return int(worker.max_concurrency or worker.concurrency or 1)  # the first if it scales by itself


def _begin_stop(**_: Any) -> None:
    _said[0] = 1


def _look_who_waits(worker: Any) -> None:
    """Say whether a task that this worker has received waits for a child, for drains that are to make room for it.

    Where it has received all that it may without acknowledging some, one may wait at the broker, behind doorbells.
    Say as well whether a doorbell waits, so that a drain which ends sends none after it.
    """
    try:
        received = list(state.reserved_requests)
        unacknowledged = sum(not request.acknowledged for request in received)
        idle = {request.name == DRAIN for request in received if request not in state.active_requests}
        waits = unacknowledged >= _received_in_advance(worker) or False in idle
    except RuntimeError:  # they change meanwhile, in another thread
        idle, waits = set(), True
    _said[1], _said[2] = not waits, True in idle


def _received_in_advance(worker: Any) -> float:
    """Return how many messages this worker has at the most that are not acknowledged; 0 if that is no way to tell."""
    consumer = getattr(worker, "consumer", None)
    if consumer is None or worker.app.conf.worker_disable_prefetch:
        return 0
    return consumer.initial_prefetch_count or math.inf


def _share_memory(**_: Any) -> None:
    """Before the first child is forked: let no collection of garbage touch again what is there by now.

    It writes to all that it looks at, which a child then no longer shares with main.  Celery collects before each fork,
    and so every child but the last had a copy of nearly everything that was imported.
    """
    signals.worker_before_create_process.disconnect(_share_memory)
    gc.collect()
    gc.freeze()


def _end_stuck() -> None:
    """End this process, warmly if it still can; called in a thread of its own."""
    logger.critical(
        "this worker has let work lie that it is rung for, although it has slots to spare: its connection to the "
        "broker has most likely died unnoticed. It ends with exit code %s; its supervisor is to start it again",
        EX_STUCK,
    )
    _begin_stop()
    state.should_stop = EX_STUCK  # the worker's loop looks here
    time.sleep(_STUCK_GRACE_S)
    os._exit(EX_STUCK)


class Bond:
    """The connection of a draining process to its companion; tells the present incarnation."""

    def __init__(self) -> None:
        worker = json.loads(os.environ[_VARIABLE])
        self.queues: list[str] = worker["queues"]
        self.node: str = worker["node"]
        self.slots: int = worker["slots"]
        self._path = worker["socket"]
        self.folder = Path(self._path).parent
        _share(self.folder)
        self._socket: socket.socket | None = None
        self._reported: set[int] = set()
        self._incarnation = 0
        self._buffer = b""
        self._lock = threading.Lock()

    def identity(self) -> Identity:
        """Return the incarnation that the companion last told, and this thread as its child."""
        child = threading.get_native_id()
        with self._lock:
            for _ in range(2):
                try:
                    self._listen(child)
                    return Identity(self._incarnation, child)
                except OSError:
                    self._close()
        raise StoreUnavailableError("the companion of this worker cannot be reached; it is being started again")

    def _listen(self, child: int) -> None:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(2.0)
            self._socket.connect(self._path)
            self._read()
        while select.select([self._socket], [], [], 0)[0]:
            self._read()
        if child not in self._reported:
            self._socket.sendall(f"{child}\n".encode())
            self._reported.add(child)

    def _read(self) -> None:
        assert self._socket is not None
        data = self._socket.recv(4096)
        if not data:
            raise ConnectionResetError
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if lines:
            self._incarnation = int(lines[-1])

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._reported, self._buffer = None, set(), b""
