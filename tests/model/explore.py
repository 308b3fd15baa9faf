"""Every state that can be reached, and the shortest way to one that must not be.

Owns the search and the properties.  Without faults, whatever happens ends in an end: no state but a final one has no
next move, and no path of such moves comes back to where it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from tests.model.protocol import ENDED, Bounds, Move, Protocol, Rules, State, initial


@dataclass(frozen=True, slots=True)
class Explored:
    """How many states and moves were looked at, which ends were reached, and what is wrong."""

    states: int
    moves: int
    ends: frozenset[str]
    wrong: str = ""
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        steps = "\n".join(f"  {n:2}. {label}" for n, label in enumerate(self.trace, 1))
        return f"{self.states} states, {self.moves} moves: {self.wrong or 'nothing wrong'}\n{steps}"


class Explorer:
    """Breadth first, so that what it finds has the shortest way there."""

    def __init__(self, rules: Rules, bounds: Bounds, passing_over: Collection[str] = ()) -> None:
        self._protocol = Protocol(rules, bounds)
        self._bounds = bounds
        self._rules = rules
        self._passing_over = passing_over
        self._came: dict[State, tuple[State | None, str]] = {}
        self._quietly: dict[State, list[State]] = {}
        self._moves = 0

    def explore(self) -> Explored:
        """Look at every state; stop at the first that breaks safety, then look for one that cannot come to an end."""
        start = initial(self._bounds)
        self._came[start] = (None, "")
        waiting = deque([start])
        while waiting:
            state = waiting.popleft()
            if wrong := self._wrong(state):
                return self._found(state, wrong)
            waiting.extend(move.state for move in self._expand(state))
        stuck = self._stuck() or self._turning()
        return stuck or self._found(None, "")

    def _expand(self, state: State) -> list[Move]:
        """Return the moves to states that are new."""
        new = []
        quietly = self._quietly[state] = []
        for move in self._protocol.moves(state):
            self._moves += 1
            following = move.state
            if following.wrong in self._passing_over:
                following = following._replace(wrong="")
            if not move.fault and following != state:
                quietly.append(following)
            if following not in self._came:
                self._came[following] = (state, move.label)
                new.append(Move(move.label, following, move.fault))
        return new

    # -- safety --------------------------------------------------------------------------------------------------------
    def _wrong(self, state: State) -> str:
        first, second = state.steps
        if state.wrong:
            return state.wrong
        if state.written > 1:
            return "a transactional effect happened twice"
        if state.written != (second.forward == "succeeded") and not _reported(state):
            return "a transactional effect and its outcome disagree"
        if max(first.begun, second.begun) > self._bounds.attempts:
            return "more attempts than the policy allows"
        if state.run in ENDED and (self._rules.provider_remembers or is_final(state)):
            return self._end_is_honest(state)
        return ""

    def _end_is_honest(self, state: State) -> str:
        kept = state.run == "completed" and state.steps[0].forward == "succeeded"
        if kept and state.effect != "present":
            return "the run completed, and an effect of it is not there"
        if not kept and state.effect == "present":
            return f"the run is {state.run}, and an effect of it was neither kept nor undone"
        return ""

    # -- liveness ------------------------------------------------------------------------------------------------------
    def _stuck(self) -> Explored | None:
        for state, following in self._quietly.items():
            if not following and not is_final(state):
                return self._found(state, "nothing will ever happen again, and the run has not ended")
        return None

    def _turning(self) -> Explored | None:
        """Take away, again and again, states without a next one; what remains goes round in circles."""
        after = {state: set() if is_final(state) else set(found) for state, found in self._quietly.items()}
        left = {state: len(following) for state, following in after.items()}
        before: dict[State, list[State]] = {}
        for state, following in after.items():
            for other in following:
                before.setdefault(other, []).append(state)
        done = deque(state for state, count in left.items() if count == 0)
        while done:
            for state in before.get(done.popleft(), ()):
                left[state] -= 1
                if left[state] == 0:
                    done.append(state)
        turning = next((state for state, count in left.items() if count), None)
        return None if turning is None else self._found(turning, "from here it can go round for ever without an end")

    def _found(self, state: State | None, wrong: str) -> Explored:
        trace: list[str] = []
        while state is not None:
            state, label = self._came[state]
            trace.append(label)
        final = [state for state in self._came if is_final(state)]
        ends = frozenset("parked" if _is_parked(state) else state.run for state in final)
        return Explored(len(self._came), self._moves, ends, wrong, tuple(reversed(trace[:-1])))


def is_final(state: State) -> bool:
    """Whether the run has ended, or waits for a person, and nothing of it is outstanding anywhere."""
    busy = state.work is not None or state.arrivals or any(w.doing in ("do", "undo") for w in state.workers)
    return not busy and (state.run in ENDED or _is_parked(state))


def _is_parked(state: State) -> bool:
    return state.steps[0].backward == "parked"


def _reported(state: State) -> bool:
    """Whether the outcome of the transactional step is committed as an arrival that no turn has taken yet."""
    return ("do", 1, "succeeded") in state.arrivals


def explore(rules: Rules | None = None, bounds: Bounds | None = None, passing_over: Collection[str] = ()) -> Explored:
    """Explore the protocol; `passing_over` names violations that are not to end the search."""
    return Explorer(rules or Rules(), bounds or Bounds(), passing_over).explore()
