"""Children: runs that a saga asks for, revocable until their root ends, undone with their parent.

Owns what parent and child tell each other.  Every message is a post: an arrival that is left with the turn that decided
it.  A child reports its end once; a parent orders an undo, or concludes once it has ended well; each order is answered
by who has ended already, too, so that no order of arrival leaves anybody waiting.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.errors import message_of
from orchestrator.machine import blocks
from orchestrator.machine.fold import Fold
from orchestrator.machine.journal import (
    Arrival,
    AttemptEnded,
    Conclude,
    Concluded,
    Error,
    FamilyPivot,
    NewChild,
    Operate,
    PivotNews,
    Post,
    Reported,
    Restore,
    Revoke,
    Revoked,
    Settled,
    Terminate,
)
from orchestrator.machine.record import Step
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
    if decisions.fold.restored:  # before its first turn it hears that it may have been here before
        _tell(decisions, step, Restore(decisions.fold.restored.by))


def give_up(decisions: Decisions, step: Step) -> None:
    """Revoke a child that nobody waits for any more; what this very turn has asked for is not started."""
    born_before = [child for child in decisions.children if child.key != step.key]
    if len(born_before) == len(decisions.children):
        revoke(decisions, step)
        return
    decisions.children[:] = born_before
    decisions.record(Settled(step.key, "withdrawn"))


def revoke(decisions: Decisions, step: Step) -> None:
    """Order a child to undo what it did, whatever has become of it."""
    _tell(decisions, step, Revoke())


def take_revoke(decisions: Decisions) -> None:
    """Be revoked; a child that has ended says how that stands."""
    fold = decisions.fold
    decisions.record(Revoked())
    if fold.ended:
        _answer_revoke(decisions, RunState(fold.ended.state))
    elif fold.past_pivot:
        _report(decisions, "undo", "rejected", error=_left_by(fold, "past its point of no return"))


def take_conclude(decisions: Decisions) -> None:
    """Note that what this child did stays."""
    if not decisions.fold.ended:
        decisions.record(Concluded())


def pass_on(decisions: Decisions, order: Operate) -> None:
    """Hold the children that are under way with their parent, or let them go; their own saga may be paused as well."""
    if order.cause:
        order = replace(order, cause=f"{order.cause} {decisions.fold.info.saga}")
    for step in decisions.fold.children:
        if not step.settled:
            _tell(decisions, step, order)


def report(decisions: Decisions) -> None:
    """Tell the parent that this child is done, and with what result."""
    returned = decisions.fold.returned
    assert returned is not None
    for key in list(decisions.fold.locks):
        blocks.unlock(decisions, key)  # its code has ended, and so have all blocks; its end may be far
    decisions.record(Reported())
    _report(decisions, "do", "succeeded", returned.output)


def ended(decisions: Decisions, state: RunState) -> None:
    """Tell the children, and the parent of a child that did not end well, that this run has ended."""
    fold = decisions.fold
    for step in fold.children:
        if step.settled and not step.took_effect:
            continue  # it has ended, or its id was another run's
        if state in (RunState.COMPLETED, RunState.CONTINUED) and step.forward is Forward.SUCCEEDED:
            if step.backward is Backward.NONE:
                _tell(decisions, step, Conclude())
        elif state is RunState.TERMINATED and step.backward is not Backward.DONE:
            _tell(decisions, step, Terminate(by="its parent"))
    if not fold.info.parent or state is RunState.COMPLETED:
        return
    for key in fold.granted:
        if not fold.steps[key].settled:  # somebody terminated this run, and nobody will know any more
            _news(decisions, fold.info.pivot(key), "failed")
    if not fold.reported:
        _report(decisions, "do", "rejected", error=_failure(decisions, state))
    if fold.revoked:
        _answer_revoke(decisions, state)


# -- the point of no return --------------------------------------------------------------------------------------------
def ask_for_pivot(decisions: Decisions, step: Step) -> None:
    """Ask the root whether a pivot of this child may begin: it is one for all above it."""
    _news(decisions, decisions.fold.info.pivot(step.key), "asked")


def waits_for_grant(fold: Fold, step: Step) -> bool:
    """Tell whether a step is a pivot that the root has not answered for yet: no work of it is there."""
    return step.is_pivot and bool(fold.info.parent) and step.key not in fold.granted


def take_pivot(decisions: Decisions, news: PivotNews) -> None:
    """Pass on what becomes of a pivot in the family; grant it if this is the root and it does not go back.

    In a child that was given up it may not begin either, unless another one has passed there: what can be taken back
    stays so.
    """
    fold = decisions.fold
    if not news.child and news.origin.startswith(f"{fold.info.id} "):
        _take_answer(decisions, news)
    elif news.phase == "asked" and (_goes_back(fold) or _was_given_up(fold, news.child)):
        _answer(decisions, news.child, news.origin, "refused")
    elif news.phase == "asked":
        decisions.record(FamilyPivot(news.origin, "asked", news.child))
        if fold.info.parent:
            _news(decisions, news.origin, "asked")
        else:
            decisions.record(FamilyPivot(news.origin, "granted", news.child))
            _answer(decisions, news.child, news.origin, "granted")
    else:
        child = news.child or _child_towards(decisions, news.origin)
        if not fold.ended:
            decisions.record(FamilyPivot(news.origin, news.phase, child))
        if not news.child:
            _answer(decisions, child, news.origin, news.phase)
        elif fold.info.parent:
            _news(decisions, news.origin, news.phase)


def _goes_back(fold: Fold) -> bool:
    """Tell whether a run has ended, or is to be undone as soon as no pivot is in flight."""
    to_be_undone = bool(fold.stop or fold.raised or fold.revoked) and not fold.past_pivot
    return bool(fold.ended or fold.rollback) or to_be_undone


def _was_given_up(fold: Fold, child: str) -> bool:
    """Tell whether nobody waits for a child any more, and it can still be undone."""
    return fold.steps[child].abandoned and child not in fold.pivots_passed


def _take_answer(decisions: Decisions, news: PivotNews) -> None:
    """Begin this child's own pivot, or learn that the family goes back."""
    fold = decisions.fold
    step = fold.steps[fold.info.pivot_of(news.origin)]
    if fold.ended and news.phase == "granted":
        _news(decisions, news.origin, "failed")
    if fold.ended or step.settled:
        return
    if news.phase == "refused":
        error = {"type": "FamilyUndone", "message": "the family of this run is being undone: it may not begin"}
        decisions.record(Settled(step.key, "rejected", error=error))
        return
    decisions.record(FamilyPivot(news.origin, "granted"))
    if step.abandoned or (fold.revoked and not fold.past_pivot):
        decisions.record(Settled(step.key, "withdrawn"))
    else:
        decisions.do(step)


