"""From what has arrived at a run to its turn: its code is resumed under watch, and the run parked if that cannot be.

Owns what saga code may do to the process that resumes it.  Must never commit anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from orchestrator.engine.cache import Executions
from orchestrator.errors import DriftError, describe_exception, message_of
from orchestrator.machine.journal import Arrival, AttemptEnded, Parked, decode_arrival
from orchestrator.machine.loop import BlockedError
from orchestrator.machine.states import RunState
from orchestrator.machine.turn import CodeError, CodeMissing, Execution, Turn
from orchestrator.store.connection import Connection
from orchestrator.store.turns import Loaded, Taken

logger = logging.getLogger(__name__)
_NEVER = datetime.min.replace(tzinfo=UTC)
NO_TURN = Turn(0, _NEVER, _NEVER, [], [], [], [], RunState.PENDING, None, False)


class Computer:
    """Computes the turns of the runs that a child knows; `interrupted` tells whether a signal has raised SystemExit."""

    def __init__(
        self, runs: Executions, watch_code: AbstractContextManager[object], interrupted: Callable[[], bool]
    ) -> None:
        self._runs = runs
        self.watch_code = watch_code  # may be held over several turns: setting the alarm costs two system calls
        self._interrupted = interrupted

    def turn(
        self,
        connection: Connection,
        loaded: Loaded,
        outcomes: Sequence[AttemptEnded] = (),
        park: Parked | None = None,
    ) -> tuple[Execution | None, Turn]:
        """Return a run's execution, ahead by the turn that comes with it; None if there is no such run any more.

        With `park` without saga code.  Raises: CodeMissing.
        """
        arrived: list[Arrival] = [decode_arrival(arrival) for _, arrival in loaded.arrivals]
        arrived.extend(outcomes)
        execution = self._runs.take(loaded)
        if execution is None:
            return None, NO_TURN
        before, turn = self._interrupted(), NO_TURN
        problem: BaseException | None = None
        try:
            with self.watch_code:
                turn = execution.turn(arrived, loaded.now, park)
        except CodeMissing:
            raise
        except (Exception, BlockedError) as error:
            problem = error
        interrupted = self._interrupted() != before
        if problem is None and not interrupted:
            return execution, turn
        self._runs.forget(loaded.run.id)
        execution.discard()
        if interrupted:
            return self._again(connection, loaded, outcomes, park)
        assert problem is not None
        return self._park(connection, loaded, arrived, problem)

    def _again(
        self, connection: Connection, loaded: Loaded, outcomes: Sequence[AttemptEnded], park: Parked | None
    ) -> tuple[Execution | None, Turn]:
        """A SystemExit that a signal raised in saga code was kept by its task; nothing of that is the saga's doing."""
        again = self._runs.load(connection, loaded.run.id)
        if again is None or _has_moved(again, loaded):
            return None, NO_TURN
        return self.turn(connection, replace(again, arrivals=loaded.arrivals), outcomes, park)

    def _park(
        self, connection: Connection, loaded: Loaded, arrived: Sequence[Arrival], error: BaseException
    ) -> tuple[Execution | None, Turn]:
        """A turn that cannot be computed parks the run: what arrived is recorded, saga code is left alone."""
        if isinstance(error, DriftError):
            cause = error.__cause__  # what the saga function raised before it came to what is recorded
            park = Parked("", "drift", str(error), describe_exception(cause) if cause is not None else None)
        elif isinstance(error, CodeError):
            why = f"the saga function raised {error.error.get('type')}: {message_of(error.error)}"
            park = Parked("", "code", why, error.error)
        elif isinstance(error, BlockedError):
            park = Parked("", "code", str(error), describe_exception(error))
        else:
            logger.exception("run %s: its turn could not be computed", loaded.run.id)
            park = Parked("", "code", f"its turn could not be computed: {error!r:.500}", describe_exception(error))
        again = self._runs.load(connection, loaded.run.id)
        if again is None or _has_moved(again, loaded):
            return None, NO_TURN
        execution = self._runs.take(again)
        if execution is None:
            return None, NO_TURN
        return execution, execution.turn(arrived, again.now, park)

    def function_of(self, connection: Connection, taken: Taken) -> Callable[[], Any] | None:
        """Return the function of a ``saga.once`` that was begun here."""
        loaded = self._runs.known(connection, taken.run_id, taken.position)
        execution = self._runs.take(loaded) if loaded else None
        if execution is None:
            return None
        before = self._interrupted()
        function: Callable[[], Any] | None = None
        problem: BaseException | None = None
        try:
            with self.watch_code:
                function = execution.function_of(taken.key)
        except (Exception, BlockedError) as error:
            problem = error
        if self._interrupted() != before:  # see `_again`
            execution.discard()
            return self.function_of(connection, taken)
        if problem is not None:
            execution.discard()
            logger.warning("run %s step %s: %s", taken.run_id, taken.key, problem)
            return None
        if execution.is_ahead:
            execution.discard()
        else:
            self._runs.remember(execution)
        return function


def _has_moved(again: Loaded, loaded: Loaded) -> bool:
    """Tell whether somebody else has committed a turn since: it may have taken in what was loaded before it."""
    return again.run.position != loaded.run.position
