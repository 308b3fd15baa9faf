"""Sagas and queues that are paused.

The row in `pauses` is the truth.  A child learns of it when it enters its drain, and again every second: it takes
nothing from a queue that is paused and begins nothing on it.  The first turn of a saga that is paused is put aside, due
in a thousand years; any other one, and a first one that anyone may take because something has come for the run, is
taken with an order to pause.  Runs that have work outstanding get that order as well, page by page, twice, so that one
is found that a child began before it knew.  `paused_runs` remembers who was told, and to lift a pause is to tell the
same ones the opposite, before the row goes.  Whoever dies on the way leaves it to the pumps.

Lock order: the row of the pause, then work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from orchestrator.failpoints import failpoint
from orchestrator.machine.journal import Operate, encode
from orchestrator.store.arrivals import leave_many
from orchestrator.store.connection import CLOCK, Connection
from orchestrator.store.gates import LINE
from orchestrator.store.turns import ANYONE

Kind = Literal["saga", "queue"]
_PAGE = 500
# Whether run `r` was put aside: what was left for it is read when it begins.  An order to end it is for anyone, and is
# heard before (primary key of work).
ASIDE = f"""(r.position = 0 AND EXISTS (
    SELECT FROM orchestrator.work w
    WHERE w.run_id = r.id AND w.lane = 0 AND w.target <> '{ANYONE}' AND w.due_at > {CLOCK} + %(line)s / 2))"""


@dataclass(frozen=True, slots=True)
class Paused:
    """What a child has to leave alone."""

    queues: frozenset[str] = field(default_factory=frozenset)
    sagas: frozenset[str] = field(default_factory=frozenset)


NOTHING = Paused()


@dataclass(frozen=True, slots=True)
class Pause:
    """Who paused what, when and why; `lifted` while the runs of a saga are told that it is over."""

    kind: str
    name: str
    by: str
    reason: str
    at: datetime
    lifted: bool


def listed(connection: Connection) -> list[Pause]:
    """Return all that is paused."""
    rows = connection.execute(
        "SELECT kind, name, by, reason, at, lifted FROM orchestrator.pauses ORDER BY at, kind, name"
    ).fetchall()
    return [Pause(*row) for row in rows]


_PAUSE = f"""
INSERT INTO orchestrator.pauses (kind, name, by, reason, at) VALUES (%(kind)s, %(name)s, %(by)s, %(reason)s, {CLOCK})
ON CONFLICT (kind, name) DO UPDATE SET by = EXCLUDED.by, reason = EXCLUDED.reason, at = EXCLUDED.at, lifted = false,
    swept_to = '', sweeps = 0
