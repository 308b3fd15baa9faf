"""The statements of the hot path: take work, load runs, commit turns.

Each runs in the caller's connection and is one statement: with autocommit it is one transaction and one round trip.
Lock order everywhere: the run's row, then work rows, then the rest.  Must never decide anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, cast

import psycopg

from orchestrator.codec import Json, dumps, dumps_rows
from orchestrator.failpoints import failpoint
from orchestrator.machine.states import TERMINAL, RunState
from orchestrator.store.connection import CLOCK, Connection, execute_often, is_at_rest

ANYONE = "*"  # a target that everybody is
_TURN = 0  # the lane of turns

# The body is the function take_3 of 0009_lanes.sql: a statement per priority and queue, each over index
# work_due.  Who finds nothing says in its mark that it is looking, but for one of a worker's children is enough
# (primary key of drainers).
_TAKE = """
WITH taken AS MATERIALIZED (
    SELECT * FROM orchestrator.take_3(%(queues)s, %(targets)s, %(short)s, %(incarnation)s, %(child)s,
        %(fences)s::bigint[], %(reservation)s, %(back)s, %(now)s)
), others AS MATERIALIZED (
    SELECT EXISTS (
        SELECT FROM orchestrator.drainers WHERE incarnation = %(incarnation)s AND child < %(child)s AND looking
    ) AS look
), told AS (
    UPDATE orchestrator.drainers d SET looking = NOT d.looking FROM others
    WHERE d.incarnation = %(incarnation)s AND d.child = %(child)s AND d.looking = EXISTS (SELECT FROM taken)
      AND (d.looking OR NOT others.look)
)
SELECT taken.* FROM others LEFT JOIN taken ON true WHERE others.look OR taken.run_id IS NOT NULL
"""


@dataclass(slots=True)
class Taken:
    """A row of work that this process holds: reserved if it is a turn, begun otherwise.

    `lane` names the row: 0 is the turn's, another one stays while a child does step after step of the run in it.
    `position` is that of the run when a step was taken; of one that this child began with a turn it knows more.

    Once its outcome is recorded, `refused` tells that the fence was lost and `again` that another attempt follows
    (None: another turn decides that).
    """

    run_id: str
    lane: int
    key: str
    role: str
    target: str
    queue: str
    task: str
    attempt: int
    call: Any
    fence: int | None
    deadline: datetime | None
    now: datetime
    run: RunRow | None = None
    position: int = 0
    refused: bool = False
    again: bool | None = None


@dataclass(slots=True)
class RunRow:
    """The part of a run's row that never changes, and its position."""

    id: str
    saga: str
    version: int
    queue: str
    input: Json
    started_at: datetime
    deadline_at: datetime | None
    priority: int
    position: int
    state: str
    parent: str | None = None  # of a child
    link: int = 0
    since: int = 0

    @property
    def finished(self) -> bool:
        """Whether the run is terminal."""
        return self.state in TERMINAL

    @property
    def needs_code(self) -> bool:
        """Whether a turn may have to resume saga code; going back needs none."""
        return self.state != RunState.COMPENSATING and not self.finished


def take(
    connection: Connection,
    *,
    queues: list[str],
    targets: list[str],
    incarnation: int,
    child: int,
    fences: Sequence[int],
    reservation: timedelta,
    short: Sequence[str] = (),
    back: timedelta | None = None,
    now: datetime | None = None,
) -> list[Taken] | None:
    """Hold what is due, highest priority first, then the longest due; at most as much as there are `fences`.

    Turns are reserved.  Steps are begun: those of the tasks that are `short` together, any other one alone.  The mark
    of this child as a drainer says from now on whether it is looking, that is, whether it found nothing.  `back` passes
    over what has been due for longer.

    Returns None if it found nothing and another child of its worker is looking, which is enough.
    """
    values = {
        "queues": queues, "targets": targets, "short": list(short), "incarnation": incarnation, "child": child,
        "fences": list(fences), "reservation": reservation, "back": back, "now": now,
    }  # fmt: skip
    failpoint("take.before", connection)
    rows = execute_often(connection, _TAKE, values).fetchall()
    if rows and rows[0][0] is None:
        return None
    taken = [_taken(row) for row in rows]
    if taken and taken[0].fence is None:
        failpoint("take.reserved", connection)
    elif taken:
        failpoint("take.begun", connection)
    return taken


