"""What a worker's child holds: its connection and the permit for it, its mark as a drainer, its live coroutines.

Owns when they are opened, lent and dropped.  Must never run the code of a step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from orchestrator.engine.advance import Advancer
from orchestrator.engine.commit import Identity, Scope
from orchestrator.engine.worker import Worker
from orchestrator.errors import StoreUnavailableError
from orchestrator.failpoints import failpoint
from orchestrator.store import liveness, pauses, runs
from orchestrator.store.connection import UNAVAILABLE, WORKER_PATIENCE_S, Connection, open_connection
from orchestrator.store.permits import Permit

_ROOM_S = 0.05  # how long to wait for a permit when nothing needs one
_KNOWN_S = 1.0  # how long a drain goes by what it has heard of pauses


class DeclaredDeadError(StoreUnavailableError):
    """The worker has lost its incarnation, and with it all that was begun for it; its companion takes another one."""


class OrphanedError(DeclaredDeadError):
    """The worker stops and has lost its incarnation: nobody makes it another one, and what it began is in doubt."""


class Session:
    """One child's hold on the database, under the present incarnation of its worker."""

    def __init__(self, worker: Worker, scope: Scope) -> None:
        self._worker, self._scope = worker, scope
        self._permit: Permit | None = None
        self.advancer: Advancer | None = None  # that of the present incarnation, if there is one yet
        self._marked: Identity | None = None
        self._known_until = 0.0
        self.connection: Connection | None = None
        self.paused = pauses.NOTHING
        self.is_new = False  # whether what was begun for this child may be unknown to it

    def ready(self) -> tuple[Connection, Advancer]:
        """Return connection and advancer of the present incarnation, opening what is missing."""
        if self.connection is not None and self.connection.closed:
            self.drop()
        if self.connection is None:
            if self._worker.permits is not None and self._permit is None:
                self._permit = self._worker.permits.take()
            self.connection = self._open(f"child of {self._worker.runner.worker}")
            self.is_new = self.is_new or self.advancer is None
        if self.advancer is None:
            identity = self._worker.identity()
            if not self._mark(self.connection, identity):
                if self._worker.stopping():
                    raise OrphanedError("this worker was declared dead while it was stopping")
                raise DeclaredDeadError("this worker was declared dead and is taking a new incarnation; try again")
            liveness.outlast(self.connection, identity.incarnation, identity.child)
            self.advancer = Advancer(
                self._worker.script_of,
                self._scope,
                identity,
                self.ring,
                self._worker.settings.cache_runs,
                self._worker.seconds,
                self._worker.watch_code,
                self._worker.interrupted,
            )
        return self.connection, self.advancer

    def has_room(self) -> bool:
        """Take a permit; False if all are in use: who has one looks for more work before he gives it back.

        So who only answers a doorbell does not stand in the way of those who have outcomes to record.
        """
        if self._worker.permits is None or self._permit is not None:
            return True
        try:
            self._permit = self._worker.permits.take(_ROOM_S)
        except StoreUnavailableError:
            return False
        return True

    def _open(self, name: str) -> Connection:
        settings = self._worker.settings
        return open_connection(
            settings.dsn, name=name, prepare=settings.prepared_statements, patience_s=WORKER_PATIENCE_S
        )

    @contextmanager
    def beside(self, name: str) -> Iterator[tuple[Connection, Advancer]]:
        """Lend another connection for a moment, while the child's own may be in use."""
        assert self.advancer is not None
        connection = self._open(name)
        try:
            yield connection, self.advancer
        finally:
            connection.close()

    # -- the mark that keeps others from ringing -----------------------------------------------------------------------
    def enter(self) -> bool:
        """Mark that this child drains; False if the mark is under a new incarnation, as the last was declared dead."""
        connection, advancer = self.ready()
        if self._mark(connection, advancer.identity):
            return True
        advancer.discard()
        self.advancer = None
        self.ready()
        return False

    def refresh(self) -> None:
        """Hear again what is paused and whether this incarnation lives, if that is a while ago; nothing is in hand."""
        if time.monotonic() > self._known_until:
            self.enter()

    def leave(self) -> None:
        """Take the mark back; what is added from now on is rung for."""
        connection, advancer = self.ready()
        liveness.leave(connection, advancer.identity.incarnation, advancer.identity.child)
        self._marked = None

    def leave_for_sure(self) -> None:
        """Take back a mark that is still there: it would keep everybody from ringing for this child."""
        marked, self._marked = self._marked, None
        if marked is None:
            return
        with suppress(*UNAVAILABLE, StoreUnavailableError):
            connection = self.connection or self._open("mark")
            liveness.leave(connection, marked.incarnation, marked.child)
            if connection is not self.connection:
                connection.close()

    def _mark(self, connection: Connection, identity: Identity) -> bool:
        """Mark that this child drains, and hear what is paused; False if its incarnation was declared dead."""
        queues = list(self._worker.scope.queues)
        paused = liveness.enter(connection, identity.incarnation, identity.child, queues)
        if paused is None:
            return False
        self._marked = identity
        self.paused, self._known_until = paused, time.monotonic() + _KNOWN_S
        self._scope.queues = [queue for queue in queues if queue not in paused.queues]
        return True

    def ring(self, connection: Connection, queue: str, rows: int, rung: int = 0) -> None:
        """Ring for rows that were committed, as often as slots are free for them; for so many it has rung already."""
        failpoint("ring.before", connection)
        times = runs.rings_needed(connection, queue, rows) - rung
        if times > 0:
            self._worker.ring(queue, times)
        failpoint("ring.after", connection)

    # -- letting go ----------------------------------------------------------------------------------------------------
    def drop(self) -> None:
        """Close the connection and drop the live coroutines, which may be ahead of what is committed."""
        if self.advancer is not None:
            self.advancer.discard()
            self.advancer = None
        self._close()

    def let_go(self) -> None:
        """Close a connection that broke while it had nothing in hand; what this child knows of its runs holds."""
        self._close()

    def lend(self) -> None:
        """Where connections are scarce, hold none while a step runs or a child idles."""
        if self._worker.permits is not None:
            self._close()

    def _close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if self._permit is not None:
            self._permit.give_back()
            self._permit = None
