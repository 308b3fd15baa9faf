"""Children: runs that a saga asks for, revocable until their root ends, undone with their parent.

Owns what parent and child tell each other.  Every message is a post: an arrival that is left with the turn that decided
it.  A child reports its end once; a parent orders an undo, or concludes once it has ended well; each order is answered
by who has ended already, too, so that no order of arrival leaves anybody waiting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.machine.fold import Step
from orchestrator.machine.journal import (
    Arrival,
    AttemptEnded,
    Conclude,
    Concluded,
    Error,
    NewChild,
    Post,
    Reported,
    Revoke,
    Revoked,
    Terminate,
)
from orchestrator.machine.states import Backward, Forward, RunState

if TYPE_CHECKING:
    from orchestrator.machine.decide import Decisions

_REVOKED: Error = {"type": "ParentFailed", "message": "its parent is being undone, and it with its parent"}


def born(decisions: Decisions, step: Step) -> None:
    """Start the child that was just asked for."""
    asked, info = step.asked, decisions.fold.info
    decisions.children.append(
        NewChild(
            step.key, info.child(step.key), asked.task, asked.version, asked.args, asked.queue or info.queue,
            asked.priority or info.priority, asked.timeout,
        )
    )  # fmt: skip


def revoke(decisions: Decisions, step: Step) -> None:
    """Order a child to undo what it did, whatever has become of it."""
    _tell(decisions, step, Revoke())


def take_revoke(decisions: Decisions) -> None:
    """Be revoked; a child that has ended says how that stands."""
    fold = decisions.fold
    decisions.record(Revoked())
    if fold.ended:
        _answer_revoke(decisions, RunState(fold.ended.state))


def take_conclude(decisions: Decisions) -> None:
    """Note that what this child did stays."""
    if not decisions.fold.ended:
        decisions.record(Concluded())


def report(decisions: Decisions) -> None:
    """Tell the parent that this child is done, and with what result."""
    returned = decisions.fold.returned
    assert returned is not None
    decisions.record(Reported())
    _report(decisions, "do", "succeeded", returned.output)


def ended(decisions: Decisions, state: RunState) -> None:
    """Tell the children, and the parent of a child that did not end well, that this run has ended."""
    fold = decisions.fold
    for step in fold.children:
        if state in (RunState.COMPLETED, RunState.CONTINUED) and step.forward is Forward.SUCCEEDED:
            if step.backward is Backward.NONE:
                _tell(decisions, step, Conclude())
        elif state is RunState.TERMINATED and step.backward is not Backward.DONE:
            _tell(decisions, step, Terminate(by="its parent"))
    if not fold.info.parent or state is RunState.COMPLETED:
        return
    if not fold.reported:
        _report(decisions, "do", "rejected", error=_failure(decisions, state))
    if fold.revoked:
        _answer_revoke(decisions, state)


def _answer_revoke(decisions: Decisions, state: RunState) -> None:
    undone = state is not RunState.TERMINATED and state is not RunState.COMPLETED
    error = (
        None if undone else {"type": "ChildLeft", "message": f"child {decisions.fold.info.id} is {state}, not undone"}
    )
    _report(decisions, "undo", "succeeded" if undone else "rejected", error=error)


def _failure(decisions: Decisions, state: RunState) -> Error:
    fold = decisions.fold
    cause = fold.raised or (fold.rollback.error if fold.rollback else None) or {"type": state.capitalize()}
    left: tuple[Any, ...] = fold.ended.left if fold.ended else ()
    return {
        "type": cause.get("type", ""), "message": cause.get("message", ""), "run": fold.info.id, "state": str(state),
        "left": list(left),
    }  # fmt: skip


def _report(decisions: Decisions, role: str, verdict: str, result: Any = None, error: Error | None = None) -> None:
    info = decisions.fold.info
    decisions.posts.append(Post(info.parent, AttemptEnded(info.key_in_parent, role, 1, verdict, result, error)))


def _tell(decisions: Decisions, step: Step, order: Arrival) -> None:
    decisions.posts.append(Post(decisions.fold.info.child(step.key), order, anyone=True))


def error_of_revoke() -> Error:
    """Return what a child that was revoked ended in."""
    return dict(_REVOKED)