def _taken(row: tuple[Any, ...]) -> Taken:
    taken = Taken(*row[:12])
    if row[12] is not None:
        taken.run = RunRow(taken.run_id, *row[12:])
    taken.position = row[19] or 0
    return taken


@dataclass(slots=True)
class Loaded:
    """A run as it was read: journal rows from position `since` on as (instant, entries), arrivals as (id, arrival)."""

    run: RunRow
    now: datetime
    rows: list[tuple[datetime, Any]]
    arrivals: list[tuple[int, Any]]
    since: int = 0


# Primary keys of runs and journal, index arrivals_by_run; takes no lock.
_LOAD_ROWS = """
SELECT known.run_id, rows.at, rows.entries
FROM unnest(%(ids)s::text[], %(positions)s::integer[]) AS known (run_id, position) CROSS JOIN LATERAL (
    SELECT j.at, j.entries FROM orchestrator.journal j
    WHERE j.run_id = known.run_id AND j.seq >= known.position ORDER BY j.seq
) AS rows
"""
_LOAD_ARRIVALS = "SELECT run_id, id, arrival FROM orchestrator.arrivals WHERE run_id = ANY(%(ids)s) ORDER BY id"
_RUN_ROW = """id, saga, version, queue, input, started_at, deadline_at, priority, position, state,
    CASE WHEN root_id <> id THEN parent_id END, link, since"""
_LOAD_RUNS = f"SELECT {CLOCK}, {_RUN_ROW} FROM orchestrator.runs WHERE id = ANY(%(ids)s)"


def load(connection: Connection, known: Mapping[str, int], now: datetime | None = None) -> dict[str, Loaded]:
    """Read runs, each from the journal position on that is known of it; those that do not exist are left out.

    Three statements in one round trip, which may see different snapshots.  The position is read first: whatever is
    committed after that makes the position check of `commit_turn` fail, or leaves one more arrival.  Arrivals that were
    read before it could be taken a second time.
    """
    values = {"ids": list(known), "positions": list(known.values()), "now": now}
    # In a transaction one after the other: to Postgres who stands still within a pipeline is not idle, so that it would
    # never end the transaction, and others would wait for its rows.
    with connection.pipeline() if is_at_rest(connection) else contextlib.nullcontext():
        runs = connection.execute(_LOAD_RUNS, values)
        arrivals = connection.execute(_LOAD_ARRIVALS, values)
        rows = connection.execute(_LOAD_ROWS, values)
        found = {row[1]: Loaded(RunRow(*row[1:]), row[0], [], [], known[row[1]]) for row in runs}
        for run_id, arrival_id, arrival in arrivals:
            if run_id in found:
                found[run_id].arrivals.append((arrival_id, arrival))
        for run_id, at, entries in rows:
            if run_id in found:
                found[run_id].rows.append((at, entries))
    return found


