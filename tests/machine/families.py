"""Random families in a random world: runs with children and later links, and people who meddle at any moment.

Owns what the database does between runs: posts, births, later links, correcting runs, the queues of locks.  Each run is
a `World`, so that what happens at the provider is kept apart from the machine here, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from orchestrator.engine.commit import correction
from orchestrator.machine.fold import RunInfo
from orchestrator.machine.journal import (
    Arrival,
    AttemptEnded,
    Cancel,
    Late,
    LateSuccess,
    NewChild,
    Operate,
    Post,
    Restore,
    RollbackBegan,
    Signal,
    Terminate,
    Work,
    encode,
)
from orchestrator.machine.states import TERMINAL, Backward, Forward, RunState
from orchestrator.machine.turn import CodeMissing, Turn
from orchestrator.saga import registry as sagas
from tests.machine.chaos import World
from tests.machine.drawn import Drawn, member
from tests.machine.stage import T0

_TURN_IS_OWED: Any = None  # an event


@dataclass(slots=True)
class _Place:
    """A place in the queue of a lock."""

    run: str
    handle: str
    key: str
    granted: bool = False


class Member(World):
    """A run of a family; a link that has ended is one of its own, as is a correcting run."""

    def __init__(self, family: Family, info: RunInfo) -> None:
        self.family = family
        self.inbox: list[Arrival] = []
        self.has_code = True
        self._set_out(sagas.sagas[info.saga, info.version], info, family.seed, family.replays)
        self.effects, self.undone = family.effects, family.undone
        self.now = family.now

    def _chance(self, *what: object) -> int:
        return super()._chance(self.info.id, self.info.link, *what)

    def thing(self, key: str) -> str:
        rollback, run = self.fold.rollback, self.info.id
        if rollback is not None and rollback.undoes:
            return rollback.undoes
        if self.fold.continued is not None:
            run = run.removesuffix(f"~{self.info.link + 1}")
        return f"{run}~{self.info.link}:{key}" if self.info.link else f"{run}:{key}"

    # -- time --------------------------------------------------------------------------------------------------------
    @property
    def is_open(self) -> bool:
        return self.fold.state not in TERMINAL

    def next_due(self) -> datetime | None:
        """Return when something happens to this run by itself."""
        wake = self._wake if self.is_open else None
        return min(filter(None, (wake, self._events[0][0] if self._events else None)), default=None)

    def happen(self) -> None:
        """Let the next thing happen; what arrives is taken in at once, or by a later turn together with more."""
        self.now = self.family.now
        self._land()
        if not self._events or self._events[0][0] > self.now:
            self.take_in()
            return
        _, number, event = self._events[0]
        self._events[:1] = []
        self._events.sort(key=lambda other: other[:2])
        if event is _TURN_IS_OWED:
            self.take_in()
        elif isinstance(event, Work):
            self._begin(event)
        elif self._chance("left", number) < 170:
            self.inbox.append(event)
            self.take_in()
        else:
            self.leave(event)

    def leave(self, arrival: Arrival) -> None:
        """Leave something for the next turn, which is due soon."""
        self.inbox.append(arrival)
        pause = self._chance("owed", len(self.rows), len(self.inbox)) % 4
        self._plan(self.family.now + timedelta(seconds=pause), _TURN_IS_OWED)

    def take_in(self) -> None:
        self.now = self.family.now
        arrivals, self.inbox = self.inbox, []
        if self.is_open or arrivals:
            self._turn(arrivals)

    def _turn(self, arrivals: list[Arrival]) -> None:
        """Take a turn as any process would: with or without code, live or replayed, the second after one was lost."""
        chance = self._chance("process", len(self.rows), len(arrivals))
        if self._replays or not self.has_code or chance < 40:
            self._reload()
        if not self.has_code or chance < 15:
            self._execution.script = None
            try:
                self._commit(self._execution.turn(arrivals, self.now))
                self._reload()
                return
            except CodeMissing:
                assert self.has_code, "a correcting run wants code"
                self._reload()
        elif chance < 30:
            with contextlib.suppress(Exception):
                self._execution.turn(arrivals, self.now)  # its commit fails
            self._reload()
        super()._turn(arrivals)

    def _reload(self) -> None:
        self._execution.discard()
        self._execution = self._loaded()

    def _begin(self, work: Work) -> None:
        step = self.fold.steps[work.key]
        if work.role in ("do", "once"):
            assert step.backward is Backward.NONE, f"{work.key} is begun although its undo has begun"
        if step.is_pivot and work.role == "do":
            for run in self.family.line_of(self):
                assert run.fold.rollback is None, f"pivot {self.thing(work.key)} is begun, and {run.info.id} goes back"
        if work.role == "once":
            function = self._execution.function_of(work.key)
            if self._execution.is_ahead:
                self._reload()
            result = None if function is None else function()
            self._plan(self.now, AttemptEnded(work.key, "do", work.attempt + 1, "succeeded", result))
        else:
            super()._begin(work)

    # -- what a turn commits -----------------------------------------------------------------------------------------
    def _commit(self, turn: Turn) -> None:
        begun = [e for e in self._events if isinstance(e[2], AttemptEnded)]
        self.family.queue(self, turn)
        super()._commit(replace(turn, locks=[]))
        if any(isinstance(entry, RollbackBegan) for entry in turn.entries):
            self.family.must_be_revocable(self)
        for late in turn.corrections:
            self.family.correct(self, late)
        if turn.state in TERMINAL and not turn.was_ended:
            self._end(begun)

    def _end(self, begun: list[tuple[datetime, int, Any]]) -> None:
        """What is due of a run that has ended is gone; an attempt that was begun has lost its fence."""
        self._events = [event for event in self._events if isinstance(event[2], LateSuccess)]
        for at, _, ended in begun:
            if ended.verdict == "succeeded" and "lock:" not in ended.key:
                late = LateSuccess(ended.key, ended.role, ended.attempt, ended.result, link=self.info.link)
                self._plan(at, late)
        if self.inbox:
            self.leave(self.inbox.pop())

    def _bear(self, child: NewChild) -> None:
        deadline = self.now + timedelta(seconds=child.deadline) if child.deadline else None
        info = RunInfo(child.id, child.saga, child.version, child.input, self.now, "", deadline, parent=self.info.id)
        self.family.add(Member(self.family, info))

    def _deliver(self, post: Post) -> None:
        other = self.family.members.get(post.run_id)
        if other is not None:
            other.leave(post.arrival)

    def _go_on(self, turn: Turn) -> None:
        if not turn.was_ended:
            self.family.continue_as_new(self, turn)

    def hear_of_a_restore(self) -> None:
        """Lose all work of the run, begun or not: its database was set back to this very moment.

        All workers have been stopped before, so that nobody reports what lands late; nothing does.
        """
        gone = Work | AttemptEnded | LateSuccess
        self._events = [event for event in self._events if not isinstance(event[2], gone)]
        self._landings.clear()
        self.leave(Restore("ann"))

    # -- people ------------------------------------------------------------------------------------------------------
    def mend(self) -> bool:
        """Do what a person would do about what is parked or paused; tell whether there was anything."""
        fold = self.fold
        orders = [Operate("resume", by="ann", cause=cause) for cause in fold.pauses]
        orders += [order for key in sorted(fold.parked_keys) for order in self._decide(key)]
        if fold.parked is not None:
            retry = self._chance("retry", len(self.rows)) < 80
            if fold.parked.role == "code" and self._chance("cancel", len(self.rows)) < 80:
                self.leave(Cancel("ann", "its code is wrong"))
            orders.append(Operate("retry" if retry else "resolve", "", "ann", "", [] if not retry else None))
        for order in orders:
            self.leave(order)
        return bool(orders)

    def _decide(self, key: str) -> Iterator[Operate]:
        step, chance = self.fold.steps[key], self._chance("decide", key, len(self.rows))
        if chance < 120:
            yield Operate("retry", key, "ann")
        elif step.parked == "undo":
            if step.asked.kind == "step" and self.thing(key) not in self.effects:
                yield Operate("resolve", key, "ann", "it is not there")
            else:
                yield Operate("skip", key, "ann", "as it is")
        elif chance < 150 and not step.is_pivot:
            yield Operate("skip", key, "ann", "nobody knows")
        elif self.thing(key) in self.effects:
            yield Operate("resolve", key, "ann", "it is there", step.asked.task.rsplit(".", 1)[-1])
        else:
            yield Operate("resolve", key, "ann", "it is not there", None, True)


class Family:
    """A root, all that came of it, and those who tell them what to do."""

    def __init__(self, drawn: Drawn, *, replays: bool = False) -> None:
        self.seed, self.replays = drawn.seed, replays
        self.now = T0
        self.effects: set[str] = set()
        self.undone: list[str] = []
        self.members: dict[str, Member] = {}
        self._queues: dict[str, list[_Place]] = {}
        self._orders = sorted(drawn.orders)
        deadline = None if drawn.deadline_s is None else T0 + timedelta(seconds=drawn.deadline_s)
        encoded = member.codec.encode_call((drawn.program,), {})
        self.add(Member(self, RunInfo("root", member.name, 1, encoded, T0, "", deadline)))

    @property
    def root(self) -> Member:
        return self.members["root"]

    def add(self, run: Member) -> None:
        assert run.info.id not in self.members
        self.members[run.info.id] = run

    # -- playing -----------------------------------------------------------------------------------------------------
    def play_out(self) -> None:
        """Play until all have ended: whoever is parked or paused is told how to go on."""
        for _ in range(20_000):
            due = min(((at, n) for n, run in enumerate(self.members.values()) if (at := run.next_due())), default=None)
            ordered = T0 + timedelta(seconds=self._orders[0][0]) if self._orders else None
            if ordered is not None and (due is None or ordered <= due[0]):
                self.now = max(self.now, ordered)
                self._order(*self._orders.pop(0)[1:])
            elif due is not None:
                self.now = max(self.now, due[0])
                [*self.members.values()][due[1]].happen()
            elif not self._open:
                return
            else:
                mended = [run.mend() for run in self._open]
                assert any(mended), f"nothing moves {[(run.info.id, str(run.fold.state)) for run in self._open]}"
        raise AssertionError(f"no end of {[(run.info.id, str(run.fold.state)) for run in self._open]}")

    @property
    def _open(self) -> list[Member]:
        return [run for run in self.members.values() if run.is_open]

    def _order(self, what: str, which: int) -> None:
        if not self._open:
            return
        run = self._open[which % len(self._open)]
        pause, _, saga_too = what.partition(" the ")
        match pause:
            case "cancel":
                run.leave(Cancel("ann", "changed her mind"))
            case "terminate":
                run.leave(Terminate("ann", "enough"))
            case "news":
                run.leave(Signal("news", f"o{self.now}", "news"))
            case "mend":
                run.mend()
            case "restore":
                for other in self._open:
                    other.hear_of_a_restore()
            case _ if saga_too:
                for other in self._open:
                    if other.info.saga == run.info.saga:
                        other.leave(Operate(pause, by="ann", cause="saga"))
            case _:
                run.leave(Operate(pause, by="ann"))

    # -- what the database does between runs -------------------------------------------------------------------------
    def continue_as_new(self, ended: Member, turn: Turn) -> None:
        continued, info = ended.fold.continued, ended.info
        assert continued is not None
        late = [(at, event) for at, _, event in ended._events if isinstance(event, LateSuccess)]
        ended._events, unread = [], ended.inbox
        ended.inbox = []
        ended.info = replace(info, id=f"{info.id}~{info.link + 1}")
        ended._reload()
        self.members[ended.info.id] = ended
        link = replace(
            info, version=continued.version, input=continued.input, started=self.now, link=info.link + 1,
            since=len(ended.rows),
        )  # fmt: skip
        self.members[info.id] = after = Member(self, link)
        if turn.seed:
            after.rows = [(turn.at, [encode(entry) for entry in turn.seed])]
            after._reload()
        for at, event in late:
            after.send(event, at)
        for arrival in unread:
            after.leave(arrival)

    def correct(self, run: Member, late: Late) -> None:
        """Undo what landed after the end of a run, in a run of its own."""
        info = replace(run.info, id=f"{run.info.id}/late/{late.key}/{late.attempt}", parent="", link=0, deadline=None)
        if info.id in self.members:
            return
        correcting = Member(self, replace(info, started=self.now, since=0))
        correcting.has_code = False
        correcting.rows = [(self.now, [*correction(run.fold, late)])]
        correcting._reload()
        self.add(correcting)

    def queue(self, run: Member, turn: Turn) -> None:
        """Let runs in and out of the queues of locks, as migration 0006 does."""
        for name, places in self._queues.items():
            left = [p for p in places if not (p.run == run.info.id and p.handle in turn.unlocks)]
            if len(left) < len(places):
                self._queues[name] = left
                if left and not any(place.granted for place in left):
                    below = [place for place in left if place.run.startswith(left[0].run)]
                    for place in below:
                        self._grant(place)
        for step in turn.locks:
            places = self._queues.setdefault(step.asked.task, [])
            place = _Place(run.info.id, run.info.lock(step.key), step.key)
            family = [above.info.id for above in self.line_of(run)]
            free = not places or any(other.granted and other.run in family for other in places)
            places.append(place)
            if free:
                self._grant(place)

    def _grant(self, place: _Place) -> None:
        place.granted = True
        self.members[place.run].leave(AttemptEnded(place.key, "do", 1, "succeeded"))

    @property
    def held(self) -> list[str]:
        """Locks that somebody holds, or waits for."""
        return [name for name, places in self._queues.items() if places]

    # -- looking -----------------------------------------------------------------------------------------------------
    @property
    def left(self) -> set[str]:
        """The things that some run says it has left."""
        left = ((run, item["key"]) for run in self.members.values() if run.fold.ended for item in run.fold.ended.left)
        return {run.thing(key) for run, key in left if key in run.fold.steps}

    def line_of(self, run: Member | None) -> Iterator[Member]:
        """Yield a run and those above it; of a root that went on as new the link that asked for it."""
        while run is not None:
            yield run
            run = self.parent_of(run)

    def parent_of(self, run: Member) -> Member | None:
        if not run.info.parent:
            return None
        rest = run.info.id.removeprefix(run.info.parent)
        link = int(rest[1:].partition("/")[0]) if rest.startswith("~") else 0
        now = self.members[run.info.parent]
        return now if now.info.link == link else self.members[f"{run.info.parent}~{link + 1}"]

    def must_be_revocable(self, run: Member) -> None:
        """A run goes back: no pivot of it, or below it, may have taken effect."""
        for other in self.members.values():
            if run not in self.line_of(other):
                continue
            for key, step in other.fold.steps.items():
                took = step.is_pivot and step.forward is Forward.SUCCEEDED and other.fold.state != RunState.TERMINATED
                assert not took, f"{run.info.id} goes back although {other.thing(key)} has taken effect"
