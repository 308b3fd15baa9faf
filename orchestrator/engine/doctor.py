"""What is wrong, or will be, with a database, its workers and its broker: facts in, findings out.

Owns the judgement and its words.  Must never look for itself: the facts are handed in, so that every finding can be
shown in a test.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import chain

from orchestrator.engine.schedules import SENT
from orchestrator.errors import as_typed
from orchestrator.store.doctor import Living, Old, Server, Size, Stuck, Waiting
from orchestrator.store.pauses import Pause
from orchestrator.store.restores import Lineage
from orchestrator.store.turns import ANYONE

_OLDEST_TESTED, _NEWEST_TESTED = 14, 18
_WAITS = timedelta(seconds=10)  # a pump rings every second
_UNSEEN = timedelta(seconds=30)
_CLOCKS_APART = timedelta(seconds=5)  # a doorbell lives for 10 s by the clock of who reads it
_LONG_TRANSACTION = timedelta(minutes=10)
_MANY_DEAD = 50_000
_SHORT_VISIBILITY_S = 600


class Level(StrEnum):
    """How bad it is: something to know, something to do, something that is broken."""

    ADVICE = "advice"
    WARNING = "warning"
    BROKEN = "broken"


EXIT_CODE = {Level.ADVICE: 0, Level.WARNING: 1, Level.BROKEN: 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found, what it means, and what to do."""

    code: str
    level: Level
    what: str
    means: str
    do: str


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue in the broker; a broker of the Redis kind knows no consumers."""

    messages: int
    consumers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """What is known of the broker and of how Celery is told to use it."""

    url: str
    error: str = ""
    queues: dict[str, Queue] = field(default_factory=dict)
    prefetch: int = 1
    visibility_timeout_s: float | None = None
    evicts: str = ""
    result_backend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that is judged; `host_clock` was read in the middle of asking the server for its own."""

    server: Server
    host_clock: datetime
    waiting: Sequence[Waiting] = ()
    living: Sequence[Living] = ()
    stuck: Stuck
    oldest: Old | None = None
    sizes: Sequence[Size] = ()
    broker: Broker
    named_queues: frozenset[str] = frozenset()
    pauses: Sequence[Pause] = ()
    schedules: Sequence[tuple[str, str | None]] = ()
    leader_unseen: timedelta | None = None
    ahead: Sequence[tuple[str, datetime]] = ()  # schedules that are settled up to an instant that is yet to come
    lineage: Lineage | None = None  # a standby is not asked
    restoring: bool = False


def judge(facts: Facts) -> list[Finding]:
    """Return what is to be told, the worst first."""
    found = list(chain(
        _of_server(facts.server), _of_lineage(facts), _of_clocks(facts), _of_transactions(facts),
        _of_sizes(facts), _of_workers(facts), _of_work(facts), _of_runs(facts.stuck), _of_pauses(facts),
        _of_broker(facts.broker), _of_schedules(facts), _of_clock_set_back(facts),
    ))  # fmt: skip
    return sorted(found, key=lambda finding: -EXIT_CODE[finding.level])


def lost_doorbells(facts: Facts) -> list[str]:
    """Return the queues whose due work somebody could take and nobody does: they are to be rung."""
    return sorted({each.queue for each in facts.waiting if each.target_served and each.oldest > _WAITS})