@dataclass(slots=True, kw_only=True)
class Commit:
    """A turn as it is written.

    `done` names the attempts whose outcomes this turn records, as (lane, fence).  `next` is the work that this child
    begins with `next_fence`, in the lane of the first of those; `work` is what others may take.  `holds_turn` says that
    the run's turn row is reserved by this child; `wake` is when the run wants its next turn by itself, and is written
    only if `rewake` or `holds_turn`.  `shared` says that others may be committing turns of this run now, so that its
    row is not waited for.
    """

    run_id: str
    position: int
    at: datetime
    entries: list[Json]
    incarnation: int
    child: int
    state: str
    target: str
    queue: str
    priority: int = 0
    ended: bool = False
    done: Sequence[tuple[int, int]] = ()
    shared: bool = True
    holds_turn: bool = False
    wake: datetime | None = None
    rewake: bool = False
    next: dict[str, Any] | None = None
    next_fence: int | None = None
    work: Sequence[Json] = ()
    withdraw: Sequence[str] = ()
    consumed: Sequence[int] = ()
    children: Sequence[Json] = ()
    posts: Sequence[Json] = ()
    locks: Sequence[Json] = ()
    unlocks: Sequence[str] = ()
    continued: dict[str, Json] | None = None
    summary: dict[str, Json] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether `commit_turns` can write it together with others."""
        beyond = self.withdraw or self.children or self.posts or self.locks or self.unlocks or self.continued
        return not beyond and (self.wake is None or self.holds_turn or not self.rewake)

    def values(self, now: datetime | None) -> tuple[Any, ...]:
        """Return the parameters of commit_turn_2, which takes one attempt at the most."""
        more = self.rarer()
        ((done_lane, done_fence),) = self.done or ((None, None),)
        return (
            self.run_id, self.position, self.at, dumps(self.entries), self.state, self.incarnation,
            self.child, done_lane, done_fence, self.shared,
            None if self.next is None else dumps(self.next),
            self.next_fence, None if more is None else dumps(more), now,
        )  # fmt: skip

    def rarer(self) -> dict[str, Json] | None:
        """Return what most turns do not need, as the function takes it."""
        more: dict[str, Any] = {}
        if self.summary is not None:
            more["summary"] = {**self.summary, "ended": self.ended}
        if self.ended:
            more["ended"] = True
        if self.holds_turn:
            more["holds"] = True
        if self.wake is not None and (self.rewake or self.holds_turn):
            more |= {
                "wake": self.wake.isoformat(), "target": self.target, "queue": self.queue, "priority": self.priority,
            }  # fmt: skip
        for name in ("work", "withdraw", "consumed", "children", "posts", "locks", "unlocks"):
            if values := getattr(self, name):
                more[name] = list(values)
        if self.continued is not None:
            more["continue"] = self.continued
        return more or None


@dataclass(slots=True)
class Committed:
    """What became of a `Commit`: whether it was written, whether the run has arrivals, the database's time.

    `posted` are the queues of the runs that it posted to.
    """

    written: bool
    owed: bool
    now: datetime | None
    posted: Sequence[str] | None = None


# The body is the function commit_turn_2 of 0009_lanes.sql.  Lock order: the run's row by its position, the attempt's
# row by its fence (primary key), then journal, other work of the run, arrivals (primary keys).
_COMMIT = "SELECT * FROM orchestrator.commit_turn_2(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
# In a transaction that shows the database as it was at its first statement, what was left for the run since cannot be
# seen: no turn is written there.
_COMMIT_WITHIN = f"{_COMMIT} WHERE current_setting('transaction_isolation') = 'read committed'"
_FENCE_LOST = "OR001"
_DEADLOCKS = 5


def commit_turn(connection: Connection, commit: Commit, now: datetime | None = None) -> Committed:
    """Write a turn if the run is still at its position and the attempt still has its fence; else write nothing.

    Does not commit by itself: with autocommit the statement is the transaction, inside the caller's it is a savepoint,
    and nothing is written if that is of another isolation than READ COMMITTED.
    """
    alone = is_at_rest(connection)
    for tries in range(1, _DEADLOCKS + 1):
        try:
            failpoint("commit.before", connection)
            with contextlib.nullcontext() if alone else connection.transaction():
                statement = _COMMIT if alone else _COMMIT_WITHIN
                row = execute_often(connection, statement, commit.values(now)).fetchone()
            failpoint("commit.after", connection)
            return Committed(*row) if row else Committed(False, False, None)
        except psycopg.errors.DeadlockDetected:
            # Turns that post to several runs may meet those runs' own, which share a statement in no order.
            if not alone or tries == _DEADLOCKS:
                raise
        except psycopg.Error as error:
            if error.sqlstate != _FENCE_LOST:
                raise
            break
    return Committed(False, False, None)


# The body is the function commit_turns_3 of 0009_lanes.sql: one statement for all.  Lock order: the runs'
# rows in the order of their ids, then their attempts, then the rest, all by primary keys.
_COMMIT_MANY = "SELECT * FROM orchestrator.commit_turns_3(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"


@dataclass(slots=True)
class _Wave:
    """Turns of different runs as commit_turns_3 takes them: each kind of thing that they do is a list of its own."""

    turns: list[dict[str, Any]] = field(default_factory=list)
    summaries: list[dict[str, Any]] = field(default_factory=list)
    next: list[dict[str, Any]] = field(default_factory=list)
    gone: list[dict[str, Any]] = field(default_factory=list)
    sleeping: list[dict[str, Any]] = field(default_factory=list)
    ended: list[dict[str, Any]] = field(default_factory=list)
    added: list[dict[str, Any]] = field(default_factory=list)
    consumed: list[int] = field(default_factory=list)

    def add(self, commit: Commit) -> None:
        assert commit.is_plain
        run = commit.run_id
        turn: dict[str, Any] = {
            "run": run, "position": commit.position, "at": commit.at.isoformat(), "state": commit.state,
            "entries": commit.entries,
        }  # fmt: skip
        if commit.summary is not None:
            turn["summed"] = True
            about: dict[str, Any] = {"run": run, "position": commit.position, "state": commit.state}
            self.summaries.append({**about, "ended": commit.ended, **commit.summary})
        if commit.ended:
            turn["ended"] = True
            self.ended.append({
                "run": run, "holds": commit.holds_turn or None, "done": [fence for _, fence in commit.done]
            })  # fmt: skip
        else:
            self._hold(commit)
        self.turns.append(turn)
        self.added.extend({"run": run, **cast("dict[str, Any]", work)} for work in commit.work)
        self.consumed.extend(commit.consumed)

    def _hold(self, commit: Commit) -> None:
        """Say what becomes of the rows that the child held: one that goes becomes the one that comes."""
        run = commit.run_id
        going: list[dict[str, Any]] = [{"run": run, "held": lane, "done": fence} for lane, fence in commit.done]
        if commit.holds_turn and commit.wake is not None:
            self.sleeping.append({"run": run, "wake": commit.wake.isoformat()})
        elif commit.holds_turn:
            going.append({"run": run, "held": _TURN})
        if commit.next is not None:
            call, row = commit.next["call"], going.pop(0) if going else {"run": run}
            limits = {"seconds": call.get("t"), "silence": call.get("h")}
            self.next.append({**row, **commit.next, **limits, "fence": commit.next_fence})
        self.gone.extend(going)

    def values(self) -> tuple[Any, ...]:
        kinds = (self.turns, self.summaries, self.next, self.gone, self.sleeping, self.ended, self.added)
        return (*(dumps_rows(rows) if rows else None for rows in kinds), self.consumed or None)


def commit_turns(
    connection: Connection, commits: Sequence[Commit], now: datetime | None = None
) -> dict[str, Committed]:
    """Write turns of different runs, all of them plain, with one statement; returns those that were written, by run.

    One whose run is not at its position any more is left out.  A lost fence rolls all of them back, and then none is
    returned.  Commits if the connection is in autocommit mode.  Raises: psycopg.Error.
    """
    first, wave = commits[0], _Wave()
    for commit in sorted(commits, key=lambda commit: commit.run_id):
        wave.add(commit)
    try:
        failpoint("commits.before", connection)
        values = (*wave.values(), first.incarnation, first.child, now)
        rows = execute_often(connection, _COMMIT_MANY, values).fetchall()
        failpoint("commits.after", connection)
    except psycopg.Error as error:
        if error.sqlstate != _FENCE_LOST:
            raise
        return {}
    return {run_id: Committed(True, owed, at) for run_id, owed, at in rows}


_PASS_ON = """
UPDATE orchestrator.work w SET target = r.saga || '@' || r.version, attempt = w.attempt + 1,
    reserved_at = NULL, incarnation = NULL, child = NULL
