"""The protocol of docs/concepts.md as a small machine: two workers, one run of two steps, a broker that forgets.

Owns what each part may do next, one move at a time.  The first step takes effect outside and has a compensation; the
second is transactional, or is always rejected.  Must never import the engine: what the model shows, it shows of the
rules as they are written, and each of them can be taken out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Rules:
    """What the protocol keeps; each is on unless a test takes it out."""

    ring_again: bool = True  # 2: the pump rings for what is due and wakes what was forgotten
    count_first: bool = True  # 3: an attempt is counted before it runs
    fence: bool = True  # 4: what an attempt writes is refused once the attempt was given away
    intent_first: bool = True  # 5: the begin is committed before the effect
    give_back: bool = True  # 6: what the dead had begun is given back
    undo_unknown: bool = True  # a step that ends in doubt is undone
    ring_for_due: bool = True  # the pump rings only if something is due
    wait_until_quiet: bool = True  # an undo waits for the deadline of an attempt whose process may live
    note_late: bool = True  # a refused success is written down, and undone if it was decided without it
    provider_remembers: bool = True  # the contract of a compensation: a "do" after its undo is refused


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far the model goes."""

    second: str = "transactional"
    faults: int = 2
    cancels: int = 1
    attempts: int = 2
    crashes_after_effect: bool = True
    in_doubt: bool = True  # whether an attempt that runs may end in doubt
    deadlines: bool = False  # whether an attempt is without effect once its deadline has passed


class Step(NamedTuple):
    """What the journal says of a step."""

    forward: str = ""  # asked, undoing, succeeded, rejected, unknown, withdrawn
    backward: str = ""  # asked, done, parked
    begun: int = 0  # attempts that ran: the number of the last one is its fence
    counted: int = 0  # attempts as the retry policy sees them
    doubt: bool = False
    undos: int = 0
    late: bool = False
    lates: int = 0


class Work(NamedTuple):
    """The row of work: at most one, since the steps follow one another."""

    step: int
    role: str
    attempt: int = 0  # of a begun one
    begun: bool = False


class Worker(NamedTuple):
    """A worker: idle, dead, about to take a turn, or running an attempt (then `did` says how far it is)."""

    doing: str = ""
    step: int = 0
    attempt: int = 0
    did: str = ""
    paused: bool = False
    stale: bool = False
    spent: bool = False  # its deadline has passed


class State(NamedTuple):
    """Everything there is: Postgres, the broker, two workers, the world."""

    workers: tuple[Worker, ...]
    run: str = "running"
    stopping: bool = False
    steps: tuple[Step, Step] = (Step(), Step())
    work: Work | None = None
    arrivals: tuple[tuple[str, int, str], ...] = ()  # what it is (do, undo, late, cancel), the step, the verdict
    turn_due: bool = True
    bells: int = 1
    effect: str = "absent"  # of the first step, at the provider: absent, present, undone
    written: int = 0  # rows of the transactional step
    faults: int = 0
    cancels: int = 0
    wrong: str = ""


class Move(NamedTuple):
    """One thing that can happen."""

    label: str
    state: State
    fault: bool = False


ENDED = ("completed", "compensated", "failed", "cancelled")
_BELLS = 2


def initial(bounds: Bounds) -> State:
    """Return the state after a start was committed and its doorbell rung."""
    return State((Worker(), Worker()), faults=bounds.faults, cancels=bounds.cancels)


