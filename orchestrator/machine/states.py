"""The states of a run and of a step, as literal transition tables.

Owns which move is legal.  Must never change anything on an illegal one: it raises.
The diagrams of ``saga diagram`` are generated from these tables.
"""

from __future__ import annotations

from enum import StrEnum


class IllegalTransition(Exception):
    """Refuse a move that the tables do not have; nothing was changed."""


class RunState(StrEnum):
    """The states of a run, as users see them."""

    PENDING = "pending"
    RUNNING = "running"
    PAUSED = "paused"
    COMPENSATING = "compensating"
    PARKED = "parked"
    COMPLETED = "completed"
    FAILED = "failed"
    COMPENSATED = "compensated"
    CANCELLED = "cancelled"
    TERMINATED = "terminated"
    CONTINUED = "continued"


R = RunState
TERMINAL: frozenset[str] = frozenset({R.COMPLETED, R.FAILED, R.COMPENSATED, R.CANCELLED, R.TERMINATED, R.CONTINUED})

RUN_TRANSITIONS: dict[RunState, dict[str, RunState]] = {
    R.PENDING: {"start": R.RUNNING, "terminate": R.TERMINATED},
    R.RUNNING: {
        "complete": R.COMPLETED,
        "continue": R.CONTINUED,
        "roll back": R.COMPENSATING,
        "pause": R.PAUSED,
        "park": R.PARKED,
        "terminate": R.TERMINATED,
        "wait": R.PENDING,  # for its start, which is set for later: it was only told something
    },
    R.PAUSED: {"resume": R.RUNNING, "roll back": R.COMPENSATING, "park": R.PARKED, "terminate": R.TERMINATED},
    R.COMPENSATING: {
        "park": R.PARKED,
        "fail": R.FAILED,
        "compensate": R.COMPENSATED,
        "cancel": R.CANCELLED,
        "terminate": R.TERMINATED,
    },
    R.PARKED: {
        "go on": R.RUNNING,
        "pause": R.PAUSED,
        "roll back": R.COMPENSATING,
        "complete": R.COMPLETED,
        "continue": R.CONTINUED,
        "fail": R.FAILED,
        "compensate": R.COMPENSATED,
        "cancel": R.CANCELLED,
        "terminate": R.TERMINATED,
    },
    R.COMPLETED: {},
    R.FAILED: {},
    R.COMPENSATED: {},
    R.CANCELLED: {},
    R.TERMINATED: {},
    R.CONTINUED: {},
}


class Forward(StrEnum):
    """How far the doing of a step has come."""

    ASKED = "asked"
    PROBING = "probing"
    UNDOING = "undoing"  # in doubt, and undone before the saga hears of it
    PARKED = "parked"
    SUCCEEDED = "succeeded"
    REJECTED = "rejected"
    FAILED = "failed"  # ended in an error, and by declaration there is no effect
    UNKNOWN = "unknown"
    WITHDRAWN = "withdrawn"


F = Forward
SETTLED: frozenset[str] = frozenset({F.SUCCEEDED, F.REJECTED, F.FAILED, F.UNKNOWN, F.WITHDRAWN})
_SETTLING = {str(state): state for state in (F.SUCCEEDED, F.REJECTED, F.FAILED, F.UNKNOWN, F.WITHDRAWN)}

FORWARD_TRANSITIONS: dict[Forward, dict[str, Forward]] = {
    F.ASKED: {**_SETTLING, "probe": F.PROBING, "undo": F.UNDOING, "park": F.PARKED},
    F.PROBING: {**_SETTLING, "park": F.PARKED, "retry": F.ASKED},
    F.UNDOING: {"unknown": F.UNKNOWN},
    F.PARKED: {**_SETTLING, "retry": F.ASKED, "probe": F.PROBING},
    F.SUCCEEDED: {},
    F.REJECTED: {},
    F.FAILED: {},
    F.UNKNOWN: {},
    F.WITHDRAWN: {},
}


class Backward(StrEnum):
    """How far the undoing of a step has come."""

    NONE = "none"
    ASKED = "asked"
    PARKED = "parked"
    DONE = "done"
    SKIPPED = "skipped"


B = Backward
BACKWARD_TRANSITIONS: dict[Backward, dict[str, Backward]] = {
    B.NONE: {"ask": B.ASKED},
    B.ASKED: {"done": B.DONE, "park": B.PARKED},
    B.PARKED: {"retry": B.ASKED, "done": B.DONE, "skip": B.SKIPPED},
    B.DONE: {"ask": B.ASKED},  # a late effect is undone again
    B.SKIPPED: {"ask": B.ASKED},
}


def move_run(state: RunState, event: str) -> RunState:
    """Return the state after `event`.  Raises: IllegalTransition."""
    try:
        return RUN_TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"a run that is {state} cannot {event}") from None


def move_forward(state: Forward, event: str) -> Forward:
    """Return the forward phase of a step after `event`.  Raises: IllegalTransition."""
    try:
        return FORWARD_TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"a step that is {state} cannot take {event!r}") from None


def move_backward(state: Backward, event: str) -> Backward:
    """Return the undo phase of a step after `event`.  Raises: IllegalTransition."""
    try:
        return BACKWARD_TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"an undo that is {state} cannot take {event!r}") from None
