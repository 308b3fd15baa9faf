"""Starting runs and reading them.

Statements here work on any kind of connection that a caller may hold, since a start can join the caller's transaction;
they never commit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

import psycopg

from orchestrator.codec import Json, dumps
from orchestrator.machine.journal import Asked, decode_entry
from orchestrator.store.connection import CLOCK, Connection, execute_often
from orchestrator.store.gates import LINE

# The body is the function start_runs_1 of 0009_lanes.sql.  CAST, not "::", so that any driver can run it in a caller's
# transaction.
START = """
SELECT run_id FROM orchestrator.start_runs_1(CAST(%(runs)s AS json), CAST(%(now)s AS timestamptz))
"""
# The function start_run_2 of 0007_lean_statements.sql: one run, and a look at who drains.
_START_ONE = """
SELECT started, rings FROM orchestrator.start_run_2(
    %s, %s, %s, %s::jsonb, %s, %s::smallint, %s::float8, %s, %s::float8, %s::jsonb, %s)
"""
# Many, their commit, and after that a look at who drains, in one round trip; not for a transaction that is open.
_START_MANY = "CALL orchestrator.start_and_look_1(%s::json, %s, %s::timestamptz, NULL, NULL)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A run to be started: `delay` and `deadline` in seconds, `eta` an aware instant, `hears` its first arrival."""

    id: str
    saga: str
    version: int
    input: Json
    queue: str
    priority: int = 0
    delay: float = 0.0
    eta: datetime | None = None
    deadline: float | None = None
    parent: str | None = None
    tags: dict[str, Json] | None = None
    hears: Json = None

    def values(self, now: datetime | None = None) -> dict[str, Any]:
        """Return the parameters of `START`."""
        return {"runs": _text([self]), "now": now}


def _text(new: Sequence[Start]) -> str:
    """Return runs to be started as JSON, without what they leave open."""
    return f"[{','.join(dumps(_given(start)) for start in new)}]"


def _given(new: Start) -> dict[str, Any]:
    values = {name: value for name in _FIELDS if (value := getattr(new, name)) is not None}
    if new.eta is not None:
        values["eta"] = new.eta.isoformat()
    return values


_FIELDS = tuple(field.name for field in fields(Start))


def start(connection: Connection, new: Start, now: datetime | None = None) -> bool:
    """Insert a run and its first turn; False if the id is taken."""
    return connection.execute(START, new.values(now)).fetchone() is not None


def start_and_look(
    connection: Connection, new: Sequence[Start], queue: str, now: datetime | None = None
) -> tuple[set[str], int]:
    """Insert runs with their first turns on `queue`, commit, and see how many doorbells help.

    Returns the ids that were not taken, and that number.  Commits: the connection must be in autocommit mode.
    """
    if len(new) == 1 and new[0].parent is None and new[0].hears is None:
        (one,) = new
        tags = None if one.tags is None else dumps(one.tags)
        values = (
            one.id, one.saga, one.version, dumps(one.input), queue, one.priority, one.delay, one.eta, one.deadline,
            tags, now,
        )  # fmt: skip
        row = execute_often(connection, _START_ONE, values).fetchone()
        assert row is not None
        return {one.id} if row[0] else set(), int(row[1])
    row = connection.execute(_START_MANY, (_text(new), queue, now)).fetchone()
    assert row is not None
    return set(row[0] or ()), int(row[1])


# What a run was started with: of one that was continued as new, its first link knows.  Of one that was pruned nothing
# is known but its saga and the state in which it ended.  The input as text: what a caller's connection makes of JSON is
# the caller's business (text, with Django; a Decimal of a number).
IDENTITY = """
SELECT saga, version, CAST(input AS text), state FROM (
    SELECT id, saga, version, input, state FROM orchestrator.runs WHERE id IN (%(id)s, CAST(%(id)s AS text) || '~1')
    UNION ALL SELECT '', saga, NULL, NULL, state FROM orchestrator.pruned WHERE id = %(id)s
) AS known ORDER BY length(id) DESC LIMIT 1
"""


def identity(connection: Connection, run_id: str) -> tuple[str, int | None, str | None, str] | None:
    """Return saga, version, input as JSON text, and state of a run; neither version nor input if it was pruned."""
    return connection.execute(IDENTITY, {"id": run_id}).fetchone()


_OUTCOME = """
SELECT id, state, output, error, left_effects, saga, version, past_pivot, parked, published
FROM orchestrator.runs WHERE id = ANY(%(ids)s)
"""


