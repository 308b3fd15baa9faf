"""From a computed turn to what is committed: the rows of its work, the columns of its run, what is begun with it.

Owns that translation.  Must never touch the database: `orchestrator.store.turns` writes what is made here.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from orchestrator.codec import Json
from orchestrator.machine.fold import Fold, RunInfo
from orchestrator.machine.journal import (
    CancelAsked,
    Continued,
    Late,
    NewChild,
    Operated,
    RollbackBegan,
    Settled,
    Work,
    encode,
    encode_row,
)
from orchestrator.machine.states import TERMINAL, RunState
from orchestrator.machine.turn import Execution, Turn
from orchestrator.store.gates import LINE
from orchestrator.store.turns import Commit, Taken

IsShort = Callable[[str], bool]
MANY = 8  # steps of one run


@dataclass(frozen=True, slots=True)
class Identity:
    """Who holds work: an incarnation and a child of it."""

    incarnation: int
    child: int


@dataclass(slots=True)
class Scope:
    """What this process may begin: its queues and the targets registered here."""

    queues: Collection[str]
    targets: Collection[str]
    may_begin: Callable[[], bool] = lambda: True
    is_short: IsShort = lambda task: False


@dataclass(slots=True)
class Begun:
    """The work that a turn begins in the child that commits it."""

    work: Work
    taken: Taken


def commit_of(
    identity: Identity,
    execution: Execution,
    turn: Turn,
    first: Begun | None,
    consumed: list[int],
    done: Sequence[Taken],
    holds_turn: bool,
) -> Commit:
    info = execution.info
    continued = None if turn.was_ended else execution.fold.continued
    held = [(taken.lane, taken.fence) for taken in done if taken.fence is not None]
    if first is not None:
        first.taken.lane = held[0][0] if held else _new_lane(turn, 0)
    return Commit(
        run_id=info.id,
        position=turn.position,
        at=turn.at,
        entries=[*encode_row(turn.entries, turn.before)],
        incarnation=identity.incarnation,
        child=identity.child,
        state=RunState.RUNNING if continued else turn.state,
        target=info.target if continued is None else f"{info.saga}@{continued.version}",
        queue=info.queue,
        priority=info.priority,
        ended=turn.state in TERMINAL and continued is None and not turn.was_ended,
        done=held,
        shared=not done or execution.fold.in_flight > (first is not None),
        holds_turn=holds_turn,
        wake=turn.wake if continued is None else turn.at,
        rewake=continued is not None or (turn.wake is not None and turn.wake != execution.committed_wake),
        next=work_row(info, first.work, turn.at, first.taken.lane, begun=True) if first else None,
        next_fence=first.taken.fence if first else None,
        work=[
            work_row(info, work, turn.at, _new_lane(turn, number))
            for number, work in enumerate(turn.work, 1)
            if first is None or work is not first.work
        ],
        withdraw=turn.withdraw,
        consumed=consumed,
        children=[_child_row(child) for child in turn.children],
        posts=[{"run": post.run_id, "arrival": encode(post.arrival), "anyone": post.anyone} for post in turn.posts],
        locks=[{"handle": info.lock(step.key), "key": step.key, "name": step.asked.task} for step in turn.locks],
        unlocks=turn.unlocks,
        continued=_link(execution, turn, continued) if continued else None,
        summary=summary_of(execution, turn),
    )


def _child_row(child: NewChild) -> dict[str, Json]:
    row = {name: getattr(child, name) for name in ("key", "id", "saga", "version", "input", "queue", "priority")}
    return {**row, "delay": 0, "deadline": child.deadline or None}


def _link(execution: Execution, turn: Turn, continued: Continued) -> dict[str, Json]:
    ended = execution.fold.ended
    link = {"version": continued.version, "input": continued.input, "left": list(ended.left) if ended else []}
    return {**link, "seed": [encode(entry) for entry in turn.seed]} if turn.seed else link


def begin_next(
    scope: Scope, execution: Execution, turn: Turn, now: datetime, is_short: IsShort | None = None
) -> Begun | None:
    """Choose the work that this child goes on with: the first that is due, has no gate to pass and can run here.

    Of several the one with the highest priority.  What was lost begins alone, so that it is left to be taken.  A run
    that has many short steps under way begins none here: they are taken in waves, which share a commit, where one that
    follows another would have a commit each.
    """
    if turn.state in TERMINAL or not scope.may_begin():
        return None
    info, many = execution.info, execution.fold.in_flight >= MANY
    for work in sorted(turn.work, key=lambda work: -(work.priority or info.priority)):
        target, queue = target_of(info, work), work.queue or info.queue
        here = queue in scope.queues and target in scope.targets and not gate_of(work.call) and "w" not in work.call
        alone = (is_short is None or is_short(work.task)) and not (many and scope.is_short(work.task))
        if here and (work.due is None or work.due <= now) and alone:
            deadline = now + timedelta(seconds=work.call["t"]) if "t" in work.call else None
            taken = Taken(
                info.id, 0, work.key, work.role, target, queue, work.task, work.attempt + 1, work.call, new_fence(),
                deadline, now,
            )  # fmt: skip
            return Begun(work, taken)
    return None


def new_fence() -> int:
    """Return 64 random bits as Postgres' bigint; never a counter, so that no stale holder can guess it."""
    return secrets.randbits(64) - (1 << 63)


