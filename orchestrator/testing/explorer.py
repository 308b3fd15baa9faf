"""``testing.explore``: every way in which the steps of one run can fail, each tried on a clean state, each judged.

Owns which schedules of faults there are, and in which order they are tried: the short ones first.  Must never judge
(`judge` does) and never make anything fail itself (`worker` does).
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from orchestrator.canvas import Durable
from orchestrator.machine.policy import Effect
from orchestrator.machine.states import TERMINAL
from orchestrator.saga import Saga
from orchestrator.step import registry as steps
from orchestrator.store.turns import Taken
from orchestrator.testing.asking import call
from orchestrator.testing.environment import Environment
from orchestrator.testing.faults import EVERY, Fault, Kind
from orchestrator.testing.handle import EnvironmentRun
from orchestrator.testing.judge import Judge
from orchestrator.testing.report import Exploration, InvariantBroken, Played, Schedule
from orchestrator.testing.result import as_saga

RUN_ID: Final = "explored"
_DEEPEST: Final = 3  # faults of which each is only reached because of the one before
_ROUNDS: Final = 20
_CRASHES: Final = (Kind.DIED_BEFORE, Kind.DIED_AFTER, Kind.DIED_COMMITTED)
_OF_UNDO: Final = (Kind.SILENT, Kind.LOST, *_CRASHES, Kind.REJECTED)


def explore(
    saga: Saga[Any, Any] | Durable,
    args: Any = (),
    *,
    invariant: Callable[..., Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    setup: Callable[..., Any] | None = None,
    stubs: Mapping[Any, Any] | None = None,
    waiting: Callable[..., Any] | None = None,
    meanwhile: Callable[..., Any] | None = None,
    late: bool = False,
    may_leave: Sequence[Any] = (),
    pairs: int = 40,
    max_schedules: int = 500,
    seed: int = 0,
    environment: Environment | None = None,
    check: bool = True,
) -> Exploration:
    """Run a saga or a durable canvas with a failure and a crash at every step and boundary; check that it ends well.

    `args` are the saga's: a tuple, or the only one.  Before each schedule the environment forgets all runs and `setup`
    makes your state what it was at first.  Then a step is rejected, loses its answer after its effect or without it,
    once or at every attempt; its worker dies before its code, after its effect, or after the commit; the run is
    cancelled; and the same happens to every undo, probe and step that only such a failure leads to.  Then come `pairs`
    of faults, drawn by `seed`.  There are at most `max_schedules` in all.  A run that parks is retried by an operator
    once nothing fails any more.

    `invariant` is called when the run has ended; False or an exception is a violation. So is a run that neither ends
    nor parks, one that parks as a whole because its code is wrong, and an effect that is left without undo, unless it
    is one of a step that `may_leave`. `waiting` is called with the run when it waits for a signal, before time passes,
    or for anything else that nobody sends, to send it; without it timeouts go by. `meanwhile` is called with the
    environment right before a step, once for each of them: whatever it does, say another run on the same account,
    happens at the worst moment. With `late` each step that has an undo is also given up and undone first, and takes
    effect after that: whoever keeps the effect is to refuse it.

    These functions may take what they need of ``run`` and ``environment`` by these names, or one argument of any name.
    Without an `environment` one is made, on
    ORCHESTRATOR_TEST_DATABASE_URL or an embedded Postgres, and kept for this process.
    Raises: InvariantBroken, an AssertionError whose text is the report with the shortest failing schedule, unless
    `check` is false; ConfigurationError if there is no Postgres.
    """
    __tracebackhide__ = True
    if environment is None:
        from orchestrator.testing.servers import shared

        environment = shared()
    saga, arguments, given = as_saga(saga, args if isinstance(args, tuple) else (args,), kwargs or {})
    stage = _Stage(environment, saga, arguments, given, setup, stubs or {}, waiting, meanwhile, late)
    explorer = _Explorer(stage, Judge(invariant, may_leave), Exploration(saga.name, seed), max_schedules)
    try:
        explorer.explore(pairs, random.Random(seed))
    finally:
        environment.reset()
        environment.release()
    if check and not explorer.found.ok:
        raise InvariantBroken(explorer.found)
    return explorer.found


@dataclass(slots=True)
class _Stage:
    """On what a schedule is played: always the same saga, arguments and beginning."""

    environment: Environment
    saga: Saga[Any, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    setup: Callable[..., Any] | None
    stubs: Mapping[Any, Any]
    waiting: Callable[..., Any] | None
    meanwhile: Callable[..., Any] | None
    late: bool

    def play(self, schedule: Schedule) -> tuple[EnvironmentRun, list[Taken]]:
        """Play a schedule to its end; returns the run and the attempts that were made."""
        environment = self.environment
        environment.reset()
        environment.stub(self.stubs)
        call(self.setup, environment=environment)
        environment.order(schedule.faults, lambda: call(self.meanwhile, environment=environment))
        before = len(environment.script.seen)
        run = environment.start(self.saga, *self.args, kwargs=self.kwargs, task_id=RUN_ID)
        environment.finish(self._in_time(run))
        for _ in range(_ROUNDS):
            if self._mend() or self._send(run):
                environment.finish(self._in_time(run))
            else:
                break
        for effect in environment.script.late[:1]:
            effect()
        return run, environment.script.seen[before:]

    def _in_time(self, run: EnvironmentRun) -> Callable[[], bool]:
        """Return what sends a signal before a timeout or a deadline goes by: once for each time that one is awaited."""
        known: set[str] = set()

        def send() -> bool:
            awaited = set(run.awaited) - known if self.waiting else set()
            known.update(awaited)
            return bool(awaited) and self._send(run)

        return send

    def _send(self, run: EnvironmentRun) -> bool:
        """Send what the run waits for."""
        if self.waiting is None or run.state in (*TERMINAL, "parked"):
            return False
        call(self.waiting, run=run, environment=run.environment)
        return True

    def _mend(self) -> bool:
        """Be the operator, once whatever was out of order works again: for a child that its parent awaits as well."""
        parked = [
            (run, item["key"]) for run in self.environment.runs_in("parked") for item in run.parked if item["key"]
        ]
        if parked:
            self.environment.heal()
        for run, key in parked:
            run.retry(key, reason="what was out of order works again")
        return bool(parked)


@dataclass(slots=True)
class _Explorer:
    """Breadth first: schedules that a failure made possible come after all that need fewer failures."""

    stage: _Stage
    judge: Judge
    found: Exploration
    limit: int
    _known: set[tuple[Any, ...]] = field(default_factory=set)

    def explore(self, pairs: int, rng: random.Random) -> None:
        began = time.monotonic()
        level, singles = [Schedule()], list[Schedule]()
        for _ in range(_DEEPEST + 1):
            level = [wider for schedule in level for wider in self._try(schedule)]
            singles = singles or level
            if self.found.failures or not level:
                break
        if not self.found.failures:
            for pair in self._pairs(singles, pairs, rng):
                self._try(pair)
        self.found.seconds = time.monotonic() - began

    def _try(self, schedule: Schedule) -> list[Schedule]:
        """Play and judge a schedule; returns the schedules with one fault more that it opens."""
        if self.found.tried >= self.limit:
            self.found.exhausted = True
            return []
        run, seen = self.stage.play(schedule)
        problem = self.judge.problem(run)
        self.found.count(schedule, run, seen)
        if problem:
            self.found.failures.append(Played.of(schedule, run, problem))
        return [
            Schedule((*schedule.faults, *faults))
            for taken in seen
            if self._is_new(schedule, taken)
            for faults in self._faults(taken)
        ]

    def _is_new(self, schedule: Schedule, taken: Taken) -> bool:
        """An undo of what certainly happened, and one of what is in doubt, are two different things."""
        struck = any(fault.key == taken.key and fault.run == taken.run_id for fault in schedule.faults)
        point = (taken.run_id, taken.key, taken.role, struck and taken.role != "do")
        if taken.attempt > 1 or taken.run_id.startswith(f"{RUN_ID}/late/") or point in self._known:
            return False
        self._known.add(point)
        return True

    def _faults(self, taken: Taken) -> Iterator[tuple[Fault, ...]]:
        """Yield what can happen to an attempt and to those that follow from it."""
        one = Fault(Kind.SILENT, taken.task, 1, taken.key, taken.role, taken.run_id)
        if taken.role == "once":
            kinds: tuple[Kind, ...] = (Kind.DIED_COMMITTED,)
        elif taken.role == "undo":
            kinds = _OF_UNDO
        elif taken.role == "probe":
            kinds = (Kind.SILENT, *_CRASHES)
        else:
            yield from self._lasting(taken, one)
            kinds = (Kind.SILENT, *_CRASHES, Kind.CANCELLED)
            kinds += (Kind.MEANWHILE,) if self.stage.meanwhile is not None else ()
        yield from ((replace(one, kind=kind),) for kind in kinds)

    def _lasting(self, taken: Taken, one: Fault) -> Iterator[tuple[Fault, ...]]:
        """Yield what settles a step other than as succeeded, and an answer that is lost."""
        declared = steps.steps.get(taken.task)
        transactional = declared is not None and declared.options.transactional
        yield (replace(one, kind=Kind.REJECTED),)
        yield (replace(one, attempt=EVERY),)
        if declared is not None and declared.options.effect is Effect.NONE:
            return
        yield (replace(one, kind=Kind.LOST),)
        if not transactional:  # one whose commit happened has no second attempt
            yield (replace(one, kind=Kind.LOST, attempt=EVERY),)
            yield (replace(one, kind=Kind.LOST), replace(one, kind=Kind.REJECTED, attempt=2))
            if self.stage.late and declared is not None and declared.options.compensate is not None:
                yield (replace(one, kind=Kind.LATE, attempt=EVERY),)

    @staticmethod
    def _pairs(singles: Sequence[Schedule], count: int, rng: random.Random) -> list[Schedule]:
        """Draw pairs of faults at different requests."""
        pairs = [
            Schedule((*first.faults, *second.faults))
            for first, second in itertools.combinations(singles, 2)
            if first.faults[0].key != second.faults[0].key
        ]
        return rng.sample(pairs, min(len(pairs), count))
