"""Random sagas in a random world: any tree of asyncio constructs, any outcome, any timing, lying about nothing.

The world keeps what really happened at the provider, apart from the machine, so that a law can compare both.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Any

from hypothesis import strategies as st

from orchestrator import saga
from orchestrator.machine.fold import RunInfo
from orchestrator.machine.journal import AttemptEnded, Cancel, Json, LateSuccess, Operate, Signal, Work
from orchestrator.machine.states import TERMINAL, RunState
from orchestrator.machine.turn import Turn
from orchestrator.saga import Saga
from orchestrator.testing.rehearsal import Rehearsal
from orchestrator.testing.stubs import Call, Cast
from tests.machine import steps
from tests.machine.programs import Language, Program
from tests.machine.stage import T0

STEPS = {
    step.__name__: step
    for step in (steps.look, steps.charge, steps.reserve, steps.wire, steps.careful, steps.mail, steps.tell)
} | {"settle": steps.settle, "capture": steps.capture}
UNDOABLE = {"charge", "reserve", "wire", "careful"}

LANGUAGE = Language(STEPS)


# -- programs ------------------------------------------------------------------------------------------------------
@saga.define(name="tests.chaos")
async def chaos(program: Any) -> Any:
    return await LANGUAGE.perform(program)


_seconds = st.integers(0, 12)
_names = st.sampled_from(sorted(STEPS))
_leaf = st.one_of(
    st.tuples(st.just("step"), _names, st.integers(0, 3)),
    st.tuples(st.just("step"), st.sampled_from(sorted(UNDOABLE)), st.integers(0, 3)),
    st.tuples(st.just("sleep"), _seconds),
    st.tuples(st.just("background"), _names, st.integers(0, 3), _seconds),
    st.tuples(st.just("fickle"), _names, st.integers(0, 3), _seconds),
    st.just(("fail",)),
    st.tuples(st.just("hear"), _seconds),
)


def _branches(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=4)
    return st.one_of(
        st.tuples(st.just("sequence"), several),
        st.tuples(st.sampled_from(["gather", "group", "first"]), several),
        st.tuples(st.just("tolerant"), inner),
        st.tuples(st.sampled_from(["timeout", "wait_for"]), _seconds, inner),
        st.tuples(st.just("scope"), inner),
        st.tuples(st.just("locked"), st.sampled_from(["a", "b"]), _seconds, inner),
    )


programs: st.SearchStrategy[Program] = st.recursive(_leaf, _branches, max_leaves=12).map(
    lambda program: ["sequence", [program]]
)


# -- the world -----------------------------------------------------------------------------------------------------
class World(Rehearsal):
    """Plays a run with outcomes and delays that depend on nothing but a seed, the key, the role and the attempt.

    `effects` holds the things whose effect is there now, `undone` the keys of what was undone.
    """

    def __init__(self, program: Program, seed: int, *, replays: bool, deadline_s: int | None = None) -> None:
        encoded = chaos.codec.encode_call((program,), {})
        deadline = None if deadline_s is None else T0 + timedelta(seconds=deadline_s)
        self._set_out(chaos, RunInfo("chaos", chaos.name, 1, encoded, T0, "", deadline), seed, replays)
        for number in range(3 if "'hear'" in repr(program) else 0):
            news = Signal("news", f"s{number}", f"news {number}")
            self.send(news, T0 + timedelta(seconds=self._chance("news", number) % 40))

    def _set_out(self, saga: Saga[Any, Any], info: RunInfo, seed: int, replays: bool) -> None:
        super().__init__(saga, info, Cast({}), replays=replays)
        self._seed = seed
        self.effects: set[str] = set()
        self.undone: list[str] = []
        self.corrections: list[str] = []
        self.turns: list[Turn] = []
        self._landings: list[tuple[datetime, str]] = []

    def _chance(self, *what: object) -> int:
        return hashlib.sha256(repr((self._seed, *what)).encode()).digest()[0]

    def thing(self, key: str) -> str:
        """What the provider calls that which a step is about."""
        return key

    def _thing_of(self, work: Work) -> str:
        return self.thing(work.key)

    # -- time: work begins late, effects land late, reports come in bunches ------------------------------------------
    def _plan(self, at: datetime, event: Any) -> None:
        if isinstance(event, Work):
            at += timedelta(seconds=self._chance("begin", event.key, event.role, event.attempt) % 4)
        elif isinstance(event, AttemptEnded) and "lock:" in event.key:
            at += timedelta(seconds=self._chance("lock", event.key) % 8)  # others had it
        super()._plan(at, event)

    def _happen(self) -> None:
        self._land()
        arrivals: list[Any] = []
        while self._events and self._events[0][0] <= self.now and not isinstance(self._events[0][2], Work):
            arrivals.append(self._events[0][2])
            self._events[:1] = []
            self._events.sort(key=lambda event: event[:2])
        if arrivals or not self._events or self._events[0][0] > self.now:
            self._turn(arrivals)
        else:
            work = self._events[0][2]
            assert isinstance(work, Work)
            self._events[:1] = []
            self._events.sort(key=lambda event: event[:2])
            self._begin(work)

    def _commit(self, turn: Turn) -> None:
        super()._commit(turn)
        self.turns.append(turn)
        for work in turn.work:
            assert self._outstanding(work.key) == 1, f"{work.key} has two pieces of work at a time"
        self.corrections += [late.key for late in turn.corrections]

    def _outstanding(self, key: str) -> int:
        events = (event for _, _, event in self._events if isinstance(event, Work | AttemptEnded))
        return sum(event.key == key for event in events)

    def _land(self) -> None:
        self.effects |= {key for at, key in self._landings if at <= self.now}
        self._landings = [(at, key) for at, key in self._landings if at > self.now]

    # -- outcomes ----------------------------------------------------------------------------------------------------
    def _begin(self, work: Work) -> None:
        name = work.task.rsplit(".", 1)[-1]
        self.calls.append(Call(name, work.role, (), None, {}, None, work.key, work.attempt + 1))
        report = {"do": self._do, "undo": self._undo, "probe": self._probe}[work.role]
        took = timedelta(seconds=self._chance("took", work.key, work.role, work.attempt) % 5)
        super()._plan(self.now + took, report(work, name, took))

    def _do(self, work: Work, name: str, took: timedelta) -> AttemptEnded:
        chance = self._chance("do", work.key, work.attempt)
        if chance < 140:
            self.effects.add(self._thing_of(work))
            return self._ended(work, "succeeded", work.call["a"]["n"] if name == "look" else name)
        if chance < 170:
            return self._ended(work, "rejected")
        if chance < 190:
            return self._ended(work, "failed")
        if chance < 215:
            self.effects.add(self._thing_of(work))
            return self._ended(work, "doubt")
        if chance < 235:
            return self._ended(work, "doubt")
        return self._lost(work, name, took, within=chance < 246)

    def _lost(self, work: Work, name: str, took: timedelta, *, within: bool) -> AttemptEnded:
        """The worker is lost; its effect lands before its deadline, or after, and is then reported late."""
        quiet = self.now + took + timedelta(seconds=20)
        landing = quiet - timedelta(seconds=5) if within else quiet + timedelta(seconds=30)
        self._landings.append((landing, self._thing_of(work)))
        result = work.call["a"]["n"] if name == "look" else name
        late = LateSuccess(work.key, "do", work.attempt + 1, result, link=self.info.link)
        super()._plan(landing, late)
        return self._ended(work, "doubt", quiet=quiet.isoformat())

    def _undo(self, work: Work, name: str, took: timedelta) -> AttemptEnded:
        chance = self._chance("undo", work.key, work.attempt)
        if chance >= 60:
            self.effects.discard(self._thing_of(work))
            self.undone.append(work.key)
        return self._ended(work, "succeeded" if chance >= 90 else "rejected" if chance < 20 else "doubt")

    def _probe(self, work: Work, name: str, took: timedelta) -> AttemptEnded:
        if self._chance("probe", work.key, work.attempt) < 60:
            return self._ended(work, "doubt")
        step = self.fold.steps[work.key].asked.task.rsplit(".", 1)[-1]
        return self._ended(work, "succeeded", step if self._thing_of(work) in self.effects else None)

    def _ended(self, work: Work, verdict: str, result: Json = None, quiet: str = "") -> AttemptEnded:
        error = None if verdict == "succeeded" else {"type": "Trouble", "message": verdict}
        return AttemptEnded(work.key, work.role, work.attempt + 1, verdict, result, error, quiet=quiet)

    # -- operators, who always tell the truth ------------------------------------------------------------------------
    def play_out(self) -> None:
        """Play to the end: whatever parks is mended, and what lands after the end lands."""
        for _ in range(200):
            self.play()
            if self.fold.state in TERMINAL:
                self._play_late_arrivals()
                return
            assert self.fold.state is RunState.PARKED, f"stuck: {self.fold.state}"
            self._operate()
        raise AssertionError("operators cannot bring this run to an end")

    def _operate(self) -> None:
        fold = self.fold
        for key in sorted(fold.parked_keys):
            if fold.steps[key].parked != "do" or self._chance("operator", key, fold.steps[key].attempts) < 100:
                self.send(Operate("retry", key, "ann"))
            elif self.thing(key) in self.effects:
                result = fold.steps[key].asked.task.rsplit(".", 1)[-1]
                self.send(Operate("resolve", key, "ann", "looked it up", result))
            else:
                self.send(Operate("resolve", key, "ann", "looked it up", None, True))
        if fold.parked is not None:
            self.send(Operate("resolve", "", "ann", "as good as done", []))

    def _play_late_arrivals(self) -> None:
        while self._events:
            at, _, event = self._events.pop(0)
            self._events.sort(key=lambda other: other[:2])
            self.now = max(self.now, at)
            self._land()
            if isinstance(event, LateSuccess):
                self._turn([event])


def cancel_at(world: World, seconds: int | None) -> None:
    if seconds is not None:
        world.send(Cancel("ann", "chaos"), T0 + timedelta(seconds=seconds))