def target_of(info: RunInfo, work: Work) -> str:
    """Return who can run `work`: the saga itself if it is local to the driving worker, else its task."""
    return info.target if work.local or work.role == "once" else work.task


def gate_of(call: Any) -> str:
    """Return the gate that a step has to pass before it begins; the empty string if it has no limits."""
    return str(call["g"]["gate"]) if "g" in call else ""


def _new_lane(turn: Turn, number: int) -> int:
    """Return a lane that the run has never had, since each of its positions is written once; 0 is that of turns."""
    return (turn.position + 1) << 32 | number


def work_row(info: RunInfo, work: Work, at: datetime, lane: int, *, begun: bool = False) -> dict[str, Any]:
    row = {
        "lane": lane,
        "key": work.key,
        "role": work.role,
        "target": target_of(info, work),
        "queue": work.queue or info.queue,
        "task": work.task,
        "priority": work.priority or info.priority,
        "due": work.due.isoformat() if work.due else None,
        "attempt": work.attempt + begun,
        "call": work.call,
    }
    if gate := gate_of(work.call):
        row |= {"gate": gate, "due": ((work.due or at) + LINE).isoformat()}
    return row


def summary_of(execution: Execution, turn: Turn) -> dict[str, Any] | None:
    """Return the columns that change seldom, if one of them changed."""
    if turn.was_ended:
        return None
    changed = signature(execution)
    if turn.state not in TERMINAL and changed == execution.committed_summary:
        return None
    execution.committed_summary = changed
    shown = {"published": execution.published or None, "tags": execution.tags or None}
    return {**columns_of(execution.fold), **shown}


def columns_of(fold: Fold) -> dict[str, Any]:
    """Return the columns that a journal decides."""
    parked: list[Any] = [{"key": key, "role": entry.role, "why": entry.why} for key, entry in fold.parked_keys.items()]
    if fold.parked is not None:
        parked.insert(0, {"key": "", "role": fold.parked.role, "why": fold.parked.why})
    return {
        "output": fold.returned.output if fold.returned and fold.ended and fold.ended.state == "completed" else None,
        "error": _error(fold),
        "left_effects": list(fold.ended.left) if fold.ended else [],
        "parked": parked,
        "past_pivot": fold.past_pivot,
    }


def _error(fold: Fold) -> Json:
    """Return what a run ended in, or is going back from; somebody's order counts as such."""
    order = fold.terminated or (fold.stop if fold.rollback and fold.rollback.cause == "cancel" else None)
    if isinstance(order, (CancelAsked, Operated)):
        done = "terminated" if fold.terminated else "cancelled"
        reason = f": {order.reason}" if order.reason else ""
        return {"type": done.capitalize(), "message": f"{done} by {order.by or 'an unnamed caller'}{reason}"}
    return fold.raised or (fold.rollback.error if fold.rollback else None)


def signature(execution: Execution) -> tuple[Any, ...]:
    """Return what decides whether the columns of `_summary` are up to date."""
    fold = execution.fold
    parked = (fold.parked, tuple(fold.parked_keys.values()))
    return (*parked, fold.past_pivot, execution.published, execution.tags)


def correction(fold: Fold, late: Late) -> list[Json]:
    """Return the journal that a correcting run begins with: the step, its late success, the decision to undo."""
    return [
        encode(fold.steps[late.key].asked),
        encode(Settled(late.key, "succeeded", late.attempt, late.result)),
        encode(RollbackBegan("late", undoes=_idempotency_key(fold, late.key))),
    ]


def _idempotency_key(fold: Fold, key: str) -> str:
    """Return the key that a step has used; the run may have gone on as new, and its link be kept under another id."""
    info = fold.info
    run = info.id.removesuffix(f"~{info.link + 1}") if fold.continued else info.id
    return f"{run}~{info.link}:{key}" if info.link else f"{run}:{key}"