# -- Postgres ----------------------------------------------------------------------------------------------------------
def _of_server(server: Server) -> Iterator[Finding]:
    major = int(re.match(r"\d*", server.version)[0] or 0)  # type: ignore[index]
    if major < _OLDEST_TESTED:
        yield Finding(
            "postgres-version",
            Level.BROKEN,
            f"Postgres is {server.version}",
            f"this release needs {_OLDEST_TESTED} or newer",
            "upgrade Postgres",
        )
    elif major > _NEWEST_TESTED:
        yield Finding(
            "postgres-version",
            Level.ADVICE,
            f"Postgres is {server.version}",
            f"this release was tested with {_OLDEST_TESTED} to {_NEWEST_TESTED}",
            "look for a newer release of this package",
        )
    if server.in_recovery:
        yield Finding(
            "standby",
            Level.BROKEN,
            "the database is a standby, or is still being recovered",
            "nothing can be written, so nothing starts and nothing moves",
            "point ORCHESTRATOR_DATABASE_URL to the primary, or wait for the recovery to end",
        )
    for name, means in _PROMISES.items():
        if server.settings.get(name) == "off":
            yield Finding(
                name.replace("_", "-"),
                Level.BROKEN,
                f"{name} is off",
                means,
                f"ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf(); or wherever it is set for role or database",
            )
    for name in ("autovacuum", "track_counts"):
        if server.settings.get(name) == "off":
            yield Finding(
                name.replace("_", "-"),
                Level.WARNING,
                f"{name} is off",
                "the table of work is written all the time and grows without bound",
                f"set {name} = on",
            )
    if server.connections >= 0.9 * server.max_connections:
        yield Finding(
            "connections",
            Level.WARNING,
            f"{server.connections} of {server.max_connections} connections are in use",
            "soon workers and clients are refused",
            "lower ORCHESTRATOR_MAX_CONNECTIONS, pool, or raise max_connections",
        )


_PROMISES = {
    "fsync": "a crash of the machine can destroy the whole database",
    "full_page_writes": "a crash of the machine can leave torn pages: what was promised may be gone",
    "synchronous_commit": "a crash forgets commits that were acknowledged: starts can be lost, steps done twice",
}


def _of_lineage(facts: Facts) -> Iterator[Finding]:
    if facts.restoring:
        yield Finding(
            "restore-unfinished",
            Level.BROKEN,
            "a look after a restore was begun and has not ended",
            "some runs do not know yet that they may have been here before, and would do things twice",
            "stop all workers, then: saga doctor --after-restore",
        )
    elif facts.lineage is not None and facts.lineage.is_broken:
        (system, before, _), (new_system, now, _) = facts.lineage.known, facts.lineage.now
        server = "" if system == new_system else " and on another server"
        how = f"was restored or failed over (timeline {int(before, 16)} -> {int(now, 16)}{server})"
        if (system, before) == (new_system, now):
            how = "was put back from a dump"
        yield Finding(
            "restored",
            Level.BROKEN,
            f"this database {how}, and nobody said what was lost",
            "after a restore to a moment in the past, or a failover that lost commits, runs do again what they did "
            "after that moment",
            "stop all workers, then: saga doctor --after-restore; or, after a failover to a synchronous standby, a "
            "move to another server, or a restore to the very end: saga doctor --nothing-lost",
        )


def _of_clocks(facts: Facts) -> Iterator[Finding]:
    apart = abs(facts.host_clock - facts.server.clock)
    if apart > _CLOCKS_APART:
        yield Finding(
            "clocks",
            Level.WARNING,
            f"the clocks of this host and of the database are {_words(apart)} apart",
            "only the database's clock decides what is due, but Celery drops messages that it takes for expired: "
            "doorbells, after 10 s",
            "mend the clock that is wrong (NTP)",
        )


def _of_transactions(facts: Facts) -> Iterator[Finding]:
    old = facts.oldest
    if old is not None and old.age > _LONG_TRANSACTION:
        yield Finding(
            "old-transaction",
            Level.WARNING,
            f"a transaction is open for {_words(old.age)}: backend {old.pid} ({old.application}, {old.state})",
            "nothing that was deleted since can be cleaned up, and taking work becomes slower and slower",
            f"end what holds it, or SELECT pg_terminate_backend({old.pid})",
        )


def _of_sizes(facts: Facts) -> Iterator[Finding]:
    for size in facts.sizes:
        if size.dead > _MANY_DEAD and size.dead > 4 * size.live:
            yield Finding(
                f"bloat-{size.table}",
                Level.WARNING,
                f"table {size.table} has {size.dead} dead rows and {size.live} living ones ({size.bytes >> 20} MiB)",
                "every look at it passes the dead ones by",
                f"VACUUM orchestrator.{size.table}; and see why autovacuum did not",
            )