@dataclass(slots=True)
class Outcome:
    """How a run stands."""

    id: str
    state: str
    output: Json
    error: dict[str, Json] | None
    left: list[Json]
    saga: str
    version: int
    past_pivot: bool
    parked: list[Json]
    published: Json


def goes_back(state: str, error: object, past_pivot: bool) -> bool:
    """Tell whether a run is being undone, be it that its undoing is parked: then it has an error, and no pivot."""
    return state == "compensating" or (state == "parked" and error is not None and not past_pivot)


def outcomes(connection: Connection, run_ids: Sequence[str]) -> dict[str, Outcome]:
    """Return how runs stand, by id (primary key)."""
    rows = execute_often(connection, _OUTCOME, {"ids": list(run_ids)}).fetchall()
    return {row[0]: Outcome(*row) for row in rows}


_PATIENCE_MS = 5000
_HOLD = "SELECT state FROM orchestrator.runs WHERE id = %(run_id)s FOR SHARE"


def hold(connection: Connection, run_id: str) -> str | None:
    """Return the state of a run that no turn moves before the caller's transaction has ended (primary key).

    First in the order of locks, as a turn has it.  None without such a run, or if a turn of it stands still with the
    row in hand, as one may in the transaction of a step whose process was stopped: nobody is kept waiting for that.
    """
    try:
        with connection.transaction():
            connection.execute(f"SET LOCAL lock_timeout = {_PATIENCE_MS}")
            row = connection.execute(_HOLD, {"run_id": run_id}).fetchone()
            connection.execute("SET LOCAL lock_timeout TO DEFAULT")
    except psycopg.errors.LockNotAvailable:
        return None
    return row[0] if row else None


_RINGS = "SELECT orchestrator.rings_1(%s, %s)"  # the function rings_1 of migration 0005


def rings_needed(connection: Connection, queue: str, rows: int) -> int:
    """Return how many doorbells help: one for each new row that no looker takes, while there are slots that idle.

    To be read after the commit that added the rows, so that a drainer that leaves meanwhile looks again and sees them.
    """
    found = connection.execute(_RINGS, (queue, rows)).fetchone()
    assert found is not None
    return int(found[0])


RUN_COLUMNS = (
    "id", "saga", "version", "state", "input", "output", "error", "left_effects", "parked", "published", "tags",
    "parent_id", "root_id", "queue", "priority", "position", "past_pivot", "link", "since", "started_at", "deadline_at",
    "finished_at",
)  # fmt: skip
_RUN = f"SELECT {', '.join(RUN_COLUMNS)} FROM orchestrator.runs WHERE id = %(id)s"


def run(connection: Connection, run_id: str) -> dict[str, Any] | None:
    """Return the whole row of a run."""
    row = connection.execute(_RUN, {"id": run_id}).fetchone()
    return dict(zip(RUN_COLUMNS, row, strict=True)) if row else None


_HISTORY = "SELECT seq, at, entries FROM orchestrator.journal WHERE run_id = %(id)s ORDER BY seq"


def history(connection: Connection, run_id: str) -> list[tuple[int, datetime, list[Json]]]:
    """Return the journal of a run: (seq, instant, entries) per committed turn."""
    return connection.execute(_HISTORY, {"id": run_id}).fetchall()


# Primary key of journal: all rows of the one run.
_TASK = """
SELECT entry FROM orchestrator.history
WHERE run_id = %(id)s AND kind = 'asked' AND key = %(key)s ORDER BY seq DESC LIMIT 1
"""


def task_of(connection: Connection, run_id: str, key: str) -> str:
    """Return what a run has asked for under a key: the name of a task; the empty string for nothing."""
    row = connection.execute(_TASK, {"id": run_id, "key": key}).fetchone()
    asked = decode_entry(row[0]) if row else None
    return asked.task if isinstance(asked, Asked) else ""


# Primary keys of runs and journal: all rows of those that are children.  LIMIT keeps the view from being read whole.
_DONE_CHILDREN = """
SELECT r.id, r.root_id FROM orchestrator.runs r
WHERE r.id = ANY (%s) AND r.root_id <> r.id AND r.state = 'running'
    AND (SELECT true FROM orchestrator.history h WHERE h.run_id = r.id AND h.kind = 'reported' LIMIT 1)
"""


