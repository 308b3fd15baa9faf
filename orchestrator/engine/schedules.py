"""What becomes of a schedule's slots: started, left out, made to wait; each decided once.

Owns the transactions of beat: a slot is written in the transaction that starts its run.  Must never send a message to
the broker itself, and never keep state that matters: a beat that starts now goes on where another one stopped.
"""

from __future__ import annotations

import hashlib
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property
from itertools import islice

from orchestrator.codec import dumps
from orchestrator.engine.timetable import Timetable, between, latest
from orchestrator.errors import UsageError
from orchestrator.failpoints import failpoint
from orchestrator.machine.journal import Cancel, Restore, encode
from orchestrator.store import arrivals, restores, runs
from orchestrator.store import schedules as store
from orchestrator.store.connection import Connection

OPTIONS = frozenset({"catch_up", "overlap", "timezone", "slot_argument"})
"""What the `options` of an entry may hold for us, besides what Celery's `apply_async` and a saga's take."""

SENT = "it is sent all the same"
"""How a problem ends that keeps no slot from firing."""

LATE = timedelta(minutes=1)  # a slot is missed if nobody has looked at it for so long; until then it is late
EVER = timedelta(days=100_000)
_MOMENT = timedelta(microseconds=1)
_FIRST = datetime(1, 2, 1, tzinfo=UTC)  # before it there need not be a date in each zone
_PAGE = 100  # slots that one transaction decides
_BACKFILL_LIMIT = 10_000
_LONGEST_ID = 200  # bytes; brokers carry it in a field of at most 255


class Overlap(StrEnum):
    """What becomes of a slot while a run of the same schedule has not ended."""

    ALLOW = "allow"
    SKIP = "skip"
    QUEUE = "queue"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True)
class Due:
    """Slots to fire, up to where a schedule is settled by that, and the newest of the missed ones that are left out."""

    fire: list[datetime]
    until: datetime
    left_out: datetime | None = None


