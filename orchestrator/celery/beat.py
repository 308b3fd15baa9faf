"""Beat's scheduler: Celery's beat, with its memory in Postgres instead of in a file.

Owns the loop of a beat process: it leads or stands by, and fires what is due.  Any number of them may run; the leader
is the one that does not stand by, and who only believes to lead cannot fire.  Must never end because the database, the
broker or one entry is broken: it says so once, and goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Mapping
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

import celery.beat
from celery import Celery

from orchestrator.celery.schedules import BROKER_AWAY, Book, Post, Undeliverable, engine_of
from orchestrator.engine.schedules import Decision, Schedule
from orchestrator.errors import OrchestratorError, SchemaError, StoreUnavailableError
from orchestrator.failpoints import failpoint
from orchestrator.store import check
from orchestrator.store import schedules as store
from orchestrator.store.connection import REFUSED, UNAVAILABLE, Connection, is_at_rest, open_connection, unavailable

logger = logging.getLogger("celery.beat")

_RETRY_S = 0.5
_REST_S = 30.0  # an entry that could not be fired is left alone for so long
_KEEP = timedelta(days=30)
_PAGE = 100  # messages that one turn sends
_FORGET_EVERY_S = 3600.0


class Scheduler(celery.beat.Scheduler):
    """The scheduler that Celery's beat service drives: `tick` is called for ever, and says how long to sleep."""

    def __init__(self, app: Celery, *args: Any, **kwargs: Any) -> None:
        self._orchestrator = app.orchestrator
        self._orchestrator.settings_at_start()
        self._book = Book(app)
        self._post = Post(app, self._book)
        self._holder = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}"
        self._schedules = engine_of(self._orchestrator)
        self._connection: Connection | None = None
        self._leads: bool | None = None
        self._ticking = self._told_to_end = self._broker_said = False
        self._said: set[str] = set()
        self._next: dict[str, tuple[datetime, datetime | None]] = {}
        self._resting: dict[str, float] = {}
        self._send_at = self._forget_at = monotonic()
        super().__init__(app, *args, **kwargs)

    # -- what Celery's beat service asks for ---------------------------------------------------------------------------
    def setup_schedule(self) -> None:
        """Do nothing: entries are read at each turn, so that a change of them is noticed."""

    def update_from_dict(self, dict_: Mapping[str, Any]) -> None:
        """Add entries."""
        self._book.update_from_dict(dict_)

    def add(self, **kwargs: Any) -> None:
        """Add an entry while beat runs."""
        self._book.added[kwargs.pop("name")] = kwargs

    @property
    def info(self) -> str:
        """A line of beat's banner."""
        return "    . schedules -> in Postgres"

    def tick(self, *args: Any, **kwargs: Any) -> float:
        """Renew the leadership and fire what is due; returns the seconds until there is more to do."""
        begun = monotonic()
        self._ticking = True
        try:
            pause = self._turn() - (monotonic() - begun)
        except (StoreUnavailableError, SchemaError, REFUSED) as error:
            self._lose(error)
            pause = _RETRY_S
        finally:
            self._ticking = False
        if self._told_to_end:
            raise SystemExit  # somebody has kept the one that the signal raised
        return max(0.0, min(pause, float(self.max_interval)))

    def close(self) -> None:
        """Leave the leadership to another beat, and close what is open."""
        if self._ticking:  # a signal came in the middle of a statement; this is called again once that is left
            self._told_to_end = True
            return
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                if not is_at_rest(connection):
                    connection.close()  # the signal came in the middle of a statement, which may have broken it
                    connection = self._opened()
                store.resign(connection, self._schedules.app, self._holder)
            connection.close()
        self._post.close()
        super().close()

    # -- one turn ------------------------------------------------------------------------------------------------------
    def _turn(self) -> float:
        connection = self._connected()
        lease = self._orchestrator.settings.lease
        failpoint("beat.lead.before", connection)
        lead = store.lead(connection, self._schedules.app, self._holder, lease)
        failpoint("beat.lead.after", connection)
        round_s: float = lease.total_seconds() / 4
        if lead is None:
            self._stand_by()
            return round_s
        changed = self._book.refresh(lead.now)
        for name, problem in self._book.problems.items() if changed else ():
            level = logging.WARNING if name in self._book.schedules else logging.ERROR
            logger.log(level, "beat: entry %r: %s", name, problem)
        if changed or not self._leads:
            self._declare(connection, lead)
        pause = self._fire_due(connection, lead.now)
        self._send(connection)
        self._forget(connection)
        return min(pause, round_s)

    def _connected(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = self._opened()
            if self._said:
                logger.warning("beat: the database is there; it goes on")
                self._said.clear()
        return self._connection

    def _opened(self) -> Connection:
        settings = self._orchestrator.settings
        connection = open_connection(settings.dsn, name="beat", prepare=settings.prepared_statements)
        try:
            check(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _lose(self, error: Exception) -> None:
        """Say once that the database is away or not migrated, and let go of it."""
        kind = "schema" if isinstance(error, SchemaError) else "away"
        if kind not in self._said:
            told = error if isinstance(error, OrchestratorError) else unavailable(error)
            logger.error("beat: %s. Nothing fires until then; beat waits.", str(told).removesuffix("."))
            self._said.add(kind)
        connection, self._connection = self._connection, None
        self._leads = False
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    def _stand_by(self) -> None:
        if self._leads is not False:
            logger.info("beat: another beat leads; this one stands by")
        self._leads = False

    def _declare(self, connection: Connection, lead: store.Lead) -> None:
        since = lead.now if self._leads else lead.led_until
        failpoint("beat.declare.before", connection)
        with connection.transaction():
            store.declare(connection, self._schedules.app, self._book.declared(), since)
        failpoint("beat.declare.after", connection)
        if not self._leads:
            logger.info("beat: leads, with %s entries", len(self._book.schedules))
        self._leads = True
        self._resting.clear()
        self._next.clear()

    # -- firing --------------------------------------------------------------------------------------------------------
    def _fire_due(self, connection: Connection, now: datetime) -> float:
        standing = store.standing(connection, self._schedules.app)
        pause = self.max_interval
        for name, schedule in self._book.schedules.items():
            stands = standing.get(name)
            if stands is None or stands.paused or self._resting.get(name, 0.0) > monotonic():
                continue
            try:
                pause = min(pause, self._look_at(connection, schedule, stands, now))
            except (StoreUnavailableError, *UNAVAILABLE):
                raise
            except Exception as error:  # whatever is wrong with one entry, the others go on
                self._rest(connection, name, error)
        return float(pause)

    def _look_at(self, connection: Connection, schedule: Schedule, stands: store.Standing, now: datetime) -> float:
        """Fire a schedule if it is due; returns the seconds until it is."""
        due = self._next_slot(schedule, stands.settled_until)
        if not stands.waiting and (due is None or due > now):
            return self.max_interval if due is None else (due - now).total_seconds()
        decisions = self._schedules.fire(connection, schedule, self._holder)
        for decision in decisions:
            _tell(schedule, decision)
        if self._resting.pop(schedule.name, None):
            store.note_problem(connection, self._schedules.app, schedule.name, schedule.problem)
        return 0.0 if decisions else self.max_interval

    def _next_slot(self, schedule: Schedule, settled_until: datetime) -> datetime | None:
        known = self._next.get(schedule.name)
        if known is None or known[0] != settled_until:
            slots = schedule.timetable.slots(settled_until, settled_until)
            known = self._next[schedule.name] = (settled_until, next(slots, None))
        return known[1]

    def _rest(self, connection: Connection, name: str, error: Exception) -> None:
        problem = f"it cannot be fired, and is tried again every {_REST_S:.0f} s: {str(error) or type(error).__name__}"
        if self._book.problems.get(name) != problem:
            logger.error("beat: entry %r: %s", name, problem, exc_info=not isinstance(error, OrchestratorError))
            self._book.problems[name] = problem
        self._resting[name] = monotonic() + _REST_S
        store.note_problem(connection, self._schedules.app, name, problem)

    # -- messages ------------------------------------------------------------------------------------------------------
    def _send(self, connection: Connection) -> None:
        """Send what is to be sent, while the broker answers."""
        if monotonic() < self._send_at:
            return
        for _ in range(_PAGE):
            rested = [name for name in self._book.entries if self._resting.get(name, 0.0) <= monotonic()]
            try:
                if self._schedules.send_one(connection, self._post.deliver, rested) is None:
                    return
                self._broker_said = False
            except BROKER_AWAY as error:
                self._send_at = monotonic() + _RETRY_S
                if not self._broker_said:
                    logger.error("beat: the broker cannot be reached (%s); what is due is kept for it", error)
                self._broker_said = True
                return
            except Undeliverable as error:
                self._rest(connection, error.name, error.reason)

    def _forget(self, connection: Connection) -> None:
        if monotonic() >= self._forget_at:
            deleted = store.forget(connection, self._schedules.app, _KEEP)
            self._forget_at = monotonic() + (0.0 if deleted else _FORGET_EVERY_S)


def _tell(schedule: Schedule, decision: Decision) -> None:
    if decision.state == "started":
        logger.info("Scheduler: Starting due run %s (%s)", decision.run_id, schedule.task)
    elif decision.state != "sending":
        level = logging.WARNING if decision.state == "skipped" else logging.INFO
        slot = decision.slot.isoformat()
        logger.log(level, "beat: entry %r: slot %s is %s: %s", schedule.name, slot, decision.state, decision.because)
