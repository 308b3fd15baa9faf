"""What a caller holds of a run: a handle in the manner of Celery's AsyncResult.

Owns what it offers; a `Client` does the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import threading
from typing import TYPE_CHECKING, Any

from orchestrator.codec import Json
from orchestrator.errors import SagaCancelled, SagaFailed, UnknownSagaError, UsageError, as_typed, message_of
from orchestrator.machine.states import TERMINAL
from orchestrator.saga import Saga
from orchestrator.saga import registry as sagas
from orchestrator.store import runs

if TYPE_CHECKING:
    from orchestrator.client import Client


class SagaResult:
    """A handle to a run, in the manner of Celery's AsyncResult.

    It can be copied, and pickled: where it is unpickled it belongs to the app that its saga is bound to there.
    """

    backend = None  # results are in Postgres; Celery's tools, such as Flower, ask each handle for its backend

    def __init__(self, client: Client, run_id: str, saga: Saga[Any, Any] | None) -> None:
        self.id = run_id
        self._client = client
        self._saga = saga
        self.ended: runs.Outcome | None = None  # how the run ended, once that is known: it is final

    def __repr__(self) -> str:
        return f"<SagaResult {self.id}>"

    def __str__(self) -> str:
        return self.id

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the id of the run and the name of its saga.  Raises: UsageError without a saga."""
        saga = self._saga
        if saga is None:
            raise UsageError(
                f"this handle to run {self.id} knows no saga, by which another process would find its database again; "
                "pass the run id on, and take `saga.AsyncResult(run_id)` there"
            )
        return _found_again, (saga.__module__, saga.name, saga.options.version, self.id)

    def __copy__(self) -> SagaResult:
        copied = SagaResult(self._client, self.id, self._saga)
        copied.ended = self.ended
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> SagaResult:
        return self.__copy__()

    @property
    def task_id(self) -> str:
        """The run id, under Celery's name."""
        return self.id

    @property
    def status(self) -> str:
        """The state of the run now, one of the run states.  Raises: UnknownRunError, StoreUnavailableError."""
        return self._client.outcome(self.id).state

    state = status

    @property
    def result(self) -> Any:
        """What the run returned, or the error in which it ended, which is not raised; None while it has not ended."""
        outcome = self._client.outcome(self.id)
        return self._value(outcome, False) if outcome.state in TERMINAL else None

    @property
    def traceback(self) -> str | None:
        """Where the error came from in which the run ended, if it came from a traceback."""
        error: Any = self._client.outcome(self.id).error or {}
        return error.get("traceback") or None

    @property
    def left(self) -> list[Json]:
        """Effects that were not undone: key, task and outcome of each."""
        return self._client.outcome(self.id).left

    @property
    def published(self) -> Any:
        """What the run shows of itself: what it published last, and its progress."""
        return self._client.outcome(self.id).published or {}

    @property
    def parked(self) -> list[Json]:
        """What waits for an operator: key, role and why of each."""
        return self._client.outcome(self.id).parked

    def ready(self) -> bool:
        """Tell whether the run is terminal."""
        return self.status in TERMINAL

    def successful(self) -> bool:
        """Tell whether the run completed."""
        return self.status == "completed"

    def failed(self) -> bool:
        """Tell whether the run is terminal and did not complete."""
        return self.status in TERMINAL - {"completed", "continued"}

    def get(self, timeout: float | None = None, propagate: bool = True) -> Any:
        """Wait for the run and return its result; `timeout` is in seconds, with 0 for one that has ended already.

        Raises: SagaFailed, SagaCancelled (unless `propagate` is false: then they are returned), TimeoutError.
        """
        if self.ended is None and timeout is not None and timeout <= 0:
            self.ended = self._ended_by_now(timeout)
        if self.ended is None:
            future = self._client.wait(self.id)
            try:
                self.ended = future.result(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
            except TimeoutError:
                raise self._late(timeout) from None
            finally:
                self._client.forget(self.id, future)
        return self._value(self.ended, propagate)

    async def aget(self, timeout: float | None = None, propagate: bool = True) -> Any:
        """Wait without blocking the event loop; see `get`."""
        if self.ended is None and timeout is not None and timeout <= 0:
            self.ended = await asyncio.to_thread(self._ended_by_now, timeout)
        if self.ended is None:
            future = self._client.wait(self.id)
            try:
                self.ended = await asyncio.wait_for(asyncio.wrap_future(future), timeout)
            except TimeoutError:
                raise self._late(timeout) from None
            finally:
                self._client.forget(self.id, future)
        return self._value(self.ended, propagate)

    def signal(self, name: str, payload: Any = None, *, id: str | None = None) -> str:
        """Tell the run something, for `saga.wait_signal`; returns the signal's id, by which a second one is dropped.

        Raises: UsageError if the run has ended, or its saga declares no such signal; PayloadError.
        """
        return self._client.signal(self.id, name, payload, id)

    def cancel(self, reason: str = "", by: str = "") -> None:
        """Ask the run to stop and compensate.  Raises: UsageError if it has ended or is past its pivot."""
        self._client.cancel(self.id, reason, by)

    def terminate(self, reason: str = "", by: str = "") -> None:
        """Stop the run and undo nothing; `left` tells what is left.  Raises: UsageError if it has ended."""
        self._client.terminate(self.id, reason, by)

    def pause(self, reason: str = "", by: str = "") -> None:
        """Resume no code of the run until it is resumed; steps that it has asked for go on, and are recorded.

        Pausing twice is pausing once.  Raises: UsageError if it has ended or is being undone.
        """
        self._client.operate(self.id, "pause", by=by, reason=reason)

    def resume(self, reason: str = "", by: str = "") -> None:
        """Let a paused run go on.  Raises: UsageError if it has ended."""
        self._client.operate(self.id, "resume", by=by, reason=reason)

    def retry(self, key: str = "", reason: str = "", by: str = "") -> None:
        """Try a parked key again, or with no key a run that parked as a whole.  Raises: UsageError."""
        self._client.operate(self.id, "retry", key, by=by, reason=reason)

    def skip(self, key: str, reason: str = "", by: str = "") -> None:
        """Go on without a parked key; it is listed in `left`.  Raises: UsageError."""
        self._client.operate(self.id, "skip", key, by=by, reason=reason)

    def resolve(
        self, key: str = "", value: Json = None, *, no_effect: bool = False, reason: str = "", by: str = ""
    ) -> None:
        """Settle a parked key by hand: with its result, or (`no_effect`) as having had none.  Raises: UsageError."""
        self._client.operate(self.id, "resolve", key, by=by, reason=reason, value=value, no_effect=no_effect)

    def _ended_by_now(self, timeout: float) -> runs.Outcome:
        outcome = self._client.outcome(self.id)
        if outcome.state not in TERMINAL:
            raise self._late(timeout)
        return outcome

    def _late(self, timeout: float | None) -> TimeoutError:
        how = f"it may be parked or go on: ask again, or see `saga explain {as_typed(self.id)}`"
        return TimeoutError(f"run {self.id} was not finished within {timeout} s; {how}")

    def _value(self, outcome: runs.Outcome, propagate: bool) -> Any:
        if outcome.state == "completed":
            saga = self._saga
            if saga is None or (saga.name, saga.options.version) != (outcome.saga, outcome.version):
                saga = saga_of(outcome)  # other versions may return something else
            return saga.codec.decode_result(outcome.output) if saga else outcome.output
        error = outcome.error or {}
        what = f"{error.get('type')}: {message_of(error)}" if error else "see `saga show`"
        text = f"run {self.id} of {outcome.saga} ended {outcome.state}: {what}"
        kind = SagaCancelled if outcome.state == "cancelled" else SagaFailed
        failure = kind(text, run_id=self.id, state=outcome.state, error=outcome.error, left=tuple(outcome.left))
        if propagate:
            raise failure
        return failure


def _found_again(module: str, name: str, version: int, run_id: str) -> SagaResult:
    """Return a handle in the process that it has come to, over the app that the saga is bound to there.

    Raises: UnknownSagaError, UsageError if it is bound to none.
    """
    if (name, version) not in sagas.sagas:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)  # as pickle does for whatever it finds by its name
    return (sagas.sagas.get((name, version)) or sagas.latest(name)).AsyncResult(run_id)


def saga_of(outcome: runs.Outcome) -> Saga[Any, Any] | None:
    """Return the saga of a run, if it is registered in this process."""
    try:
        return sagas.sagas.get((outcome.saga, outcome.version)) or sagas.latest(outcome.saga)
    except UnknownSagaError:
        return None
