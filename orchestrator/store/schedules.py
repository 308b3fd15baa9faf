"""Schedules and their slots: who leads, what is settled, what became of each slot.

The primary key of slots is what makes a slot fire once.  Lock order: the schedule's row before anything else, its
slots, then runs and work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from orchestrator.codec import dumps
from orchestrator.failpoints import failpoint
from orchestrator.store.connection import CLOCK, Connection

# Renews, or takes over from who resigned or was not seen for a whole lease.  A clock that was set back may have left an
# instant that is yet to come; nobody waits for it.  `led_until` is up to when the leadership before this one decided.
_LEAD = f"""
INSERT INTO orchestrator.leaders AS l (app, holder, seen_at, led_until)
VALUES (%(app)s, %(holder)s, {CLOCK}, {CLOCK})
ON CONFLICT (app) DO UPDATE SET holder = EXCLUDED.holder, seen_at = EXCLUDED.seen_at,
    led_until = CASE WHEN l.holder = EXCLUDED.holder THEN l.led_until ELSE least(l.seen_at, EXCLUDED.seen_at) END
WHERE l.holder IN (EXCLUDED.holder, '')
   OR l.seen_at NOT BETWEEN EXCLUDED.seen_at - %(lease)s::interval AND EXCLUDED.seen_at + %(lease)s::interval
RETURNING seen_at, led_until
"""


@dataclass(frozen=True, slots=True)
class Lead:
    """The database's time, and up to when the leader before this one decided."""

    now: datetime
    led_until: datetime


def lead(connection: Connection, app: str, holder: str, lease: timedelta, now: datetime | None = None) -> Lead | None:
    """Renew the leadership of an app's schedules, or take it; None if somebody else has it (primary key of leaders)."""
    values = {"app": app, "holder": holder, "lease": lease, "now": now}
    row = connection.execute(_LEAD, values).fetchone()
    return Lead(*row) if row else None


def resign(connection: Connection, app: str, holder: str) -> None:
    """Leave the leadership to whoever comes next."""
    failpoint("beat.resign.before", connection)
    connection.execute("UPDATE orchestrator.leaders SET holder = '' WHERE app = %s AND holder = %s", (app, holder))
    failpoint("beat.resign.after", connection)


def leader(connection: Connection, app: str) -> tuple[str, datetime] | None:
    """Return who leads and when it was seen last; None if nobody ever did, or the last one resigned."""
    query = "SELECT holder, seen_at FROM orchestrator.leaders WHERE app = %s AND holder <> ''"
    return connection.execute(query, (app,)).fetchone()


@dataclass(frozen=True, slots=True)
class Declared:
    """A schedule as code declares it; `reads` tells one timetable from another."""

    name: str
    task: str
    reads: str
    problem: str | None = None


# A schedule that is new begins now, at a whole second.  One that reads otherwise than before, or is back, begins where
# the leadership before this one stopped deciding, so that no slot falls between the two.  One that is bad has no
# timetable: it stands where it stood, and is made up for when it is mended.
_DECLARE = f"""
INSERT INTO orchestrator.schedules AS s (app, name, task, reads, problem, settled_until)
SELECT %(app)s, d.name, d.task, d.reads, d.problem, date_trunc('second', {CLOCK})
FROM json_to_recordset(%(declared)s::json) AS d (name text, task text, reads text, problem text)
ON CONFLICT (app, name) DO UPDATE SET
    task = coalesce(nullif(EXCLUDED.task, ''), s.task), reads = coalesce(nullif(EXCLUDED.reads, ''), s.reads),
    problem = EXCLUDED.problem, gone_at = NULL,
    settled_until = CASE WHEN s.gone_at IS NULL AND (s.reads = EXCLUDED.reads OR '' IN (s.reads, EXCLUDED.reads))
                         THEN s.settled_until ELSE greatest(s.settled_until, %(since)s::timestamptz) END
"""
_RETIRE = f"""
UPDATE orchestrator.schedules SET gone_at = {CLOCK}
WHERE app = %(app)s AND gone_at IS NULL AND NOT name = ANY (%(names)s)
"""