FROM orchestrator.runs r WHERE r.id = w.run_id AND w.run_id = %(run_id)s AND w.lane = 0
  AND w.reserved_at IS NOT NULL AND w.incarnation = %(incarnation)s AND w.child = %(child)s
"""


def pass_on(connection: Connection, run_id: str, incarnation: int, child: int) -> None:
    """Leave the turn that this child has reserved to who has the run's code (primary key of work).

    It is no first turn: something came before it.  One that somebody has asked for meanwhile is left as it is, for it
    may be for anyone.
    """
    failpoint("pass_on.before", connection)
    connection.execute(_PASS_ON, {"run_id": run_id, "incarnation": incarnation, "child": child})
    failpoint("pass_on.after", connection)


_POSTPONE = f"""
UPDATE orchestrator.work
SET due_at = {CLOCK} + %(pause)s::interval, reserved_at = NULL, incarnation = NULL, child = NULL
WHERE run_id = %(run_id)s AND lane = 0
"""


def postpone(connection: Connection, run_id: str, pause: timedelta, now: datetime | None = None) -> None:
    """Try the run's turn again later (primary key of work)."""
    failpoint("postpone.before", connection)
    connection.execute(_POSTPONE, {"run_id": run_id, "pause": pause, "now": now})
    failpoint("postpone.after", connection)


