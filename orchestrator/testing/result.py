"""``testing.run`` and what it returns.

Owns the face of a rehearsal towards a unit test. Must never change a run but through what an
operator could do.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from orchestrator.canvas.starting import Durable, run_canvas
from orchestrator.codec import Json, check
from orchestrator.errors import SagaCancelled, SagaFailed, UsageError, message_of
from orchestrator.machine.fold import RunInfo
from orchestrator.machine.journal import Cancel, Entry, Operate, Parked, Signal, Terminate
from orchestrator.machine.states import TERMINAL, RunState
from orchestrator.saga import Saga
from orchestrator.saga.signals import payload_of
from orchestrator.step import Step
from orchestrator.testing.rehearsal import Rehearsal
from orchestrator.testing.stubs import Call, Cast

STARTED: Final = datetime(2026, 1, 1, tzinfo=UTC)
_TESTER: Final = "test"


class TestRun:
    """A run of ``testing.run``: what became of it, and how it came about.

    A run that is parked can be mended with `retry`, `skip` or `resolve`; it then goes on, and this object
    tells the new state.
    """

    __test__ = False  # not a test, whatever pytest makes of its name

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal = rehearsal

    def __repr__(self) -> str:
        return f"<TestRun of {self._rehearsal.saga.target}: {self.state} after {self.duration}>"

    # -- what became of it ---------------------------------------------------------------------------------
    @property
    def state(self) -> str:
        """The state of the run; ``running`` if it waits for something that nobody will send."""
        return self._rehearsal.fold.state.value

    @property
    def output(self) -> Any:
        """What the saga returned, decoded as a caller gets it; None unless it completed."""
        returned = self._rehearsal.fold.returned
        if self.state != RunState.COMPLETED or returned is None:
            return None
        return self._rehearsal.saga.codec.decode_result(returned.output)

    @property
    def error(self) -> dict[str, Any] | None:
        """What ended or parked the run, or the child that it waits for: ``type``, ``message``, of an exception also
        ``traceback``."""
        fold = self._rehearsal.fold
        if self.state == RunState.PARKED:
            parked = next(e for e in reversed(self.entries) if isinstance(e, Parked))
            return {**(parked.error or {"type": "Parked"}), "message": self._why_parked(parked)}
        if fold.rollback is not None and fold.rollback.error is not None:
            return fold.rollback.error
        return fold.raised or self._error_of_child

    @property
    def _error_of_child(self) -> dict[str, Any] | None:
        """Why a child is parked that the run waits for."""
        child = None if self._rehearsal.fold.state in TERMINAL else self._rehearsal.waits_for
        error = TestRun(child).error if child is not None else None
        if child is None or error is None:
            return None
        return {**error, "message": f"child {child.info.id} is parked: {error['message']}"}

    @staticmethod
    def _why_parked(parked: Parked) -> str:
        said = message_of(parked.error or {}) or parked.why
        why = f"{parked.key}: {parked.why}" if parked.key else parked.why
        return why if why.endswith(said) else f"{why} ({said})"

    @property
    def left(self) -> list[Json]:
        """Effects that happened, or may have, and were not undone, with ``key``, ``task``, ``outcome``."""
        ended = self._rehearsal.fold.ended
        return list(ended.left) if ended else []

    @property
    def calls(self) -> list[Call]:
        """Every attempt that was made, in order; each begins with (name, role, args, result)."""
        return list(self._rehearsal.calls)

    @property
    def entries(self) -> list[Entry]:
        """The journal."""
        return self._rehearsal.entries

    @property
    def duration(self) -> timedelta:
        """The virtual time that passed."""
        return self._rehearsal.now - self._rehearsal.info.started

    @property
    def history(self) -> dict[str, Json]:
        """The run and its journal as JSON: keep it, and ``testing.replay`` proves later code against it."""
        return self._rehearsal.history()

    def result(self) -> Any:
        """Return the output as ``SagaResult.get`` does.

        Raises: SagaCancelled; SagaFailed also for a run that is parked or waits for ever.
        """
        state = self.state
        if state == RunState.COMPLETED:
            return self.output
        kind = SagaCancelled if state == RunState.CANCELLED else SagaFailed
        error = self.error or {}
        said = f": {error.get('type')}: {message_of(error)}" if error else ""
        child = self._error_of_child
        said += f"; {child['message']}" if child is not None and child != error else ""
        run_id = self._rehearsal.info.id
        text = f"run {run_id} of saga {self._rehearsal.saga.name} is {state}{said}"
        raise kind(text, run_id=run_id, state=state, error=error, left=self.left)

    # -- what a person can do ------------------------------------------------------------------------------
    def cancel(self, reason: str = "") -> TestRun:
        """Ask to stop and undo, now, and let the run go on."""
        return self._send(Cancel(_TESTER, reason))

    def terminate(self, reason: str = "") -> TestRun:
        """Stop now and undo nothing."""
        return self._send(Terminate(_TESTER, reason))

    def signal(self, name: str, payload: Any = None) -> TestRun:
        """Tell the run something that it waits for."""
        rehearsal = self._rehearsal
        return self._send(Signal(name, str(uuid.uuid4()), payload_of(rehearsal.info.id, rehearsal.saga, name, payload)))

    def retry(self, key: str = "", *, by: str = _TESTER, reason: str = "") -> TestRun:
        """Try a parked step, probe or undo again; without `key` a run that is parked as a whole."""
        return self._operate(Operate("retry", key, by, reason))

    def skip(self, key: str, *, by: str = _TESTER, reason: str = "") -> TestRun:
        """Go on without a parked step or undo."""
        return self._operate(Operate("skip", key, by, reason))

    def resolve(
        self,
        key: str = "",
        value: Json = None,
        *,
        no_effect: bool = False,
        by: str = _TESTER,
        reason: str = "",
    ) -> TestRun:
        """Vouch for what became of a parked step: `value` is its result as JSON, or it had `no_effect`."""
        return self._operate(Operate("resolve", key, by, reason, value, no_effect))

    def _operate(self, order: Operate) -> TestRun:
        fold = self._rehearsal.fold
        parked = order.key in fold.parked_keys if order.key else fold.parked is not None
        if not parked:
            what = f"step {order.key!r}" if order.key else "the run as a whole"
            known = ", ".join(sorted(fold.parked_keys)) or "no step"
            raise UsageError(f"{order.action}: {what} is not parked; parked here: {known}")
        return self._send(order)

    def _send(self, arrival: Cancel | Terminate | Operate | Signal) -> TestRun:
        self._rehearsal.send(arrival)
        self._rehearsal.play()
        return self


def as_saga(
    played: Saga[Any, Any] | Durable, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Saga[Any, Any], tuple[Any, ...], dict[str, Any]]:
    """Return a saga and its arguments; a durable canvas is one of the saga that runs it.  Raises: UsageError."""
    if isinstance(played, Durable):
        return run_canvas, (played.called_with(args, kwargs),), played.options
    if isinstance(played, Step):
        raise UsageError(f"a saga is wanted here, and {played.name} is a step, which a test just calls")
    if not isinstance(played, Saga):
        what = type(played).__name__
        if inspect.isroutine(played):
            what = f"the function {played.__name__}; declare it with @saga.define"
        raise UsageError(f"a saga is wanted here, not {what}")
    return played, args, dict(kwargs)


def run(
    saga: Saga[Any, Any] | Durable,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    stubs: Mapping[Any, Any] | None = None,
    connection: Any = None,
    cancel_at: timedelta | None = None,
    deadline: timedelta | None = None,
    task_id: str = "test-run",
    started: datetime = STARTED,
    signals: Iterable[tuple[str, Any]] = (),
    replay: bool = True,
) -> TestRun:
    """Run a saga, or a durable canvas, here and now, with stubbed steps and skipped time, until it ends or is parked.

    `args` and `kwargs` are the saga's. `stubs` has, by step, probe, compensation, Celery task or name, who
    plays it: a function of the same parameters (without the connection of a transactional step), an
    exception to raise, `After` for one that takes time, a list of these for one attempt each (its last one
    stays), or else the result itself. A step without a stub is called as it is; a transactional one on
    `connection`, under a savepoint. An exception leaves the outcome in doubt, unless it is `Rejected` or
    declared non-retryable; pauses between attempts pass at once. `cancel_at` cancels after that much
    virtual time, `deadline` overrides the saga's, `started` (aware) is when virtual time begins, `signals` are
    names and payloads that it is told at its start. Children are played as well, and locks are free. With
    `replay` saga code starts anew from the recorded journal at every turn, as it may in production; what is
    not deterministic then parks the run as drift.
    Raises: PayloadError for input, or a signal, that cannot be stored; UsageError for a step that cannot be called
    here, or a signal that the saga does not have.
    """
    saga, args, kwargs = as_saga(saga, args, kwargs or {})
    encoded = saga.codec.encode_call(args, kwargs)
    check(encoded, what=f"the input of {saga.name}")
    limit = deadline if deadline is not None else saga.options.deadline
    info = RunInfo(
        id=task_id,
        saga=saga.name,
        version=saga.options.version,
        input=encoded,
        started=started,
        queue=saga.options.queue,
        deadline=started + limit if limit is not None else None,
        priority=saga.options.priority,
    )
    rehearsal = Rehearsal(saga, info, Cast(stubs or {}, connection), replays=replay)
    for number, (name, payload) in enumerate(signals):
        rehearsal.send(Signal(name, f"signal {number}", payload_of(task_id, saga, name, payload)), started)
    if cancel_at is not None:
        rehearsal.send(Cancel(_TESTER, "cancel_at"), started + cancel_at)
    rehearsal.play()
    return TestRun(rehearsal)