def declare(
    connection: Connection, app: str, declared: Sequence[Declared], since: datetime, now: datetime | None = None
) -> None:
    """Make the schedules of an app those that are declared; others keep their rows and are gone."""
    rows = dumps([{"name": d.name, "task": d.task, "reads": d.reads, "problem": d.problem} for d in declared])
    values = {"app": app, "declared": rows, "since": since, "names": [d.name for d in declared], "now": now}
    connection.execute(_DECLARE, values)
    connection.execute(_RETIRE, values)


_ENSURE = f"""
INSERT INTO orchestrator.schedules (app, name, task, reads, settled_until)
VALUES (%(app)s, %(name)s, %(task)s, %(reads)s, date_trunc('second', {CLOCK})) ON CONFLICT (app, name) DO NOTHING
"""


def ensure(connection: Connection, app: str, declared: Declared, now: datetime | None = None) -> None:
    """Make the row of a schedule that no beat has declared yet."""
    values = {"app": app, "name": declared.name, "task": declared.task, "reads": declared.reads, "now": now}
    connection.execute(_ENSURE, values)


def note_problem(connection: Connection, app: str, name: str, problem: str | None) -> None:
    """Write down why a schedule cannot fire."""
    failpoint("beat.note.before", connection)
    connection.execute(
        "UPDATE orchestrator.schedules SET problem = %s WHERE app = %s AND name = %s AND problem IS DISTINCT FROM %s",
        (problem, app, name, problem),
    )
    failpoint("beat.note.after", connection)


# -- where a schedule stands -------------------------------------------------------------------------------------------
_STANDING = """
SELECT s.name, s.settled_until, s.paused_at IS NOT NULL, EXISTS (
    SELECT FROM orchestrator.slots o WHERE o.app = s.app AND o.schedule = s.name AND o.state = 'waiting')
FROM orchestrator.schedules s WHERE s.app = %s AND s.gone_at IS NULL
"""


@dataclass(frozen=True, slots=True)
class Standing:
    """Up to where a schedule is settled, whether it is paused, and whether slots wait for the end of a run."""

    settled_until: datetime
    paused: bool
    waiting: bool


def standing(connection: Connection, app: str) -> dict[str, Standing]:
    """Return where the schedules of an app stand, by name (primary key of schedules, index slots_open)."""
    return {row[0]: Standing(*row[1:]) for row in connection.execute(_STANDING, (app,)).fetchall()}


# Who stands still in the middle of its transaction is ended by Postgres, so that the schedule goes on without it.
_HOLD = f"""
SELECT s.settled_until, s.paused_at IS NOT NULL, {CLOCK},
    set_config('idle_in_transaction_session_timeout', '5000', true)
FROM orchestrator.schedules s
WHERE s.app = %(app)s AND s.name = %(name)s AND (%(holder)s::text IS NULL OR EXISTS (
    SELECT FROM orchestrator.leaders l WHERE l.app = s.app AND l.holder = %(holder)s))
FOR UPDATE OF s
"""


@dataclass(frozen=True, slots=True)
class Held:
    """A schedule whose row is locked until the end of the transaction."""

    settled_until: datetime
    paused: bool
    now: datetime


def hold(
    connection: Connection, app: str, name: str, holder: str | None = None, now: datetime | None = None
) -> Held | None:
    """Lock a schedule; with `holder` None if it leads no more or somebody else holds the row, else wait for the row."""
    values = {"app": app, "name": name, "holder": holder, "now": now}
    row = connection.execute(_HOLD + (" SKIP LOCKED" if holder else ""), values).fetchone()
    return Held(*row[:3]) if row else None


def settle(connection: Connection, app: str, name: str, until: datetime) -> None:
    """Write down that all slots up to an instant are decided."""
    connection.execute(
        "UPDATE orchestrator.schedules SET settled_until = %s WHERE app = %s AND name = %s",
        (until, app, name),
    )