def pivot_settled(decisions: Decisions, key: str) -> None:
    """Tell those above what became of this child's pivot."""
    succeeded = decisions.fold.steps[key].forward is Forward.SUCCEEDED
    _news(decisions, decisions.fold.info.pivot(key), "succeeded" if succeeded else "failed")


def _child_towards(decisions: Decisions, origin: str) -> str:
    """Return the key of the child through which a pivot of a descendant came."""
    fold = decisions.fold
    ids = {step.key: fold.info.child(step.key) for step in fold.children}
    return next(key for key, id in ids.items() if origin.startswith((f"{id} ", f"{id}/")))


def _news(decisions: Decisions, origin: str, phase: str) -> None:
    info = decisions.fold.info
    decisions.posts.append(Post(info.parent, PivotNews(origin, phase, info.key_in_parent), anyone=True))


def _answer(decisions: Decisions, child: str, origin: str, phase: str) -> None:
    decisions.posts.append(Post(decisions.fold.info.child(child), PivotNews(origin, phase), anyone=True))


# -- what a child says -------------------------------------------------------------------------------------------------
def _answer_revoke(decisions: Decisions, state: RunState) -> None:
    fold = decisions.fold
    undone = state is not RunState.TERMINATED and state is not RunState.COMPLETED
    told: Error = {} if undone else _left_by(fold, state)
    if fold.ended and fold.ended.left:
        told["left"] = list(fold.ended.left)
    if undone and _is_undone_partly(fold):
        told["partly"] = True
    _report(decisions, "undo", "succeeded" if undone else "rejected", error=told or None)


def _left_by(fold: Fold, how: str) -> Error:
    return {"type": "ChildLeft", "message": f"child {fold.info.id} is {how}, not undone"}


def _failure(decisions: Decisions, state: RunState) -> Error:
    fold = decisions.fold
    cause = fold.raised or (fold.rollback.error if fold.rollback else None) or {"type": state.capitalize()}
    left: tuple[Any, ...] = fold.ended.left if fold.ended else ()
    told = {
        "type": cause.get("type", ""), "message": message_of(cause), "run": fold.info.id, "state": str(state),
        "left": list(left),
    }  # fmt: skip
    return told | {"partly": True} if _is_undone_partly(fold) else told


def _is_undone_partly(fold: Fold) -> bool:
    """Tell whether a run that has ended has left something that it declares an undo of."""
    steps = fold.steps.values()
    may_stay = (step for step in steps if fold.terminated and (step.took_effect or not step.settled))
    not_undone = any(step.asked.undo is not None and step.backward is not Backward.DONE for step in may_stay)
    return not_undone or any(step.was_skipped for step in steps)


def _report(decisions: Decisions, role: str, verdict: str, result: Any = None, error: Error | None = None) -> None:
    info = decisions.fold.info
    told = AttemptEnded(info.key_in_parent, role, 1, verdict, result, error, child=info.id)
    decisions.posts.append(Post(info.parent, told))


def _tell(decisions: Decisions, step: Step, order: Arrival) -> None:
    decisions.posts.append(Post(decisions.fold.info.child(step.key), order, anyone=True))


def error_of_revoke() -> Error:
    """Return what a child that was revoked ended in."""
    return dict(_REVOKED)