WHERE pauses.lifted RETURNING kind
"""


def pause(connection: Connection, kind: Kind, name: str, by: str, reason: str, now: datetime | None = None) -> bool:
    """Pause a saga or a queue; False if it is paused already."""
    values = {"kind": kind, "name": name, "by": by, "reason": reason, "now": now}
    failpoint("pause.before", connection)
    paused = connection.execute(_PAUSE, values).fetchone() is not None
    failpoint("pause.after", connection)
    return paused


# Waits for who is just putting aside a run of it (primary key of pauses); a queue has nobody to be told.
_LIFT = """
WITH lifted AS (
    UPDATE orchestrator.pauses SET lifted = true, by = %(by)s, reason = %(reason)s
    WHERE kind = %(kind)s AND name = %(name)s AND NOT lifted AND kind = 'saga' RETURNING 1
), gone AS (
    DELETE FROM orchestrator.pauses WHERE kind = %(kind)s AND name = %(name)s AND kind = 'queue' RETURNING 1
)
SELECT (SELECT count(*) FROM lifted) + (SELECT count(*) FROM gone) > 0
"""


def lift(connection: Connection, kind: Kind, name: str, by: str, reason: str) -> bool:
    """End a pause; False if there is none.  The runs of a saga go on as `tell` comes to them."""
    failpoint("lift.before", connection)
    row = connection.execute(_LIFT, {"kind": kind, "name": name, "by": by, "reason": reason}).fetchone()
    failpoint("lift.after", connection)
    return bool(row and row[0])


# Positions are read from the run's row, which is locked by nobody here: a run that moves on meanwhile is told, which is
# never wrong.  A reservation that is not this child's any more is left to whose it is.
_PUT_ASIDE = """
WITH paused AS (
    SELECT name FROM orchestrator.pauses WHERE kind = 'saga' AND NOT lifted AND name = ANY(%(sagas)s) FOR SHARE
), mine AS (
    SELECT r.id, r.saga, r.position FROM orchestrator.runs r JOIN paused p ON p.name = r.saga
    WHERE r.id = ANY(%(ids)s) AND r.finished_at IS NULL
), aside AS (
    UPDATE orchestrator.work w SET due_at = w.due_at + %(line)s, reserved_at = NULL, incarnation = NULL, child = NULL
    FROM mine WHERE w.run_id = mine.id AND w.lane = 0 AND mine.position = 0 AND NOT mine.id = ANY(%(heard)s)
      AND w.reserved_at IS NOT NULL AND w.incarnation = %(incarnation)s AND w.child = %(child)s
    RETURNING w.run_id
), noted AS (
    INSERT INTO orchestrator.paused_runs (saga, run_id) SELECT saga, id FROM mine
    WHERE position > 0 OR id = ANY(%(heard)s) OR id IN (SELECT run_id FROM aside)
    ON CONFLICT DO NOTHING RETURNING run_id
), told AS (
    INSERT INTO orchestrator.arrivals (run_id, arrival)
    SELECT m.id, json_build_object(
        'e', 'operate', 'action', 'pause', 'cause', 'saga', 'by', p.by, 'reason', p.reason)
    FROM mine m JOIN orchestrator.pauses p ON p.kind = 'saga' AND p.name = m.saga
    WHERE m.position > 0 AND m.id IN (SELECT run_id FROM noted) OR m.position = 0 AND m.id = ANY(%(heard)s)
)
SELECT run_id FROM aside
"""


def put_aside(
    connection: Connection,
    run_ids: Sequence[str],
    sagas: Sequence[str],
    incarnation: int,
    child: int,
    heard: Sequence[str] = (),
) -> set[str]:
    """Keep the turns that a child has reserved from running code of sagas that are paused.

    Runs that have not begun are put aside, and returned; the others find an order to pause in their inbox, and so do
    those of `heard`, which have something in it that does not wait for the end of the pause.
    """
    values = {
        "ids": list(run_ids), "sagas": list(sagas), "line": LINE, "incarnation": incarnation, "child": child,
        "heard": list(heard),
    }  # fmt: skip
    failpoint("put_aside.before", connection)
    rows = connection.execute(_PUT_ASIDE, values).fetchall()
    failpoint("put_aside.after", connection)
    return {run_id for (run_id,) in rows}


# A page of the runs that have work outstanding (primary key of work), and those of them that are to be told.
_SWEEP = """
WITH page AS MATERIALIZED (
    SELECT run_id FROM orchestrator.work WHERE run_id > %(after)s ORDER BY run_id LIMIT %(limit)s
), noted AS (
    INSERT INTO orchestrator.paused_runs (saga, run_id)
    SELECT r.saga, r.id FROM orchestrator.runs r
    WHERE r.id IN (SELECT run_id FROM page) AND r.saga = %(saga)s AND r.position > 0 AND r.finished_at IS NULL
      AND r.state <> 'compensating'
    ORDER BY r.id ON CONFLICT DO NOTHING RETURNING run_id
)
SELECT (SELECT max(run_id) FROM page), (SELECT count(*) FROM page), array(SELECT run_id FROM noted)
"""


def tell(connection: Connection, saga: str) -> tuple[bool, list[str]]:
    """Tell a page of the runs of a saga that it is paused, or that this is over.

    Returns whether there is more to tell, and the queues to ring, one for each run.
    """
    failpoint("tell.before", connection)
    with connection.transaction():
        row = connection.execute(
            "SELECT by, reason, lifted, swept_to FROM orchestrator.pauses WHERE kind = 'saga' AND name = %s "
            "FOR NO KEY UPDATE",
            [saga],
        ).fetchone()
        failpoint("tell.begun", connection)
        if row is None:
            return False, []
        by, reason, lifted, after = row
        order = Operate("resume" if lifted else "pause", by=by, reason=reason, cause="saga")
        found = _let_go(connection, saga, order) if lifted else _hold(connection, saga, order, after)
        failpoint("tell.told", connection)
    failpoint("tell.after", connection)
    return found


def _hold(connection: Connection, saga: str, order: Operate, after: str) -> tuple[bool, list[str]]:
    row = connection.execute(_SWEEP, {"saga": saga, "after": after, "limit": _PAGE}).fetchone()
    assert row is not None
    last, seen, run_ids = row
    more = seen == _PAGE
    connection.execute(
        "UPDATE orchestrator.pauses SET swept_to = %s, sweeps = sweeps + %s WHERE kind = 'saga' AND name = %s",
        [last if more else "", int(not more), saga],
    )
    return more, leave_many(connection, [(run_id, encode(order)) for run_id in run_ids], anyone=True)


_TOLD = """
WITH page AS (
    DELETE FROM orchestrator.paused_runs WHERE saga = %(saga)s AND run_id IN (
        SELECT run_id FROM orchestrator.paused_runs WHERE saga = %(saga)s ORDER BY run_id LIMIT %(limit)s
    ) RETURNING run_id
), begun AS (
    UPDATE orchestrator.work w SET due_at = w.due_at - %(line)s
    FROM page JOIN orchestrator.runs r ON r.id = page.run_id
    WHERE w.run_id = r.id AND w.lane = 0 AND r.position = 0 AND w.due_at > orchestrator.now() + %(line)s / 2
    RETURNING w.queue
)
SELECT (SELECT count(*) FROM page), array(SELECT queue FROM begun), array(
    SELECT r.id FROM orchestrator.runs r JOIN page ON page.run_id = r.id WHERE r.finished_at IS NULL
      AND (r.position > 0 OR EXISTS (SELECT FROM orchestrator.arrivals a WHERE a.run_id = r.id)))