def done_children(connection: Connection, run_ids: Sequence[str]) -> dict[str, str]:
    """Return those of these runs that are children, done and revocable, each with its root."""
    return dict(connection.execute(_DONE_CHILDREN, (list(run_ids),)).fetchall())


_OUTSTANDING = f"""
SELECT w.key, w.role, w.target, w.queue, w.task, w.attempt, w.due_at, w.reserved_at, w.begun_by IS NOT NULL, w.begun_at,
    w.deadline_at, w.expires_at, w.stop, i.node, i.dead_at IS NOT NULL,
    EXISTS (SELECT FROM orchestrator.incarnations a WHERE a.dead_at IS NULL AND w.queue = ANY(a.queues)),
    EXISTS (SELECT FROM orchestrator.incarnations a
            WHERE a.dead_at IS NULL AND w.queue = ANY(a.queues) AND (w.target = '*' OR w.target = ANY(a.targets))),
    w.call -> 'g', w.gate IS NOT NULL AND w.due_at > {CLOCK} + %(line)s::interval / 2,
    (SELECT count(*) FROM orchestrator.work g WHERE g.gate = w.gate AND g.due_at < {CLOCK} + %(line)s::interval / 2),
    {CLOCK}
FROM orchestrator.work w LEFT JOIN orchestrator.incarnations i ON i.id = w.incarnation
WHERE w.run_id = %(id)s ORDER BY w.due_at, w.key
"""


@dataclass(slots=True)
class Outstanding:
    """A row of work of a run, and whether somebody is there to take it."""

    key: str
    role: str
    target: str
    queue: str
    task: str
    attempt: int
    due_at: datetime
    reserved_at: datetime | None
    begun: bool
    begun_at: datetime | None
    deadline_at: datetime | None
    expires_at: datetime | None
    stop: bool
    node: str | None
    node_dead: bool | None
    queue_served: bool
    target_served: bool
    limit: dict[str, Any] | None  # of a step with limits: its gate, `rate` and `most`
    in_line: bool  # it has not been let in
    let_in: int  # how many at its gate have
    now: datetime


def outstanding(connection: Connection, run_id: str, now: datetime | None = None) -> list[Outstanding]:
    """Return what is due of a run (primary key of work), for ``explain``."""
    rows = connection.execute(_OUTSTANDING, {"id": run_id, "now": now, "line": LINE}).fetchall()
    return [Outstanding(*row) for row in rows]


_INBOX = f"SELECT count(*), min(at), {CLOCK} FROM orchestrator.arrivals WHERE run_id = %(id)s"


@dataclass(slots=True)
class Inbox:
    """How many arrivals of a run no turn has taken yet, since when, and the database's time."""

    unread: int
    since: datetime | None
    now: datetime


def inbox(connection: Connection, run_id: str, now: datetime | None = None) -> Inbox:
    """Return what waits to be read by a run's next turn (index arrivals_by_run)."""
    row = connection.execute(_INBOX, {"id": run_id, "now": now}).fetchone()
    assert row is not None
    return Inbox(*row)


_AHEAD = """
SELECT mine.key, array_agg(other.run_id ORDER BY other.id)
FROM orchestrator.locks mine JOIN orchestrator.locks other ON other.name = mine.name AND other.id < mine.id
WHERE mine.run_id = %(id)s AND mine.granted_at IS NULL GROUP BY mine.key
"""


def ahead(connection: Connection, run_id: str) -> dict[str, list[str]]:
    """Return who is before a run in the queues of locks, by the key of its request (index locks_by_name)."""
    return dict(connection.execute(_AHEAD, {"id": run_id}).fetchall())


_SERVING = """
SELECT i.node, i.queues, i.targets, i.slots, i.seen_at,
    (SELECT count(*) FROM orchestrator.drainers d WHERE d.incarnation = i.id)
FROM orchestrator.incarnations i WHERE i.dead_at IS NULL ORDER BY i.node, i.id
"""


@dataclass(slots=True)
class Serving:
    """A worker that nobody declared dead: what it takes, when its lease was last renewed, how many children drain."""

    node: str
    queues: list[str]
    targets: list[str]
    slots: int
    seen_at: datetime
    draining: int


def serving(connection: Connection) -> list[Serving]:
    """Return the living workers (index incarnations_alive); one whose machine died may be among them for a while."""
    return [Serving(*row) for row in connection.execute(_SERVING).fetchall()]


@contextlib.contextmanager
def snapshot(connection: Connection) -> Iterator[None]:
    """Let all reads inside the block see the database as it was at the first of them."""
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        yield