_PAUSE = f"""
UPDATE orchestrator.schedules SET paused_at = {CLOCK}, paused_by = %(by)s, paused_because = %(because)s
WHERE app = %(app)s AND name = %(name)s AND paused_at IS NULL RETURNING name
"""
_RESUME = f"""
UPDATE orchestrator.schedules SET paused_at = NULL, paused_by = NULL, paused_because = NULL,
    settled_until = CASE WHEN %(catch_up)s THEN settled_until ELSE date_trunc('second', {CLOCK}) END
WHERE app = %(app)s AND name = %(name)s AND paused_at IS NOT NULL RETURNING name
"""


def pause(connection: Connection, app: str, name: str, by: str, because: str, now: datetime | None = None) -> bool:
    """Pause a schedule; False if it is paused already."""
    values = {"app": app, "name": name, "by": by, "because": because, "now": now}
    failpoint("schedule.pause.before", connection)
    paused = connection.execute(_PAUSE, values).fetchone() is not None
    failpoint("schedule.pause.after", connection)
    return paused


def resume(connection: Connection, app: str, name: str, *, catch_up: bool, now: datetime | None = None) -> bool:
    """End a pause; without `catch_up` the slots that passed meanwhile are left out.  False if it was not paused.

    It goes on from now, also if the clock was ahead and more is settled; what has fired then is on record.
    """
    values = {"app": app, "name": name, "catch_up": catch_up, "now": now}
    failpoint("schedule.resume.before", connection)
    resumed = connection.execute(_RESUME, values).fetchone() is not None
    failpoint("schedule.resume.after", connection)
    return resumed


# -- slots -------------------------------------------------------------------------------------------------------------
# A slot that was left out may be made up for, once.
_DECIDE = f"""
INSERT INTO orchestrator.slots AS s (app, schedule, slot, origin, state, run_id, because, at)
VALUES (%(app)s, %(name)s, %(slot)s, %(origin)s, %(state)s, %(run_id)s, %(because)s, {CLOCK})
ON CONFLICT (app, schedule, slot) DO UPDATE SET
    origin = EXCLUDED.origin, state = EXCLUDED.state, because = EXCLUDED.because, at = EXCLUDED.at
WHERE s.state = 'skipped' AND EXCLUDED.origin = 'backfill'
RETURNING slot
"""


def decide(
    connection: Connection, app: str, name: str, slot: datetime, *, origin: str, state: str, run_id: str,
    because: str | None = None, now: datetime | None = None,
) -> bool:  # fmt: skip
    """Write down what becomes of a slot; False if that was decided before (primary key of slots)."""
    values = {"app": app, "name": name, "slot": slot, "origin": origin, "state": state, "run_id": run_id}
    row = connection.execute(_DECIDE, {**values, "because": because, "now": now}).fetchone()
    return row is not None


_LAST_DECIDED = """
SELECT slot FROM orchestrator.slots
WHERE app = %s AND schedule = %s AND origin = 'schedule' AND at <= %s ORDER BY slot DESC LIMIT 1
"""


def last_decided(connection: Connection, app: str, name: str, by: datetime) -> datetime | None:
    """Return the last slot that beat had decided by an instant; None if that is not known (primary key of slots)."""
    row = connection.execute(_LAST_DECIDED, (app, name, by)).fetchone()
    return row[0] if row else None


def change(connection: Connection, app: str, name: str, slot: datetime, state: str, because: str | None = None) -> None:
    """Write down what has become of a slot that was open."""
    connection.execute(
        "UPDATE orchestrator.slots SET state = %s, because = %s WHERE app = %s AND schedule = %s AND slot = %s",
        (state, because, app, name, slot),
    )


_ENDED = """
UPDATE orchestrator.slots s SET state = 'started'
WHERE app = %(app)s AND schedule = %(name)s AND state = 'running'
  AND NOT EXISTS (SELECT FROM orchestrator.runs r WHERE r.id = s.run_id AND r.finished_at IS NULL)
"""
_OPEN = """
SELECT s.slot, s.state, s.run_id, s.at, coalesce(NOT r.past_pivot AND r.state <> 'compensating', false)
FROM orchestrator.slots s LEFT JOIN orchestrator.runs r ON r.id = s.run_id
WHERE s.app = %(app)s AND s.schedule = %(name)s AND s.state IN ('waiting', 'running') ORDER BY s.slot
"""


