"""Task events for steps, so that stock Flower lists every step under its own name.

Owns the events that pool children send in place of the worker's main process (which sees only doorbells), and what is
kept out of the worker's log.  Must never carry a payload unless `show_payloads` says so, nor fail or delay a step: a
thread of its own publishes what the steps leave behind, a bounded number of attempts waits for it, and what the broker
does not take within about a second is dropped.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

from celery import bootsteps, signals
from celery.events.event import get_exchange
from celery.utils.saferepr import saferepr
from celery.utils.time import utcoffset
from kombu.connection import Connection
from kombu.messaging import Producer

from orchestrator.celery.doorbell import DRAIN
from orchestrator.machine.journal import AttemptEnded
from orchestrator.machine.policy import COMPENSATION_RETRY, STEP_RETRY
from orchestrator.step import current_step
from orchestrator.step import registry as step_registry
from orchestrator.store.turns import Taken

logger = logging.getLogger(__name__)

HIDDEN = "…"
_SHARE_S = 0.5  # how often the main process tells its children whether events are wanted
_GATHER_S = 0.1  # how long finished attempts are gathered into one message
_LONG_S = 0.5  # an attempt that takes longer is told before it has ended
_REST_AFTER_FAILURE_S = 1.0
_BATCH = 50  # attempts in one message
_WAITING = 1000  # attempts that wait for the broker; beyond that the oldest are dropped
_SHOWN = 1024  # characters of a representation, if payloads are shown
_TIMEOUTS = {"socket_connect_timeout": 1.0, "socket_timeout": 2.0, "connect_timeout": 1.0, "max_retries": 1,
             "interval_start": 0, "interval_step": 0.1, "interval_max": 0.1}  # fmt: skip

# Shared with forked children: whether events are wanted, and the worker's logical clock.
_shared = mmap.mmap(-1, 16)
_clock = struct.Struct("q")


def wanted() -> bool:
    """Tell whether this worker sends task events: started with ``-E``, or asked to by remote control, as by Flower."""
    return _shared[0] != 0


def task_id(taken: Taken) -> str:
    """Return the id under which Celery and Flower know the task: run and key; an undo and a probe have their own."""
    if taken.role in ("do", "once"):
        return f"{taken.run_id}:{taken.key}"
    late = (taken.call or {}).get("l")
    return f"{taken.run_id}:{taken.key}:{taken.role}" + (f":{late}" if late else "")


class ShareEvents(bootsteps.StartStopStep):
    """A step of the worker's consumer: tells the pool children whether task events are wanted, and the clock."""

    requires = ("celery.worker.consumer.events:Events",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        self._timer: Any = None

    def start(self, consumer: Any) -> None:
        """Share now and from now on; called again after each reconnection."""
        self.stop(consumer)
        _share(consumer)
        self._timer = consumer.timer.call_repeatedly(_SHARE_S, _share, (consumer,))

    def stop(self, consumer: Any) -> None:
        """Share no more; what was said last stays true while the connection is away."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()


def _share(consumer: Any) -> None:
    dispatcher = consumer.event_dispatcher
    if dispatcher is not None:
        _shared[0] = dispatcher.enabled and (not dispatcher.groups or "task" in dispatcher.groups)
    _meet_clocks(consumer.app.clock)


def _meet_clocks(clock: Any) -> None:
    """Bring this process's logical clock and the worker's to the later of both."""
    (shared,) = _clock.unpack_from(_shared, 8)
    if shared > clock.value:
        clock.adjust(shared)
    elif shared < clock.value:
        _clock.pack_into(_shared, 8, clock.value)


# -- in a child --------------------------------------------------------------------------------------------------------
@dataclass(slots=True, eq=False)
class Attempt:
    """What the events of one attempt say; instants are seconds since the epoch, `end` is the type of the last event."""

    uuid: str
    name: str
    root: str
    retries: int
    call: str
    began: float
    since: float
    announced: bool = False
    ended: float = 0.0
    runtime: float = 0.0
    end: str = ""
    outcome: dict[str, Any] | None = None


class StepEvents:
    """Sends the task events of the steps of one process, under its worker's name; made anew after a fork."""

    def __init__(self, app: Any, node: str, connection: Mapping[str, Any], show_payloads: bool = False) -> None:
        self._app = app
        self._node = node
        options = dict(connection)
        options["transport_options"] = {**(options.get("transport_options") or {}), **_TIMEOUTS}
        self._options = {**options, "connect_timeout": 1.0}
        self._show = show_payloads
        #: What a task's request says of its arguments, for log lines and the signals' receivers.
        self.representations = {} if show_payloads else {"argsrepr": HIDDEN, "kwargsrepr": HIDDEN}
        self._owner = 0
        self._lock = threading.Lock()
        signals.worker_process_shutdown.connect(self._shut_down)
        signals.worker_shutdown.connect(self._shut_down)

    def begin(self, taken: Taken) -> Attempt | None:
        """Note that the code of an attempt begins; None if no events are wanted."""
        if not wanted() or not self._live_here():
            return None
        attempt = self._attempt(taken)
        self._open[id(attempt)] = attempt
        self._tell()
        return attempt

    def leave(self, attempt: Attempt) -> None:
        """Note that the code of an attempt has ended; whether its outcome counts is not known yet."""
        if not attempt.ended:
            attempt.ended, attempt.runtime = time.time(), monotonic() - attempt.since
        self._open.pop(id(attempt), None)

    def finish(self, attempt: Attempt | None, taken: Taken, outcome: AttemptEnded, retried: bool | None = None) -> None:
        """Send the events of an attempt whose outcome is committed; `retried` is None if only its policy can tell."""
        if not wanted() or not self._live_here():
            return
        if attempt is None or attempt.uuid != task_id(taken) or attempt.retries != taken.attempt - 1:
            attempt = self._attempt(taken)  # its code did not run, or events were not wanted then
        self.leave(attempt)
        attempt.end, attempt.outcome = self._end(taken, outcome, attempt.runtime, retried)
        self._finished.append(attempt)
        if attempt.end == "task-retried":
            self._hurry.set()  # the next attempt may be another child's, and is not to be told before this one
        self._tell()

    def close(self, seconds: float = 1.0) -> None:
        """Publish what waits, for so long at most."""
        if self._owner == os.getpid():
            self._closing.set()
            self._wake.set()
            self._hurry.set()
            self._thread.join(seconds)
            self._owner = 0

    def _shut_down(self, **_: Any) -> None:
        self.close()

    def _attempt(self, taken: Taken) -> Attempt:
        call = saferepr((taken.call or {}).get("a"), _SHOWN) if self._show else HIDDEN
        return Attempt(task_id(taken), taken.task, taken.run_id, taken.attempt - 1, call, time.time(), monotonic())

    def _end(
        self, taken: Taken, outcome: AttemptEnded, runtime: float, retried: bool | None
    ) -> tuple[str, dict[str, Any]]:
        if outcome.verdict == "succeeded":
            result = saferepr(outcome.result, _SHOWN) if self._show else HIDDEN
            return "task-succeeded", {"result": result, "runtime": runtime}
        error = outcome.error or {}
        message = repr(error.get("message")) if self._show else f"'{HIDDEN}'"  # a message may quote an argument
        fields = {
            "exception": f"{error.get('type')}({message})",
            "traceback": error.get("traceback") if self._show else HIDDEN,
        }
        if retried is None:
            retried = outcome.verdict != "rejected" and taken.attempt < _attempts(taken)
        return "task-retried" if retried else "task-failed", fields

    # -- the thread that publishes -------------------------------------------------------------------------------------
    def _live_here(self) -> bool:
        """Tell whether the thread runs in this process, after starting it if need be."""
        if self._owner == os.getpid():
            return True
        with self._lock:
            try:
                if self._owner != os.getpid():
                    self._begin_life()
                return True
            except RuntimeError:  # no more threads, or this process is ending: then there are no events
                return False

    def _begin_life(self) -> None:
        self._open: dict[int, Attempt] = {}
        self._finished: deque[Attempt] = deque(maxlen=_WAITING)
        self._wake, self._hurry, self._closing = threading.Event(), threading.Event(), threading.Event()
        self._producer: Producer | None = None
        self._thread = threading.Thread(target=self._live, name="orchestrator events", daemon=True)
        self._thread.start()
        self._owner = os.getpid()

    def _tell(self) -> None:
        if not self._wake.is_set():
            self._wake.set()

    def _live(self) -> None:
        closing = False
        while not closing:
            self._wake.wait(_LONG_S / 2 if self._open else None)
            self._wake.clear()
            self._hurry.wait(_GATHER_S)
            self._hurry.clear()
            closing = self._closing.is_set()
            while batch := self._batch():
                if not self._publish(batch) and self._closing.wait(_REST_AFTER_FAILURE_S):
                    return

    def _batch(self) -> list[dict[str, Any]]:
        """Return the events of attempts that have gone on for long, and of the next that are finished."""
        now = monotonic()
        finished = [self._finished.popleft() for _ in range(min(_BATCH, len(self._finished)))]
        events: list[dict[str, Any]] = []
        for attempt in finished:
            if not attempt.announced:
                events += _announce(attempt)
            events.append(_event(attempt, attempt.end, attempt.ended, **(attempt.outcome or {})))
        for attempt in list(self._open.values()):
            if not attempt.announced and now - attempt.since >= _LONG_S:
                attempt.announced = True
                events += _announce(attempt)
        return events

    def _publish(self, events: list[dict[str, Any]]) -> bool:
        try:
            self._stamp(events)
            producer = self._opened()
            producer.publish(
                events,
                routing_key="task.multi",
                exchange=self._exchange.name,
                declare=[self._exchange],
                serializer=self._app.conf.event_serializer,
                headers={"hostname": self._node},
                delivery_mode=1,
                retry=False,
            )
            return True
        except Exception as error:
            self._producer = None
            logger.info("%s task events dropped: the broker cannot be reached (%s)", len(events), type(error).__name__)
            return False

    def _stamp(self, events: list[dict[str, Any]]) -> None:
        clock, offset, pid = self._app.clock, utcoffset(), os.getpid()
        _meet_clocks(clock)
        for event in events:
            event.update(hostname=self._node, utcoffset=offset, pid=pid, clock=clock.forward())
        _meet_clocks(clock)

    def _opened(self) -> Producer:
        if self._producer is None:
            connection = Connection(**self._options)
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0.1, timeout=1.0)
            self._exchange = get_exchange(connection, name=self._app.conf.event_exchange)
            self._producer = Producer(connection.default_channel, auto_declare=False)
        return self._producer


