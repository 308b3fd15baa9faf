"""A run in an environment, as a test sees it: what became of it, and what a person could do about it.

Owns that face.  Reads the database and leaves orders with the client; must never change a run in another way.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from orchestrator.codec import Json
from orchestrator.engine.folding import fold_of
from orchestrator.errors import SagaFailed
from orchestrator.machine.journal import Entry, decode_entry
from orchestrator.machine.states import TERMINAL, RunState
from orchestrator.result import SagaResult
from orchestrator.saga import Saga
from orchestrator.store import runs
from orchestrator.store.recorded import recorded
from orchestrator.testing.stubs import Call

if TYPE_CHECKING:
    from orchestrator.testing.environment import Environment

_TESTER = "test"


class EnvironmentRun:
    """A run of an `Environment`; `result` is the handle that the application has, with all that it can do.

    What gives an order (`signal`, `cancel`, `retry` ...) lets the run go on as far as it can without time passing;
    `finish` lets time pass.
    """

    def __init__(self, environment: Environment, saga: Saga[Any, Any], result: SagaResult) -> None:
        self.environment = environment
        self.saga = saga
        self.result = result
        self.id = result.id

    def __repr__(self) -> str:
        return f"<EnvironmentRun {self.id} of {self.saga.target}: {self.state}>"

    # -- what became of it ---------------------------------------------------------------------------------------------
    @property
    def outcome(self) -> runs.Outcome:
        """How the run stands, all of it read at once."""
        return self.environment.client.outcome(self.id)

    @property
    def state(self) -> str:
        """The state of the run; ``running`` if it waits."""
        return self.outcome.state

    @property
    def output(self) -> Any:
        """What the saga returned, decoded as a caller gets it; None unless it completed."""
        outcome = self.outcome
        return self.saga.codec.decode_result(outcome.output) if outcome.state == RunState.COMPLETED else None

    @property
    def error(self) -> dict[str, Any] | None:
        """What ended the run, or what it goes back from: ``type``, ``message`` and, of an exception, ``traceback``."""
        return self.outcome.error

    @property
    def left(self) -> list[Json]:
        """Effects that happened, or may have, and were not undone, with ``key``, ``task``, ``outcome``."""
        return self.outcome.left

    @property
    def parked(self) -> list[dict[str, Any]]:
        """What waits for a person: ``key``, ``role`` and ``why`` of each."""
        parked: list[Any] = self.outcome.parked
        return parked

    @property
    def awaited(self) -> list[str]:
        """The keys of the signals that it waits for, the oldest first."""
        with self.environment.client.pool.connection() as connection:
            row = runs.run(connection, self.id)
            assert row is not None
            waiting = fold_of(row, runs.history(connection, self.id)).waiting
        return [key for key, step in waiting.items() if step.asked.kind == "signal"]

    @property
    def calls(self) -> list[Call]:
        """Every attempt whose code ran, in order; each begins with (name, role, args, result)."""
        return [call for run_id, call in self.environment.script.calls if run_id == self.id]

    @property
    def entries(self) -> list[Entry]:
        """The journal."""
        return [decode_entry(dict(form)) for _, forms in self.history["journal"] for form in forms]

    @property
    def history(self) -> dict[str, Any]:
        """The run and its journal as JSON: keep it, and ``testing.replay`` proves later code against it."""
        with self.environment.client.pool.connection() as connection:
            return recorded(connection, self.id)

    @property
    def duration(self) -> timedelta:
        """The time from the start of the run to its end, or to now."""
        with self.environment.client.pool.connection() as connection:
            row = runs.run(connection, self.id)
        assert row is not None
        length: timedelta = (row["finished_at"] or self.environment.now) - row["started_at"]
        return length

    def get(self) -> Any:
        """Return the output as ``SagaResult.get`` does.

        Raises: SagaCancelled; SagaFailed also for a run that is parked or waits.
        """
        outcome = self.outcome
        if outcome.state in TERMINAL:
            return self.result._value(outcome, True)
        family = [run for run in self.environment.runs_in("parked") if run.id.startswith(f"{self.id}/")]
        waits = ", ".join([*_why(self), *(f"{child.id} is parked: {why}" for child in family for why in _why(child))])
        text = f"run {self.id} of saga {self.saga.name} is {outcome.state}{': ' if waits else ''}{waits}"
        raise SagaFailed(text, run_id=self.id, state=outcome.state, error=outcome.error, left=self.left)

    # -- what may happen to it -----------------------------------------------------------------------------------------
    def finish(self) -> EnvironmentRun:
        """Skip time until it has ended, is parked, or waits for something that nobody sends; so do all other runs."""
        self.environment.finish()
        return self

    def signal(self, name: str, payload: Any = None, **options: Any) -> EnvironmentRun:
        """Send a signal; see ``SagaResult.signal``."""
        return self._order("signal", name, payload, **options)

    def cancel(self, reason: str = "", by: str = _TESTER) -> EnvironmentRun:
        """Ask to stop and undo."""
        return self._order("cancel", reason=reason, by=by)

    def terminate(self, reason: str = "", by: str = _TESTER) -> EnvironmentRun:
        """Stop now and undo nothing."""
        return self._order("terminate", reason=reason, by=by)

    def pause(self, reason: str = "", by: str = _TESTER) -> EnvironmentRun:
        """Hold the code of the run; what it asked for already goes on."""
        return self._order("pause", reason=reason, by=by)

    def resume(self, reason: str = "", by: str = _TESTER) -> EnvironmentRun:
        """Let a paused run go on."""
        return self._order("resume", reason=reason, by=by)

    def retry(self, key: str = "", *, by: str = _TESTER, reason: str = "") -> EnvironmentRun:
        """Try a parked step, probe or undo again; without `key` a run that is parked as a whole."""
        return self._order("retry", key, by=by, reason=reason)

    def skip(self, key: str, *, by: str = _TESTER, reason: str = "") -> EnvironmentRun:
        """Go on without a parked step or undo."""
        return self._order("skip", key, by=by, reason=reason)

    def resolve(
        self, key: str = "", value: Json = None, *, no_effect: bool = False, by: str = _TESTER, reason: str = ""
    ) -> EnvironmentRun:
        """Vouch for what became of a parked step: `value` is its result as JSON, or it had `no_effect`."""
        return self._order("resolve", key, value, no_effect=no_effect, by=by, reason=reason)

    def _order(self, order: str, *args: Any, **options: Any) -> EnvironmentRun:
        getattr(self.result, order)(*args, **options)
        self.environment.drain()
        return self


def _why(run: EnvironmentRun) -> list[str]:
    return [f"{item['key'] or 'the run'}: {item['why']}" for item in run.parked]
