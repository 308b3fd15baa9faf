"""What Celery's fixup for Django does around each task, done around each step as well.

Owns that alone.  A step comes in no message, so that the fixup passes it over: what one step has done to a connection
of Django's would meet all others until the end of the drain.  Must never raise: no step fails over what it left behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from celery import Celery
from celery.fixups.django import DjangoFixup

logger = logging.getLogger(__name__)


class Fixups:
    """The fixups of an app, as far as they do something around tasks."""

    def __init__(self, app: Celery) -> None:
        self._django = [found for found in getattr(app, "_fixups", None) or () if isinstance(found, DjangoFixup)]

    def around_step(self) -> AbstractContextManager[None]:
        """Close the connections of Django before and after a step; which it keeps for longer is the app's to say."""
        return self._around_step() if self._django else nullcontext()

    @contextmanager
    def _around_step(self) -> Iterator[None]:
        self._close("close_database")
        try:
            yield
        finally:
            self.after_step()

    def after_step(self) -> None:
        """Close the connections of Django to databases and caches."""
        self._forget(_is_within_a_transaction)
        self._close("close_database", "close_cache")

    def after_failure(self) -> None:
        """Close the connections of Django to databases for good, also those that the app keeps for longer.

        Who was interrupted while one was told to commit has left it without autocommit, and out of any block: what the
        next steps do over it would never be committed.
        """
        self._forget(lambda connection: connection.connection is not None)

    def _forget(self, which: Callable[[Any], bool]) -> None:
        """Within a block that nobody leaves any more Django closes a connection, and never opens it again."""
        for fixup in self._django:
            worker: Any = fixup.worker_fixup
            with _warning():
                connections = worker._db.connections
                for connection in filter(which, connections.all()):
                    del connections[connection.alias]
                    with _warning():
                        connection.close()

    def _close(self, *what: str) -> None:
        for fixup in self._django:
            worker: Any = fixup.worker_fixup
            for each in what:
                with _warning():
                    getattr(worker, each)()


@contextmanager
def _warning() -> Iterator[None]:
    try:
        yield
    except Exception:
        logger.warning("a connection of Django's could not be closed", exc_info=True)


def _is_within_a_transaction(connection: Any) -> bool:
    if connection.connection is None:
        return False
    return bool(connection.in_atomic_block or connection.autocommit != connection.settings_dict["AUTOCOMMIT"])