# -- workers and work --------------------------------------------------------------------------------------------------
def _of_workers(facts: Facts) -> Iterator[Finding]:
    seen = [each for each in facts.living if each.unseen <= _UNSEEN]
    if not seen:
        waits = sum(each.rows for each in facts.waiting)
        yield Finding(
            "no-worker",
            Level.BROKEN if waits else Level.WARNING,
            "no worker runs",
            f"nothing moves; {_many(waits, 'piece of work is', 'pieces of work are')} due"
            if waits
            else "nothing would move",
            "start one: celery -A <your app> worker",
        )
    for each in facts.living:
        if each.unseen > _UNSEEN:
            yield Finding(
                "expired-lease",
                Level.WARNING,
                f"worker {each.node} has not renewed its lease for {_words(each.unseen)}",
                "it is dead, and no pump was there to give its work back",
                "start a worker: its pump does it within seconds",
            )
    served = {queue for each in seen for queue in each.queues}
    for queue in sorted(facts.named_queues - served) if seen else ():
        if all(each.queue != queue for each in facts.waiting):
            yield Finding(
                "idle-queue",
                Level.ADVICE,
                f"no worker serves queue {queue}, to which a step or saga of this app goes",
                "work for it would wait",
                f"start a worker with -Q {queue}, if it is to be done",
            )


def _of_work(facts: Facts) -> Iterator[Finding]:
    for each in facts.waiting:
        whom = "a worker with whatever code" if each.target == ANYONE else each.target
        pieces = _many(each.rows, "piece of work", "pieces of work")
        due = f"{pieces} on queue {each.queue} for {whom}, the oldest for {_words(each.oldest)}"
        if not each.queue_served:
            yield Finding(
                "unserved-queue",
                Level.WARNING,
                f"due: {due}",
                "no worker serves that queue",
                f"start a worker with -Q {each.queue}",
            )
        elif not each.target_served:
            yield Finding(
                "unknown-target",
                Level.WARNING,
                f"due: {due}",
                "no worker of that queue has that task, or that version of the saga, registered",
                f"deploy the code of {each.target} to a worker of queue {each.queue}",
            )
        elif each.oldest > _WAITS:
            queue = facts.broker.queues.get(each.queue)
            doorbells = (
                f"the broker holds {_many(queue.messages, 'message')} for it"
                if queue
                else "what the broker holds is not known"
            )
            yield Finding(
                "unclaimed",
                Level.WARNING,
                f"due: {due}",
                f"workers could take it and do not; {doorbells}: all slots are busy, or doorbells were lost",
                "it is rung for now; if it stays, add workers, and see what they are busy with",
            )


def _of_runs(stuck: Stuck) -> Iterator[Finding]:
    if stuck.expired:
        yield Finding(
            "expired-attempts",
            Level.WARNING,
            f"{_many(stuck.expired, 'attempt is', 'attempts are')} past the time",
            "no pump was there to give that back",
            "start a worker: its pump does it within seconds",
        )
    if stuck.unread:
        yield Finding(
            "unread",
            Level.WARNING,
            f"{_many(stuck.unread, 'arrival is', 'arrivals are')} unread for more than a minute",
            "there is no worker that could take a turn of the run",
            "see unserved queues and unknown targets, or start a worker",
        )
    if stuck.parked and stuck.parked_since is not None:
        yield Finding(
            "parked",
            Level.WARNING,
            f"{_many(stuck.parked, 'run is', 'runs are')} parked, the oldest began {_words(stuck.parked_since)} ago",
            "each waits for a person, and may hold half-done business",
            "saga list --state parked, then saga explain RUN",
        )
    if stuck.paused:
        yield Finding(
            "paused",
            Level.ADVICE,
            f"{_many(stuck.paused, 'run is', 'runs are')} paused",
            "until a person lets it go on",
            "saga list --state paused",
        )
    if stuck.unsent:
        messages = _many(stuck.unsent, "message of a schedule is", "messages of schedules are")
        yield Finding(
            "unsent",
            Level.WARNING,
            f"{messages} not sent for more than a minute",
            "no beat leads, the broker is away from it, or its code has these entries no more",
            "start a beat, see its log, or `saga schedules`",
        )