def run_row(connection: Connection, run_id: str) -> RunRow | None:
    """Read the run's own row (primary key of runs)."""
    found = connection.execute(f"SELECT {_RUN_ROW} FROM orchestrator.runs WHERE id = %s", [run_id]).fetchone()
    return RunRow(*found) if found else None


_HOLDS_TURN = """
SELECT EXISTS (SELECT FROM orchestrator.work WHERE run_id = %(run_id)s AND lane = 0 AND reserved_at IS NOT NULL
    AND incarnation = %(incarnation)s AND child = %(child)s)
"""


def holds_turn(connection: Connection, run_id: str, incarnation: int, child: int) -> bool:
    """Tell whether this child still has the run's turn reserved; a reservation lasts 100 ms (primary key of work)."""
    row = connection.execute(_HOLDS_TURN, {"run_id": run_id, "incarnation": incarnation, "child": child}).fetchone()
    return bool(row and row[0])


_SEED = """
WITH moved AS (
    UPDATE orchestrator.runs SET position = 1, state = 'compensating'
    WHERE id = %(run_id)s AND position = 0 RETURNING id
), due AS (
    UPDATE orchestrator.work w SET target = %(anyone)s FROM moved WHERE w.run_id = moved.id AND w.lane = 0
)
INSERT INTO orchestrator.journal (run_id, seq, at, entries) SELECT id, 0, %(at)s, %(entries)s::json FROM moved
"""


def seed_journal(connection: Connection, run_id: str, at: datetime, entries: list[Json]) -> None:
    """Give a new run that only goes back the journal row that it begins with; its turns are for anyone."""
    values = {"run_id": run_id, "at": at, "entries": dumps(entries), "anyone": ANYONE}
    connection.execute(_SEED, values)


_GIVE_BACK_TURNS = """
UPDATE orchestrator.work SET reserved_at = NULL, incarnation = NULL, child = NULL
WHERE fence IS NULL AND (run_id, lane) IN (SELECT unnest(%(runs)s::text[]), 0)
  AND incarnation = %(incarnation)s AND child = %(child)s
"""


def give_back(connection: Connection, run_ids: Sequence[str], incarnation: int, child: int) -> None:
    """Give back turns that this child reserved and will not get to."""
    failpoint("give_back_turns.before", connection)
    connection.execute(_GIVE_BACK_TURNS, {"runs": list(run_ids), "incarnation": incarnation, "child": child})
    failpoint("give_back_turns.after", connection)