"""


def _let_go(connection: Connection, saga: str, order: Operate) -> tuple[bool, list[str]]:
    row = connection.execute(_TOLD, {"saga": saga, "limit": _PAGE, "line": LINE}).fetchone()
    assert row is not None
    seen, queues, run_ids = row
    if seen < _PAGE:
        connection.execute("DELETE FROM orchestrator.pauses WHERE kind = 'saga' AND name = %s", [saga])
    return seen == _PAGE, queues + leave_many(connection, [(run_id, encode(order)) for run_id in run_ids])


# Every pause is told twice: the second time after whoever did not know of it yet has begun his last run.
_UNTOLD = f"""
SELECT name FROM orchestrator.pauses WHERE kind = 'saga' AND (
    lifted OR sweeps = 0 OR sweeps = 1 AND at < {CLOCK} - interval '5 seconds'
) ORDER BY name
"""


def untold(connection: Connection, now: datetime | None = None) -> list[str]:
    """Return the sagas whose runs are still to be told of a pause, or of its end."""
    return [name for (name,) in connection.execute(_UNTOLD, {"now": now}).fetchall()]


def pauses_of(connection: Connection, saga: str, queues: Sequence[str] = ()) -> list[Pause]:
    """Return the pauses that concern a run: of its saga, and of queues on which something of it waits."""
    return [
        pause
        for pause in listed(connection)
        if not pause.lifted and (pause.name == saga if pause.kind == "saga" else pause.name in queues)
    ]
