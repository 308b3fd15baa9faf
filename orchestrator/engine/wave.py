"""Short steps that share a commit, and what becomes of the others where one of them hangs.

Owns what is left to other processes then: outcomes that wait to be recorded, steps that are begun and not run.  Must
never record anything for good: the drain does, once the wave is over.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from orchestrator.engine.session import Session
from orchestrator.machine.journal import AttemptEnded
from orchestrator.store import attempts
from orchestrator.store.turns import Taken

logger = logging.getLogger(__name__)


class Wave:
    """Attempts that are run one after the other: `waiting`, `ended`, or `left`, whose outcomes others record."""

    def __init__(self, session: Session, items: Sequence[Taken]) -> None:
        self._session = session
        self.waiting = deque(items)
        self.ended: list[tuple[Taken, AttemptEnded]] = []
        self.left: list[tuple[Taken, AttemptEnded]] = []
        self.unsure = False  # whether some of what waits or has ended may have been left to others all the same

    def leave_to_others(self) -> None:
        """Leave all but the step that runs to whoever has time for it.

        Called in the midst of that step, by a signal: this touches no connection that it may be using, and never
        raises.  What has no answer is `unsure`.
        """
        if self.unsure or not (self.ended or self.waiting):
            return
        what = f"{len(self.ended)} outcomes and {len(self.waiting)} steps that waited for it"
        self.unsure, failure = True, None
        try:
            with self._session.beside("leaving a wave") as (connection, advancer):
                while self.ended:
                    run_id = self.ended[0][0].run_id
                    of_run = [pair for pair in self.ended if pair[0].run_id == run_id]
                    advancer.leave(connection, of_run, owe=True)
                    self.left += of_run
                    self.ended[:] = [pair for pair in self.ended if pair[0].run_id != run_id]
                queues = attempts.give_back(connection, list(self.waiting))
                self.waiting.clear()
                for queue in {*queues}:
                    self._session.ring(connection, queue, queues.count(queue))
            self.unsure = False
        except Exception as error:
            failure = error
        with suppress(Exception):  # what hangs may be the log
            logger.warning("a step takes longer than it used to: %s are left to others", what, exc_info=failure)