@dataclass(frozen=True, slots=True)
class Open:
    """A slot whose run has not ended, or that waits for such a one."""

    slot: datetime
    state: str
    run_id: str
    at: datetime  # when that was decided
    goes_forward: bool  # and can still be told to go back


def open_slots(connection: Connection, app: str, name: str) -> list[Open]:
    """Return the open slots of a schedule, the oldest first (index slots_open)."""
    values = {"app": app, "name": name}
    connection.execute(_ENDED, values)
    return [Open(*row) for row in connection.execute(_OPEN, values).fetchall()]


_UNSENT = """
SELECT schedule, slot, run_id, set_config('idle_in_transaction_session_timeout', '10000', true)
FROM orchestrator.slots
WHERE app = %s AND state = 'sending' AND schedule = ANY (%s)
ORDER BY schedule, slot LIMIT 1 FOR UPDATE SKIP LOCKED
"""


def unsent(connection: Connection, app: str, names: Iterable[str]) -> tuple[str, datetime, str] | None:
    """Lock a slot of these schedules whose message is not known to be sent (index slots_open).

    Returns schedule, slot and message id.
    """
    row = connection.execute(_UNSENT, (app, list(names))).fetchone()
    return tuple(row[:3]) if row else None


# What is left of a schedule that is gone nobody knows how to start or send; it is kept as long, should that come back.
_FORGET = f"""
DELETE FROM orchestrator.slots WHERE ctid = ANY (ARRAY(
    SELECT o.ctid FROM orchestrator.slots o JOIN orchestrator.schedules s ON s.app = o.app AND s.name = o.schedule
    WHERE o.app = %(app)s AND o.slot < least(s.settled_until, {CLOCK} - %(keep)s::interval)
      AND (o.state IN ('started', 'sent', 'skipped')
           OR o.state IN ('sending', 'waiting') AND s.gone_at < {CLOCK} - %(keep)s::interval) LIMIT %(limit)s))
"""


def forget(connection: Connection, app: str, keep: timedelta, limit: int = 1000, now: datetime | None = None) -> int:
    """Delete a page of slots that were decided long ago; what is settled never fires again by itself."""
    failpoint("beat.forget.before", connection)
    deleted = connection.execute(_FORGET, {"app": app, "keep": keep, "limit": limit, "now": now}).rowcount
    failpoint("beat.forget.after", connection)
    return deleted


def clock(connection: Connection) -> datetime:
    """Return the database's time."""
    row = connection.execute("SELECT orchestrator.now()").fetchone()
    assert row is not None
    return row[0]  # type: ignore[no-any-return]


# -- for people --------------------------------------------------------------------------------------------------------
_LISTING = f"""
SELECT s.name, s.task, s.reads, s.problem, s.settled_until, s.paused_at, s.paused_by, s.paused_because, s.gone_at,
    {CLOCK} AS now, o.slot AS last_slot, o.state AS last_state, o.run_id AS last_run_id, o.because AS last_because,
    (SELECT count(*) FROM orchestrator.slots w
     WHERE w.app = s.app AND w.schedule = s.name AND w.state IN ('waiting', 'sending')) AS outstanding
FROM orchestrator.schedules s LEFT JOIN LATERAL (
    SELECT * FROM orchestrator.slots l WHERE l.app = s.app AND l.schedule = s.name ORDER BY l.slot DESC LIMIT 1
) AS o ON true
WHERE s.app = %(app)s ORDER BY s.name
"""


def listing(connection: Connection, app: str, now: datetime | None = None) -> list[dict[str, Any]]:
    """Return the schedules of an app with the last slot of each (primary keys of schedules and slots)."""
    cursor = connection.execute(_LISTING, {"app": app, "now": now})
    names = [column.name for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