def _event(attempt: Attempt, kind: str, at: float, **fields: Any) -> dict[str, Any]:
    # Every event names its task: who did not see the first one, as a Flower that was started later, knows it too.
    return {"type": kind, "uuid": attempt.uuid, "name": attempt.name, "timestamp": at, **fields}


def _announce(attempt: Attempt) -> Iterator[dict[str, Any]]:
    yield _event(
        attempt, "task-received", attempt.began, args="()" if attempt.call != HIDDEN else HIDDEN, kwargs=attempt.call,
        root_id=attempt.root, parent_id=None, retries=attempt.retries, eta=None, expires=None,
    )  # fmt: skip
    yield _event(attempt, "task-started", attempt.began)


def _attempts(taken: Taken) -> int:
    """Return how many attempts the declared policy allows."""
    declared = step_registry.steps.get(taken.task)
    policy = declared.options.retry if declared and taken.role != "probe" else None
    return (policy or (STEP_RETRY if taken.role == "do" else COMPENSATION_RETRY)).maximum_attempts


# -- the log -----------------------------------------------------------------------------------------------------------
class _Discreet(logging.Filter):
    """Keeps doorbells out of the log, and the arguments and results of steps."""

    def __init__(self, show_payloads: bool) -> None:
        super().__init__()
        self._show = show_payloads

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to log `record`; blanks the payloads in it."""
        said = record.args
        if isinstance(said, dict):
            if said.get("name") == DRAIN:
                return record.levelno > logging.INFO
            if not self._show and current_step.get() is not None:
                said.update({key: HIDDEN for key in ("args", "kwargs", "return_value") if key in said})
        elif isinstance(said, tuple) and said[:1] == (DRAIN,):
            return record.levelno > logging.INFO
        return True


def quiet_logs(show_payloads: bool) -> None:
    """Have Celery's lines about tasks say nothing of doorbells or of a step's payloads, in this process."""
    for name in ("celery.worker.strategy", "celery.worker.request", "celery.app.trace"):
        speaker = logging.getLogger(name)
        for other in [each for each in speaker.filters if isinstance(each, _Discreet)]:
            speaker.removeFilter(other)
        speaker.addFilter(_Discreet(show_payloads))
