"""Other runs from saga code: `child`, and the next link of this run, `continue_as_new`.

Owns how they are asked for; what becomes of them is the machine's.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

from orchestrator.codec import Json, check, copied
from orchestrator.errors import ChildFailed, UsageError
from orchestrator.machine import code as machine
from orchestrator.machine.code import ContinueAsNew, Request, SagaCode
from orchestrator.machine.journal import Asked, Undo
from orchestrator.machine.policy import Effect
from orchestrator.machine.record import Step as StepRecord
from orchestrator.saga.declare import Saga, registry
from orchestrator.saga.inside import code_of
from orchestrator.saga.steps import decode_result

_LONGEST_ID = 2000  # in bytes; the id of a correcting run has that and a key in it, and an index holds 2,704
P = ParamSpec("P")
R = TypeVar("R")


def child(saga: Saga[P, R], /, *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
    """Ask for a run of another saga; awaiting it gives its result.

    It is a run of its own, with its own journal, and stays revocable until the root of the family ends: it is undone
    with its parent, and completed with it.  Raises (when awaited): ChildFailed, once the child is undone.
    """
    code = code_of("child")
    if not isinstance(saga, Saga):
        raise UsageError(f"saga.child() takes a saga, not {type(saga).__name__}; for a step use saga.step()")
    encoded = saga.codec.encode_call(args, kwargs)
    return child_of(code, saga, encoded, functools.partial(_same, saga, encoded))


def child_of(
    code: SagaCode, saga: Saga[Any, R], encoded: dict[str, Json], same: Callable[[Asked], bool]
) -> asyncio.Future[R]:
    """Ask for a child with encoded arguments; `same` tells whether a recorded one is this one."""
    check(encoded, what=f"the arguments of {saga.name}")
    return code.ask(
        Request(
            name=saga.name,
            asked=functools.partial(_asked, code, saga, encoded),
            same=same,
            decode=functools.partial(decode_result, saga),
            failure=functools.partial(_failure, code.fold.info.id),
        )
    )


def _asked(code: SagaCode, saga: Saga[Any, Any], encoded: dict[str, Json], key: str) -> Asked:
    if key not in code.fold.steps:
        _refuse_long_id(code.fold.info.child(key))
    options = saga.options
    return Asked(
        key, saga.name, encoded, kind="child", version=options.version, effect=Effect.COMPENSATABLE,
        undo=Undo(saga.name), queue=options.queue, priority=options.priority,
        timeout=options.deadline.total_seconds() if options.deadline else 0.0,
    )  # fmt: skip


def _refuse_long_id(run_id: str) -> None:
    """Nobody could ask for such a run or give it orders, and no index would hold one that is longer still."""
    if len(run_id.encode(errors="replace")) > _LONGEST_ID:
        raise UsageError(
            f"the id of a child has that of its parent in it, and {run_id:.60}... would be longer than "
            f"{_LONGEST_ID} bytes: put fewer children into each other, or give runs and sagas shorter names"
        )


def _same(saga: Saga[Any, Any], encoded: dict[str, Json], asked: Asked) -> bool:
    if asked.kind != "child" or asked.task != saga.name:
        return False
    return bool(asked.args == encoded) or saga.codec.same(asked.args, encoded)


def _failure(run_id: str, record: StepRecord) -> Exception:
    error: Any = copied(record.error) or {"type": "Cancelled", "message": "given up"}
    text = f"child {error.get('run', record.key)} of run {run_id} ended {error.get('state', 'in an error')}: "
    return ChildFailed(
        f"{text}{error.get('type')}: {error.get('message')}", run_id=str(error.get("run", "")), key=record.key,
        state=str(error.get("state", "")), error=error, left=cast(Any, error.get("left", ())),
    )  # fmt: skip


def continue_as_new(*args: Any, **kwargs: Any) -> NoReturn:
    """End this link of the run, and go on with these arguments and a fresh journal under the same id.

    A commit point: what was done so far stays done.  Deadline, tags, published state, unheard signals and locks move
    along; the newest version of the saga that is registered here takes over.  The ended links are kept as ``id~1``,
    ``id~2``.
    Raises: UsageError in a child, inside of a scope, or with work outstanding; PayloadError.
    """
    code = code_of("continue_as_new")
    info = code.fold.info
    if info.parent:
        raise UsageError("continue_as_new() in a child: it is a commit point, and a child stays revocable")
    if machine.scope.get():
        raise UsageError("continue_as_new() inside of saga.scope(): it is a commit point; leave the block first")
    saga = registry.latest(info.saga)
    encoded = saga.codec.encode_call(args, kwargs)
    check(encoded, what=f"the arguments that {info.saga} is continued with")
    raise ContinueAsNew(encoded, saga.options.version)
