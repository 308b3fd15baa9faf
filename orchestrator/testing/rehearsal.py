"""A run from its start to its end in one process, in virtual time.

Owns what workers, pump and database do together in production, shrunk to a heap of events. Must never
decide: every turn is the machine's. Steps that are due at once begin all before the first of them ends, as on
a cluster with room for all.
"""

from __future__ import annotations

import heapq
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final

from orchestrator.codec import Json, copied, describe_exception, dumps, loads
from orchestrator.errors import DriftError, UsageError, message_of
from orchestrator.machine.fold import Fold, RunInfo
from orchestrator.machine.journal import (
    Arrival,
    AttemptEnded,
    Entry,
    NewChild,
    Parked,
    Post,
    Withdrawn,
    Work,
    decode_entry,
    encode,
)
from orchestrator.machine.states import TERMINAL, RunState
from orchestrator.machine.turn import CodeError, Execution, Turn
from orchestrator.saga import Saga
from orchestrator.saga import registry as sagas
from orchestrator.step import StepContext
from orchestrator.testing.stubs import Attempt, Call, Cast

MAX_EVENTS: Final = 100_000

Row = tuple[datetime, list[Json]]


class Rehearsal:
    """A run that is driven until it ends, is parked, or waits for something that nobody will send."""

    def __init__(self, saga: Saga[Any, Any], info: RunInfo, cast: Cast, *, replays: bool) -> None:
        self.saga = saga
        self.info = info
        self.rows: list[Row] = []
        self.calls: list[Call] = []
        self.now = info.started
        self._cast = cast
        self._replays = replays
        self._execution = self._loaded()
        self._events: list[tuple[datetime, int, Work | Arrival]] = []
        self._event_count = 0
        self._wake: datetime | None = info.started
        self._parent: Rehearsal | None = None
        self._family: dict[str, Rehearsal] = {}

    @property
    def fold(self) -> Fold:
        """The run as its journal tells it."""
        return self._execution.fold

    @property
    def entries(self) -> list[Entry]:
        """The journal, decoded."""
        return [decode_entry(_object(form)) for _, forms in self.rows for form in forms]

    @property
    def waits_for(self) -> Rehearsal | None:
        """The child that is parked and that this run therefore waits for, if there is one; or a child of a child."""
        for child in self._family.values():
            if child.fold.state is RunState.PARKED:
                return child
            if child.fold.state not in TERMINAL and (found := child.waits_for) is not None:
                return found
        return None

    def send(self, arrival: Arrival, at: datetime | None = None) -> None:
        """Have something arrive at `at` (default: now)."""
        self._plan(at or self.now, arrival)

    def play(self) -> None:
        """Let time pass.  Raises: UsageError if the run makes no end."""
        for _ in range(MAX_EVENTS):
            due = self._next_due()
            if due is None:
                return
            self.now = max(self.now, due)
            self._happen()
        raise UsageError(
            f"saga {self.saga.name} has not ended after {MAX_EVENTS:,} events, at {self.now}; does it loop for ever?"
        )

    # -- events --------------------------------------------------------------------------------------------
    def _plan(self, at: datetime, event: Work | Arrival) -> None:
        self._event_count += 1
        heapq.heappush(self._events, (at, self._event_count, event))

    def _next_due(self) -> datetime | None:
        if self.fold.state in TERMINAL:
            return None
        wake = self._wake
        if self.fold.state is RunState.PARKED and wake == self.info.deadline:
            wake = None  # whoever mends a parked run is assumed to be in time
        return min(filter(None, (wake, self._events[0][0] if self._events else None)), default=None)

    def _happen(self) -> None:
        if not self._events or self._events[0][0] > self.now:
            self._turn([])
            return
        _, _, event = heapq.heappop(self._events)
        if isinstance(event, Work):
            self._begin(event)
        else:
            self._turn([event])

    def _begin(self, work: Work) -> None:
        details: list[Json] = []
        context = StepContext(
            run_id=self.info.id,
            key=work.key,
            attempt=work.attempt + 1,
            idempotency_key=_idempotency_key(self.info.id, work),
            deadline=self.now + timedelta(seconds=work.call.get("t", 0)),
            heartbeat_details=copied(work.call.get("d")),
            undoes=_key_of_step(self.info.id, work) if work.role == "undo" else "",
            beat=lambda told: None if told is None else details.append(told),
        )
        once = self._execution.function_of(work.key) if work.role == "once" else None
        if self._execution.is_ahead:
            self._execution.discard()
            self._execution = self._loaded()
        attempt = self._cast.play(work, context, once)
        self.calls.append(attempt.call)
        self._plan(self.now + attempt.duration, self._report(work, attempt, details))

    def _report(self, work: Work, attempt: Attempt, details: list[Json]) -> AttemptEnded:
        return AttemptEnded(
            work.key,
            "do" if work.role == "once" else work.role,
            work.attempt + 1,
            attempt.verdict,
            attempt.result,
            attempt.error,
            worker="testing",
            began=self.now.isoformat(),
            details=details[-1] if details else None,
        )

    # -- turns ---------------------------------------------------------------------------------------------
    def _turn(self, arrivals: list[Arrival]) -> None:
        if self._replays:
            self._execution.discard()
            self._execution = self._loaded()
        try:
            turn = self._execution.turn(arrivals, self.now)
        except (DriftError, CodeError) as error:
            self._execution.discard()
            self._execution = self._loaded()
            turn = self._execution.turn(arrivals, self.now, _park(error))
        self._commit(turn)

    def _commit(self, turn: Turn) -> None:
        self.rows.append((turn.at, [loads(dumps(encode(entry))) for entry in turn.entries]))
        self._wake = turn.wake
        for work in turn.work:
            self._plan(max(work.due or self.now, self.now), work)
        for key in turn.withdraw:
            self._withdraw(key)
        for step in turn.locks:  # nobody else is there who could hold one
            self._plan(self.now, AttemptEnded(step.key, "do", 1, "succeeded"))
        for child in turn.children:
            self._bear(child)
        for post in turn.posts:
            self._deliver(post)
        if turn.state is RunState.CONTINUED:
            self._go_on(turn)

    def _bear(self, child: NewChild) -> None:
        """Play a child to where it waits or is done; what it reports comes at its own time."""
        saga = sagas.sagas[child.saga, child.version]
        deadline = self.now + timedelta(seconds=child.deadline) if child.deadline else None
        info = RunInfo(
            child.id, child.saga, child.version, child.input, self.now, child.queue, deadline, child.priority,
            self.info.id,
        )  # fmt: skip
        born = self._family[child.id] = Rehearsal(saga, info, self._cast, replays=self._replays)
        born._parent, born.calls = self, self.calls
        born.play()

    def _deliver(self, post: Post) -> None:
        other = self._family.get(post.run_id)
        if other is not None:
            other.send(post.arrival, max(self.now, other.now))
            other.play()
        elif self._parent is not None and post.run_id == self._parent.info.id:
            self._parent.send(post.arrival, max(self.now, self._parent.now))

    def _go_on(self, turn: Turn) -> None:
        """Begin the next link of a run that is continued as new; its journal is what is seen from then on."""
        continued = self.fold.continued
        assert continued is not None
        self.saga = sagas.sagas[self.info.saga, continued.version]
        self.info = replace(
            self.info, version=continued.version, input=continued.input, started=self.now, link=self.info.link + 1
        )
        self.rows = [(self.now, [loads(dumps(encode(entry))) for entry in turn.seed])] if turn.seed else []
        self._execution = self._loaded()
        self._wake = self.now

    def _withdraw(self, key: str) -> None:
        """Take back what has not begun; what has begun ends by itself."""
        kept = [event for event in self._events if not _is_forward_work(event[2], key)]
        if len(kept) < len(self._events):
            self._events = kept
            heapq.heapify(self._events)
            self._plan(self.now, Withdrawn(key))

    def _loaded(self) -> Execution:
        execution = Execution(self.info, self.saga.script())
        execution.catch_up((at, [decode_entry(_object(form)) for form in forms]) for at, forms in self.rows)
        return execution

    # -- recorded ------------------------------------------------------------------------------------------
    def history(self) -> dict[str, Json]:
        """Return the run with its whole journal as JSON."""
        deadline = self.info.deadline
        family: dict[str, Json] = {"parent": self.info.parent, "link": self.info.link}
        return {
            **{name: value for name, value in family.items() if value},
            "saga": self.info.saga,
            "version": self.info.version,
            "id": self.info.id,
            "input": self.info.input,
            "started": self.info.started.isoformat(),
            "deadline": deadline.isoformat() if deadline else None,
            "journal": [[at.isoformat(), forms] for at, forms in self.rows],
        }


def _park(error: DriftError | CodeError) -> Parked:
    if isinstance(error, DriftError):
        return Parked("", "drift", str(error), describe_exception(error))
    return Parked("", "code", f"the saga function itself is wrong: {message_of(error.error)}", error.error)


def _is_forward_work(event: Work | Arrival, key: str) -> bool:
    return isinstance(event, Work) and event.key == key and event.role in ("do", "once")


def _key_of_step(run_id: str, work: Work) -> str:
    return f"{run_id}~{work.call['k']}:{work.key}" if work.call.get("k") else f"{run_id}:{work.key}"


def _idempotency_key(run_id: str, work: Work) -> str:
    key = _key_of_step(run_id, work)
    if work.role != "undo":
        return key
    late = work.call.get("l")
    return f"{key}:undo:{late}" if late else f"{key}:undo"


def _object(form: Json) -> dict[str, Any]:
    assert isinstance(form, dict)
    return dict(form)