def _of_pauses(facts: Facts) -> Iterator[Finding]:
    for pause in facts.pauses:
        reason = f" ({pause.reason})" if pause.reason else ""
        yield Finding(
            f"paused-{pause.kind}",
            Level.ADVICE,
            f"{pause.kind} {pause.name} is paused by {pause.by}{reason} since {_words(facts.server.clock - pause.at)}",
            "nothing is taken from it" if pause.kind == "queue" else "its runs ask for nothing new, and none begins",
            f"saga resume --{pause.kind} {as_typed(pause.name)}, when it may go on",
        )


# -- broker and beat ---------------------------------------------------------------------------------------------------
def _of_broker(broker: Broker) -> Iterator[Finding]:
    if broker.error:
        yield Finding(
            "broker",
            Level.BROKEN,
            f"the broker {broker.url} cannot be reached: {broker.error}",
            "no doorbell can be rung: what is running goes on, what is due waits",
            "start the broker, or mend the way to it",
        )
    if broker.evicts:
        yield Finding(
            "eviction",
            Level.WARNING,
            f"a full broker throws messages away (maxmemory-policy {broker.evicts})",
            "doorbells are rung again, but messages of plain tasks, and starts by message, are lost",
            "set maxmemory-policy noeviction",
        )
    if broker.visibility_timeout_s is not None and broker.visibility_timeout_s < _SHORT_VISIBILITY_S:
        yield Finding(
            "visibility-timeout",
            Level.ADVICE,
            f"visibility_timeout is {broker.visibility_timeout_s:g} s",
            "a plain task with acks_late that takes longer runs twice; sagas and steps do not",
            "raise it in broker_transport_options above your longest plain task",
        )
    if broker.prefetch > 1:
        yield Finding(
            "prefetch",
            Level.ADVICE,
            f"worker_prefetch_multiplier is {broker.prefetch}",
            "a busy worker keeps doorbells that an idle one could answer, until the pump rings again after a second",
            "set worker_prefetch_multiplier = 1",
        )
    if broker.result_backend:
        yield Finding(
            "result-backend",
            Level.ADVICE,
            f"a result backend is configured ({broker.result_backend})",
            "sagas and their steps do not use it",
            "keep it if plain tasks need it",
        )


def _of_schedules(facts: Facts) -> Iterator[Finding]:
    if facts.schedules and (facts.leader_unseen is None or facts.leader_unseen > _UNSEEN):
        many = len(facts.schedules)
        since = f"none was seen for {_words(facts.leader_unseen)}" if facts.leader_unseen else "none leads"
        yield Finding(
            "no-beat",
            Level.WARNING,
            f"there {'is' if many == 1 else 'are'} {_many(many, 'schedule')} and no beat: {since}",
            f"nothing of {'it' if many == 1 else 'them'} fires",
            "start one, or two: celery -A <your app> beat",
        )
    for name, problem in facts.schedules:
        if problem and problem.endswith(SENT):
            yield Finding(
                "schedule",
                Level.ADVICE,
                f"schedule {name!r}: {problem}",
                "if no worker of another service has that task either, its messages are refused",
                "correct the name, if it is no other service's",
            )
        elif problem:
            yield Finding(
                "schedule", Level.WARNING, f"schedule {name!r}: {problem}", "it may not fire", "correct its entry"
            )


def _of_clock_set_back(facts: Facts) -> Iterator[Finding]:
    for name, until in facts.ahead:
        yield Finding(
            "schedule-ahead",
            Level.WARNING,
            f"schedule {name!r} is decided up to {until:%Y-%m-%d %H:%M:%S} UTC, which is yet to come",
            "the database's clock was ahead, and was set back: nothing of it fires until then",
            f"saga schedules pause {as_typed(name)}, then saga schedules resume {as_typed(name)}: it goes on from now, "
            "and what has fired does not fire again",
        )


def _many(number: int, one: str, more: str = "") -> str:
    return f"{number} {one if number == 1 else more or f'{one}s'}"


def _words(length: timedelta) -> str:
    seconds = length.total_seconds()
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