@dataclass(frozen=True, slots=True)
class CatchUp:
    """Which missed slots fire: each that is not older than `each`, else the latest if it is not older than `last`."""

    each: timedelta = LATE
    last: timedelta = EVER

    def due(self, timetable: Timetable, settled_until: datetime, now: datetime, limit: int = _PAGE) -> Due:
        """Return what is due of a schedule: at most `limit` slots, the oldest first."""
        since = max(settled_until, now - self.each)
        fire = list(islice(between(timetable, settled_until, since, now), limit))
        missed = latest(timetable, settled_until, settled_until, since)
        if missed is not None and not fire and missed >= now - self.last:
            return Due([missed], missed, latest(timetable, settled_until, settled_until, missed - _MOMENT))
        return Due(fire, max([settled_until, *fire[-1:], *([missed] if missed else [])]), missed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """An entry of a beat schedule: `start` makes a run of a slot; without it the slot is sent as a message."""

    name: str
    task: str
    reads: str
    timetable: Timetable
    start: Callable[[str, datetime], runs.Start] | None = None
    catch_up: CatchUp = CatchUp()
    overlap: Overlap = Overlap.ALLOW
    problem: str | None = None

    @property
    def declared(self) -> store.Declared:
        return store.Declared(self.name, self.task, self.reads, self.problem)


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of a slot: `started`, `sending`, `waiting` or `skipped`, and why."""

    slot: datetime
    state: str
    run_id: str
    because: str | None = None


def run_id(app: str, name: str, slot: datetime) -> str:
    """Return the id of the run, or message, of a slot: the same for whoever asks.

    The name of a schedule may have a slash.  Had that of its app one, ``a`` with ``b/c`` would be ``a/b`` with ``c``.
    """
    moment = slot.astimezone(UTC).isoformat().replace("+00:00", "Z")
    whole = f"{app}/{name}@{moment}"
    if "/" not in app and whole.isascii() and whole.isprintable() and len(whole) <= _LONGEST_ID:
        return whole
    both = dumps([app, name]) if "/" in app else f"{app}/{name}"
    return f"{hashlib.sha256(both.encode(errors='replace')).hexdigest()[:32]}@{moment}"


class Schedules:
    """The schedules of one app."""

    def __init__(self, app: str, ring: Callable[[Connection, str, int], None]) -> None:
        self.app = app
        self._ring = ring

    # -- for the beat that leads ---------------------------------------------------------------------------------------
    def fire(
        self, connection: Connection, schedule: Schedule, holder: str, now: datetime | None = None
    ) -> list[Decision]:
        """Decide a page of what is due, and start what has waited; nothing for who leads no more.  Commits."""
        failpoint("beat.fire.before", connection)
        deciding = _Deciding(connection, self.app, schedule, now)
        with connection.transaction():
            held = store.hold(connection, self.app, schedule.name, holder, now)
            if held is None or held.paused:
                return []
            failpoint("beat.fire.held", connection)
            deciding.start_waiting()
            due = schedule.catch_up.due(schedule.timetable, held.settled_until, held.now)
            deciding.leave_out(due.left_out, held.settled_until)
            for slot in due.fire:
                deciding.decide(slot, "schedule")
            if due.until != held.settled_until:
                store.settle(connection, self.app, schedule.name, due.until)
            failpoint("beat.fire.decided", connection)
        failpoint("beat.fire.after", connection)
        return self._told(connection, deciding)

    def send_one(
        self, connection: Connection, send: Callable[[str, datetime, str], None], names: Iterable[str]
    ) -> str | None:
        """Send a message of these schedules not known to be sent; returns its schedule, None if none is.  Commits.

        Its row stays locked meanwhile, so that two senders do not send it at once.  If the sender dies before it has
        noted that it sent, it is sent again, with the same id.
        """
        with connection.transaction():
            found = store.unsent(connection, self.app, names)
            if found is None:
                return None
            name, slot, message_id = found
            failpoint("beat.send.before", connection)
            send(name, slot, message_id)
            failpoint("beat.send.sent", connection)
            store.change(connection, self.app, name, slot, "sent")
        failpoint("beat.send.after", connection)
        return name

    # -- for people ----------------------------------------------------------------------------------------------------
    def trigger(self, connection: Connection, schedule: Schedule, now: datetime | None = None) -> Decision:
        """Fire now, whatever the timetable says and even if it is paused; the overlap policy counts.  Commits."""
        deciding = _Deciding(connection, self.app, schedule, now)
        failpoint("trigger.before", connection)
        with connection.transaction():
            held = self._hold(connection, schedule, now)
            failpoint("trigger.held", connection)
            deciding.decide(held.now, "trigger")
            failpoint("trigger.decided", connection)
        failpoint("trigger.after", connection)
        (decision,) = self._told(connection, deciding)
        return decision

    def backfill(
        self, connection: Connection, schedule: Schedule, since: datetime, until: datetime, now: datetime | None = None
    ) -> list[Decision]:
        """Fire the slots from `since` up to and including `until` that have not fired, the oldest first.

        With an overlap policy other than `allow` they run one after the other.  Commits, a page at a time.
        Raises: UsageError if there are too many; nothing has fired then.
        """
        with connection.transaction():
            held = self._hold(connection, schedule, now)
        begin, end = max(since, _FIRST) - _MOMENT, min(until, held.now)
        slots: list[datetime] = []
        if begin < end:
            slots += islice(between(schedule.timetable, held.settled_until, begin, end), _BACKFILL_LIMIT + 1)
        if len(slots) > _BACKFILL_LIMIT:
            raise UsageError(f"{schedule.name!r} has more than {_BACKFILL_LIMIT} slots in that time; take less at once")
        told: list[Decision] = []
        for page in range(0, len(slots), _PAGE):
            deciding = _Deciding(connection, self.app, schedule, now)
            failpoint("backfill.before", connection)
            with connection.transaction():
                self._hold(connection, schedule, now)
                failpoint("backfill.held", connection)
                for slot in slots[page : page + _PAGE]:
                    deciding.decide(slot, "backfill")
                failpoint("backfill.decided", connection)
            failpoint("backfill.after", connection)
            told += self._told(connection, deciding)
        return told

    def _hold(self, connection: Connection, schedule: Schedule, now: datetime | None) -> store.Held:
        store.ensure(connection, self.app, schedule.declared, now)
        held = store.hold(connection, self.app, schedule.name, now=now)
        assert held is not None
        return held

    def _told(self, connection: Connection, deciding: _Deciding) -> list[Decision]:
        """Ring, after the commit, and return what was decided."""
        for queue, rows in deciding.rings.items():
            self._ring(connection, queue, rows)
        return deciding.decisions


class _Deciding:
    """What one transaction decides about a schedule whose row it holds."""

    def __init__(self, connection: Connection, app: str, schedule: Schedule, now: datetime | None) -> None:
        self._connection = connection
        self._app = app
        self._schedule = schedule
        self._now = now
        self.decisions: list[Decision] = []
        self.rings: Counter[str] = Counter()

    def start_waiting(self) -> None:
        """Start the slot that has waited longest, if the run before it has ended."""
        if self._open and self._open[0].state == "waiting" and all(each.state != "running" for each in self._open):
            first = self._open[0]
            state = "running" if self._schedule.start else "sending"
            store.change(self._connection, self._app, self._schedule.name, first.slot, state)
            self._look_again()
            if self._schedule.start:
                self._start(first.slot, first.run_id, first.at)
            self.decisions.append(Decision(first.slot, "started", first.run_id))

    def decide(self, slot: datetime, origin: str) -> None:
        """Decide a slot, unless that was done before."""
        state, because = self._verdict(origin)
        if not self._write(slot, origin, state, because):
            return
        if state == "waiting" and origin != "backfill" and self._schedule.overlap is Overlap.CANCEL:
            self._make_room(slot)
        if state in ("started", "running"):
            is_new = self._start(slot, self.decisions[-1].run_id)
            if not is_new:
                self._look_again()  # it may have ended
            if origin == "backfill" and not is_new:
                self.decisions.pop()  # it has fired, so long ago that its row is gone, and is known by its run

    def _write(self, slot: datetime, origin: str, state: str, because: str | None) -> bool:
        own_id = run_id(self._app, self._schedule.name, slot)
        new = store.decide(
            self._connection, self._app, self._schedule.name, slot,
            origin=origin, state=state, run_id=own_id, because=because, now=self._now,
        )  # fmt: skip
        if new:
            told = "started" if state == "running" else state
            self.decisions.append(Decision(slot, told, own_id, because))
            if state in ("running", "waiting"):
                insort(self._open, store.Open(slot, state, own_id, slot, True), key=lambda each: each.slot)
        return new

    def leave_out(self, newest: datetime | None, since: datetime) -> None:
        """Put the newest of the missed slots on record; one stands for all of them."""
        if newest is not None:
            because = f"nobody was there for the slots after {since.isoformat(timespec='seconds')} up to this one"
            self._write(newest, "schedule", "skipped", because)

    def _verdict(self, origin: str) -> tuple[str, str | None]:
        overlap = self._schedule.overlap
        if self._schedule.start is None:
            return "sending", None
        if overlap is Overlap.ALLOW:
            return "started", None
        if not self._open:
            return "running", None
        because = f"run {self._open[0].run_id} has not ended"
        if overlap is Overlap.SKIP and origin != "backfill":
            return "skipped", because
        return "waiting", because

    @cached_property
    def _open(self) -> list[store.Open]:
        """The open slots, read once: there may be thousands, and who holds the schedule alone changes them."""
        return store.open_slots(self._connection, self._app, self._schedule.name)

    def _look_again(self) -> None:
        self.__dict__.pop("_open", None)

    def _make_room(self, slot: datetime) -> None:
        """Tell what runs to stop and undo, if it can; what waits is left out for the slot that comes now."""
        name = self._schedule.name
        for each in list(self._open):
            if each.slot == slot:
                continue
            if each.state == "waiting":
                because = "a later slot came before it began"
                store.change(self._connection, self._app, name, each.slot, "skipped", because)
                self._open.remove(each)
            elif each.goes_forward:
                order = encode(Cancel("beat", f"the next slot of schedule {name} has come"))
                queue = arrivals.leave(self._connection, each.run_id, order, self._now, anyone=True)
                self.rings[queue or ""] += 1

    def _start(self, slot: datetime, own_id: str, waited_since: datetime | None = None) -> bool:
        """Start the run of a slot; False if it is there, or was until it was pruned.

        One that may have run already, had the database not been set back, hears of the restore before anything else, as
        those do that were there.
        """
        assert self._schedule.start is not None
        new, by = self._schedule.start(own_id, slot), self._restored_by(slot, waited_since)
        new = replace(new, hears=encode(Restore(by)) if by else None)
        if not runs.start(self._connection, new, self._now):
            return False
        self.rings[new.queue] += 1
        return True

    def _restored_by(self, slot: datetime, waited_since: datetime | None) -> str:
        """Return who looked after the restore that may have forgotten the run of a slot; the empty string if none may.

        It may have begun if it waited when the database was set back; or if its instant lies after the last slot that
        was decided by then.  Who fires it now is no matter: beat that makes up for it, at once or later, or a person.
        """
        if self._restored is None:
            return ""
        began_at, by = self._restored
        if waited_since and waited_since <= began_at:
            return by
        return by if slot <= began_at and (self._known is None or slot > self._known) else ""

    @cached_property
    def _restored(self) -> tuple[datetime, str] | None:
        return restores.last(self._connection)

    @cached_property
    def _known(self) -> datetime | None:
        assert self._restored is not None
        return store.last_decided(self._connection, self._app, self._schedule.name, self._restored[0])