class Protocol:
    """The moves under given rules and bounds."""

    def __init__(self, rules: Rules, bounds: Bounds) -> None:
        self.rules = rules
        self.bounds = bounds

    def moves(self, state: State) -> Iterator[Move]:
        """Yield everything that can happen next."""
        seen: set[Worker] = set()
        for n, worker in enumerate(state.workers):
            if worker not in seen:  # equal workers are interchangeable
                seen.add(worker)
                yield from self._worker(state, n, worker)
                if state.faults:
                    yield from self._worker_faults(state, n, worker)
        yield from self._pump(state)
        if state.faults and state.bells:
            fewer = state.faults - 1
            yield Move("a doorbell is lost", state._replace(bells=state.bells - 1, faults=fewer), True)
            if state.bells < _BELLS:
                yield Move("a doorbell comes twice", state._replace(bells=state.bells + 1, faults=fewer), True)
        if state.cancels and state.run not in ENDED:
            asked = state._replace(cancels=0, turn_due=True, arrivals=(*state.arrivals, ("cancel", 0, "")))
            yield Move("somebody cancels", _ring(asked), True)

    # -- a worker ------------------------------------------------------------------------------------------------------
    def _worker(self, state: State, n: int, worker: Worker) -> Iterator[Move]:
        if worker.paused:
            yield Move(f"{_name(worker)} goes on", _put(state, n, worker._replace(paused=False)))
            if self.bounds.deadlines and self._is_lost(state, worker):
                yield Move(f"the deadline of {_name(worker)} passes", _put(state, n, worker._replace(spent=True)))
        elif worker.doing == "dead":
            yield Move("a worker is started again", _put(state, n, Worker()))
        elif worker.doing == "":
            if state.bells:
                yield from self._answer(state._replace(bells=state.bells - 1), n)
        elif worker.doing == "turn":
            yield from self._turn(state, n, worker)
        elif worker.did:
            yield from self._report(state, n, worker)
        else:
            yield from self._perform(state, n, worker)

    def _answer(self, state: State, n: int) -> Iterator[Move]:
        """A doorbell: reserve the turn, or begin what is due.  A reservation keeps nobody away for long."""
        if state.turn_due:
            yield Move("a worker reserves the turn", _put(state, n, Worker("turn")))
        elif self._can_begin(state):
            assert state.work is not None
            yield Move(f"a worker begins {_work(state.work)}", self._begin(state, n))
        else:
            yield Move("a worker finds nothing to do", state)

    def _can_begin(self, state: State) -> bool:
        """Whether there is work that is due: an undo is not, as long as an attempt may still be at work."""
        if state.work is None or state.work.begun:
            return False
        waits = self.bounds.deadlines and self.rules.wait_until_quiet and state.work.role == "undo"
        return not (waits and any(self._is_lost(state, worker) for worker in state.workers))

    def _is_lost(self, state: State, worker: Worker) -> bool:
        """Whether an attempt was taken from a worker that lives, and its deadline has not passed."""
        outside = (worker.doing, worker.step, worker.spent) == ("do", 0, False)
        return outside and not self._holds(state, worker)

    def _begin(self, state: State, n: int) -> State:
        work = state.work
        assert work is not None
        step = state.steps[work.step]
        wrong = state.wrong
        if work.role == "do" and step.backward:
            wrong = "a step is begun after its undo"
        attempt = (step.begun if work.role == "do" else step.undos) + 1
        if self.rules.intent_first:
            state = _step(state, work.step, self._count(step, work.role))
            state = state._replace(work=work._replace(begun=True, attempt=attempt))
        return _put(state._replace(wrong=wrong), n, Worker(work.role, work.step, attempt))

    def _count(self, step: Step, role: str) -> Step:
        if role == "undo":
            return step._replace(undos=step.undos + 1)
        return step._replace(begun=step.begun + 1, counted=step.counted + self.rules.count_first)

    def _perform(self, state: State, n: int, worker: Worker) -> Iterator[Move]:
        """The code of a step runs: its effect happens or not, and it returns, rejects or raises."""
        if worker.doing == "do" and worker.step == 1:
            did = "rejected" if self.bounds.second == "rejected" else "succeeded"
            yield Move(f"{_name(worker)} runs it: {did}", _put(state, n, worker._replace(did=did)))
            return
        if worker.doing == "do" and state.steps[0].begun < worker.attempt:
            state = state._replace(wrong="an effect before its intent")
        if worker.spent:
            yield Move(f"{_name(worker)} is too late", _put(state, n, worker._replace(did="in doubt")))
            return
        for did, effect in self._outcomes(state, worker.doing):
            told = f"{_name(worker)} runs it: {did}, the effect is {effect}"
            yield Move(told, _put(state._replace(effect=effect), n, worker._replace(did=did)))

    def _outcomes(self, state: State, role: str) -> list[tuple[str, str]]:
        """What an attempt may find out, and how the effect is afterwards."""
        effect = state.effect
        after = "present" if role == "do" else "undone" if self.rules.provider_remembers else "absent"
        if role == "do" and effect == "undone":
            return [("in doubt", effect)]  # the provider remembers, and refuses
        sure = [("succeeded", after)] + [("rejected", effect)] * (role == "do")
        return sure + [("in doubt", after), ("in doubt", effect)] * self.bounds.in_doubt

    # -- writing down what came of it ----------------------------------------------------------------------------------
    def _report(self, state: State, n: int, worker: Worker) -> Iterator[Move]:
        own = self._holds(state, worker)
        free = _put(state, n, Worker())
        if own or not self.rules.fence:
            yield from self._accept(free, n, worker, own)
        elif worker.doing == "do" and worker.step == 0 and worker.did == "succeeded" and self.rules.note_late:
            noted = free._replace(arrivals=(*free.arrivals, ("late", 0, "")), turn_due=True)
            yield Move(f"{_name(worker)} is refused, its late success is noted", _ring(noted))
        else:
            yield Move(f"{_name(worker)} is refused", free)

    def _holds(self, state: State, worker: Worker) -> bool:
        """Whether the row of work still names the fence of this attempt."""
        work = state.work
        if work is None or (work.step, work.role) != (worker.step, worker.doing):
            return False
        if self.rules.intent_first:
            return work.begun and work.attempt == worker.attempt
        step = state.steps[work.step]
        return worker.attempt == (step.begun if worker.doing == "do" else step.undos) + 1

    def _accept(self, state: State, n: int, worker: Worker, own: bool) -> Iterator[Move]:
        """The outcome with the whole turn in one transaction, or as an arrival if another has the run in hand."""
        if own:
            state = state._replace(work=None)
            step = state.steps[worker.step]
            if not self.rules.intent_first:
                step = self._count(step, worker.doing)
            if not self.rules.count_first and worker.doing == "do":
                step = step._replace(counted=step.counted + 1)
            state = _step(state, worker.step, step)
        else:
            state = state._replace(wrong="a stale worker's write changed something")
        if worker.doing == "do" and worker.step == 1 and worker.did == "succeeded":
            state = state._replace(written=state.written + 1)
        outcome = (worker.doing, worker.step, worker.did)
        told = f"{_name(worker)} records {worker.did}"
        yield from self._commit(state._replace(arrivals=(*state.arrivals, outcome)), n, told)
        left = _put(state._replace(arrivals=(*state.arrivals, outcome)), n, Worker("turn"), sort_from=Worker())
        yield Move(f"{told} as an arrival", left)

    def _turn(self, state: State, n: int, worker: Worker) -> Iterator[Move]:
        if worker.stale or not (state.arrivals or state.turn_due):
            yield Move("a worker finds the run moved", _put(state, n, Worker()))
        else:
            yield from self._commit(_put(state, n, Worker()), n, "a worker takes the turn")

    def _commit(self, state: State, n: int, told: str) -> Iterator[Move]:
        """A turn: arrivals in, state and work out; every other turn that was computed from before is stale."""
        before = state.work
        state = self._advance(state)
        others = (w._replace(stale=True) if w.doing == "turn" else w for w in state.workers)
        state = state._replace(workers=tuple(sorted(others)))
        if state.work is None or state.work.begun or state.work == before:
            yield Move(told, state)
            return
        yield Move(f"{told}, and rings for {_work(state.work)}", _ring(state))
        if self._can_begin(state):
            idle = state.workers.index(Worker())
            yield Move(f"{told}, and begins {_work(state.work)}", self._begin(state, idle))

    # -- what a turn decides -------------------------------------------------------------------------------------------
    def _advance(self, state: State) -> State:
        arrivals = state.arrivals
        state = state._replace(arrivals=(), turn_due=False)
        for kind, step, verdict in arrivals:
            if kind == "late":
                state = self._late(state)
            elif state.run in ENDED:
                if kind == "undo":
                    state = self._undo_ended(state, step, verdict)  # of a correcting run
            elif kind == "cancel":
                state = state._replace(stopping=state.run == "running" or state.stopping)
            elif kind == "undo":
                state = self._undo_ended(state, step, verdict)
            elif state.steps[step].forward == "asked":
                state = self._do_ended(state, step, verdict)
        return self._conclude(self._undo_late(state))

    def _do_ended(self, state: State, n: int, verdict: str) -> State:
        step = state.steps[n]
        if verdict == "succeeded":
            return _step(state, n, step._replace(forward="succeeded"))
        if verdict == "rejected" and not step.doubt:
            return _step(state, n, step._replace(forward="rejected"))
        state = _step(state, n, step._replace(doubt=step.doubt or verdict == "in doubt"))
        final = verdict == "rejected" or step.counted >= self.bounds.attempts
        if final or state.stopping or state.run == "compensating":
            return self._unknown(state, n)
        return state._replace(work=Work(n, "do"))

    def _unknown(self, state: State, n: int) -> State:
        step = state.steps[n]
        if not step.doubt or not self.rules.undo_unknown:
            return _step(state, n, step._replace(forward="rejected"))
        if state.stopping or state.run == "compensating":
            return _step(state, n, step._replace(forward="unknown"))
        return _step(state, n, step._replace(forward="undoing", backward="asked"))._replace(work=Work(n, "undo"))

    def _undo_ended(self, state: State, n: int, verdict: str) -> State:
        step = state.steps[n]
        if step.backward != "asked":
            return state
        if verdict == "succeeded":
            forward = "unknown" if step.forward == "undoing" else step.forward
            return _step(state, n, step._replace(forward=forward, backward="done"))
        if step.undos < self.bounds.attempts * (1 + step.lates):
            return state._replace(work=Work(n, "undo"))
        return _step(state, n, step._replace(backward="parked"))

    def _late(self, state: State) -> State:
        step = state.steps[0]
        owed = bool(step.backward) or step.forward in ("unknown", "rejected")
        return _step(state, 0, step._replace(late=step.late or owed, doubt=True))

    def _undo_late(self, state: State) -> State:
        """A late effect is undone again, by the run itself or, after its end, by a correcting run."""
        step = state.steps[0]
        if not step.late or step.backward in ("asked", "parked"):
            return state
        step = step._replace(late=False, lates=step.lates + 1, backward="asked")
        return _step(state, 0, step)._replace(work=Work(0, "undo"))

    def _conclude(self, state: State) -> State:
        if state.run in ENDED:
            return state
        if state.run == "running":
            state = self._go_forward(state)
        return self._go_back(state) if state.run == "compensating" else state

    def _go_forward(self, state: State) -> State:
        if state.stopping:
            return self._stop(state._replace(run="compensating"))
        if any(step.forward in ("rejected", "unknown") for step in state.steps):
            return state._replace(run="compensating")
        if all(step.forward == "succeeded" for step in state.steps):
            return state._replace(run="completed", work=None)
        for n, step in enumerate(state.steps):
            if step.forward == "":
                return _step(state, n, step._replace(forward="asked"))._replace(work=Work(n, "do"))
            if step.forward != "succeeded":
                return state
        return state

    def _stop(self, state: State) -> State:
        """What no committed begin names is withdrawn as without effect; what has begun is awaited."""
        work = state.work
        if work is None or work.begun or work.role != "do":
            return state
        state = state._replace(work=None)
        step = state.steps[work.step]
        if step.begun == 0:
            return _step(state, work.step, step._replace(forward="withdrawn"))
        return self._unknown(state, work.step)

    def _go_back(self, state: State) -> State:
        if any(s.forward in ("asked", "undoing") or s.backward in ("asked", "parked") for s in state.steps):
            return state
        step = state.steps[0]
        if step.forward in ("succeeded", "unknown") and not step.backward:
            return _step(state, 0, step._replace(backward="asked"))._replace(work=Work(0, "undo"))
        end = "cancelled" if state.stopping else "compensated" if step.backward == "done" else "failed"
        return state._replace(run=end, work=None)

    # -- the pump and the companion ------------------------------------------------------------------------------------
    def _pump(self, state: State) -> Iterator[Move]:
        if self.rules.ring_again:
            due = state.turn_due or self._can_begin(state)
            if (due or not self.rules.ring_for_due) and not state.bells:
                yield Move("the pump rings", state._replace(bells=1))
            if state.arrivals and not state.turn_due:
                yield Move("the pump wakes a forgotten run", state._replace(turn_due=True))
        if self.rules.give_back and state.work is not None and state.work.begun:
            holders = [worker for worker in state.workers if _fence(worker) == tuple(state.work[:3])]
            if not holders:
                yield Move(f"{_work(state.work)} is given back: its worker is dead", self._give_back(state, state.work))
            elif holders[0].paused:
                yield Move(f"{_work(state.work)} is given back: a lease ran out", self._give_back(state, state.work))

    def _give_back(self, state: State, work: Work) -> State:
        """Begun means in doubt, unless its transaction is gone with it."""
        verdict = "failed" if (work.step, work.role) == (1, "do") else "in doubt"
        arrivals = (*state.arrivals, (work.role, work.step, verdict))
        return _ring(state._replace(work=None, turn_due=True, arrivals=arrivals))

    # -- faults --------------------------------------------------------------------------------------------------------
    def _worker_faults(self, state: State, n: int, worker: Worker) -> Iterator[Move]:
        if worker.doing == "dead":
            return
        state = state._replace(faults=state.faults - 1)
        if not worker.did or self.bounds.crashes_after_effect:
            yield Move(f"{_name(worker)} crashes", _put(state, n, Worker("dead")), True)
        if not worker.paused and worker.doing:
            yield Move(f"{_name(worker)} stands still", _put(state, n, worker._replace(paused=True)), True)


# -- small changes of a state ------------------------------------------------------------------------------------------
def _put(state: State, n: int, worker: Worker, sort_from: Worker | None = None) -> State:
    """Replace a worker; workers are kept in order, so that states that differ in names only are the same."""
    workers = list(state.workers)
    workers[n if sort_from is None else workers.index(sort_from)] = worker
    return state._replace(workers=tuple(sorted(workers)))


def _step(state: State, n: int, step: Step) -> State:
    first, second = state.steps
    return state._replace(steps=(step, second) if n == 0 else (first, step))


def _ring(state: State) -> State:
    return state._replace(bells=min(_BELLS, state.bells + 1))


def _fence(worker: Worker) -> tuple[int, str, int]:
    return (worker.step, worker.doing, worker.attempt)


def _work(work: Work) -> str:
    return f"the undo of step {work.step}" if work.role == "undo" else f"step {work.step}"


def _name(worker: Worker) -> str:
    if worker.doing in ("do", "undo"):
        what = "undo" if worker.doing == "undo" else "attempt"
        return f"the worker with {what} {worker.attempt} of step {worker.step}"
    return {"": "an idle worker", "turn": "the worker with the turn", "dead": "a dead worker"}[worker.doing]
