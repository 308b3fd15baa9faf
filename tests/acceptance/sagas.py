"""Sagas of every shape, over steps that behave as they are told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from datetime import timedelta
from typing import Any

from orchestrator import StepFailed, saga, step
from tests.acceptance import steps
from tests.acceptance.steps import Plan, Transfer

KINDS: dict[str, Any] = {
    "act": steps.act,
    "park": steps.act_or_park,
    "probed": steps.act_probed,
    "in time": steps.act_in_time,
    "pivot": steps.pivot,
    "after": steps.after_pivot,
    "look": steps.look,
    "local": steps.look_locally,
    "async": steps.look_async,
    "undeclared": steps.undeclared,
    "train": steps.train,
    "beat": steps.beat_until_told,
    "undone plainly": steps.act_undone_plainly,
    "undone talkatively": steps.act_undone_talkatively,
}


def perform(plan: Plan) -> Any:
    return saga.step(KINDS[plan.kind], plan)


@saga.define
async def sequence(plans: list[Plan]) -> list[str]:
    return [await perform(plan) for plan in plans]


@saga.define
async def together(plans: list[Plan]) -> list[str]:
    return list(await asyncio.gather(*(perform(plan) for plan in plans)))


@saga.define
async def forgiving(plans: list[Plan]) -> list[str]:
    """Goes on after a step that failed; returns the outcomes."""
    outcomes = []
    for plan in plans:
        try:
            await perform(plan)
            outcomes.append("done")
        except StepFailed as failure:
            outcomes.append(f"{failure.outcome} {failure.error_type}")
    return outcomes


@saga.define
async def grouped(plans: list[Plan]) -> int:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_one(plan)) for plan in plans]
    return len([task.result() for task in tasks])


async def _one(plan: Plan) -> str:
    return str(await perform(plan))


@saga.define
async def first_wins(fast: Plan, slow: Plan) -> list[str]:
    """Takes the first of two and abandons the other."""
    done, pending = await saga.wait([perform(fast), perform(slow)], return_when=asyncio.FIRST_COMPLETED)
    for other in pending:
        other.cancel()
    return [await each for each in done]


@saga.define
async def by_timeout(plan: Plan, how: str) -> str:
    try:
        if how == "timeout":
            async with asyncio.timeout(0.3):
                await perform(plan)
        else:
            await asyncio.wait_for(_one(plan), 0.3)
    except TimeoutError:
        await perform(Plan(name="instead"))
        return "timed out"
    return "in time"


@saga.define
async def sleeper(seconds: float) -> float:
    before = saga.now()
    await saga.sleep(timedelta(seconds=seconds))
    await perform(Plan(name="awake"))
    return (saga.now() - before).total_seconds()


@saga.define(deadline=timedelta(seconds=0.6))
async def hurried(plans: list[Plan]) -> None:
    for plan in plans:
        await perform(plan)
    await asyncio.sleep(3600)


@saga.define
async def recorded(name: str) -> list[Any]:
    """What is recorded once stays the same over every replay."""
    said = await saga.once("said", lambda: _say(name))
    before = [str(saga.uuid4()), saga.random(), saga.now().isoformat()]
    await perform(Plan(name=name, do=["gate"]))
    return [said, *before, saga.version("change", 1, 2), saga.info().run_id]


def _say(name: str) -> str:
    steps.note("once", name)
    return f"{name} by {os.getpid()}"


@saga.define
async def once_badly(how: str) -> Any:
    def badly() -> Any:
        if how == "SystemExit":
            raise SystemExit(4)
        if how == "KeyboardInterrupt":
            raise KeyboardInterrupt
        return steps.bad_value(how)

    try:
        return await saga.once("badly", badly)
    except StepFailed as failure:
        return failure.error_type


@saga.define(on_code_error="compensate")
async def ends_its_process(name: str) -> str:
    """The process that gets there first is told to end in the midst of this code."""
    await perform(Plan(name=name))
    if not (told := steps.world() / f"told {name}").exists():
        told.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGTERM)
    return "done"


@saga.define
async def blocking(how: str) -> str:
    """Does not come to rest, until it is deployed again."""
    await perform(Plan(name=how))
    while not (steps.world() / f"mended {how}").exists():
        if how == "waits":
            time.sleep(3600)
        elif how == "polls":
            await asyncio.sleep(0)
        elif how == "swallows":
            with contextlib.suppress(Exception):
                time.sleep(3600)
    return f"{how} no more"


@saga.define
async def deadly(name: str) -> str:
    """Ends the process that gets there, until it is deployed again; some after a step."""
    if name == "after a step":
        await perform(Plan(name="first"))
    if name == "after a transaction":
        await saga.step(steps.misbehave, "fine")
    if not (steps.world() / f"mended {name}").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    await perform(Plan(name=name))
    return f"{name} no more"


@saga.define
async def threaded(how: str) -> None:
    if how == "thread":
        await asyncio.to_thread(threading.get_ident)
    elif how == "executor":
        await asyncio.get_running_loop().run_in_executor(None, os.getpid)
    elif how == "call":
        steps.act(Plan(name="x"))
    else:
        sequence.delay([])


@saga.define
async def broken(name: str) -> str:
    """Has a mistake until it is deployed again."""
    done = await perform(Plan(name=name))
    if os.environ.get("ACCEPTANCE_MENDED") != "1":
        return done.no_such_attribute  # type: ignore[no-any-return]
    return f"{done}, mended"


@saga.define
async def bad_result(which: str) -> Any:
    await perform(Plan(name="before"))
    return steps.bad_value(which)


@saga.define
async def bad_argument(value: Any) -> Any:
    """Is given what cannot be stored."""
    return value


@saga.define
async def bad_argument_within(which: str) -> Any:
    await perform(Plan(name="before"))
    return await saga.step(steps.add.s(steps.bad_value(which), 1))


@saga.define
async def one_step(task: str, argument: str) -> Any:
    await perform(Plan(name="before"))
    return await saga.step(getattr(steps, task), argument)


@saga.define
async def celery_tasks(which: str) -> Any:
    match which:
        case "signature":
            return await saga.step(steps.add.s(1, 2))
        case "task":
            return await saga.step(steps.add, 1, y=2)
        case "retry":
            return await saga.step(steps.again.s(3))
        case "retry at":
            return await saga.step(steps.again_at.s(2))
        case "retry some day":
            return await saga.step(steps.again_some_day)
        case "autoretry":
            return await saga.step(steps.autoretry.s(3))
        case "too often":
            return await saga.step(steps.again.s(99))
        case "pauses":
            for _ in range(2000):
                await saga.step(steps.pause, 0.02)
            return None
        case "ignore":
            return await saga.step(steps.ignore)
        case _:
            try:
                return await saga.step(steps.reject)
            except StepFailed as failure:
                return failure.outcome


# -- the seeds ---------------------------------------------------------------------------------------------------------
@saga.define
async def transfer(order: Transfer) -> list[int]:
    return [await saga.step(steps.debit, order), await saga.step(steps.credit, order)]


@saga.define
async def order(charge: Plan, deduct: Plan, notify: Plan) -> bool:
    await perform(charge)
    await perform(deduct)
    try:
        await perform(notify)
    except StepFailed:
        return False
    return True


@saga.define
async def payment(hold: Plan, process: Plan, finalise: Plan, notices: list[Plan]) -> int:
    await perform(hold)
    await perform(process)
    await perform(finalise)
    told = await asyncio.gather(*(perform(notice) for notice in notices), return_exceptions=True)
    return sum(not isinstance(outcome, BaseException) for outcome in told)


# -- sagas that steps start --------------------------------------------------------------------------------------------
@step(retry=steps.QUICK)
def start_others(plan: Plan) -> list[str]:
    """Start two runs, and fail after that as the plan says."""
    ids = [sequence.delay([]).id, sequence.delay([]).id]
    steps.behave(steps.word_of(plan.do), "do", plan.name)
    return ids


@step(transactional=True, retry=steps.QUICK)
def start_within(conn: steps.Connection, plan: Plan, how: str) -> str:
    """Start a run in the step's own transaction, and fail after that as the plan says."""
    if how == "named":
        started = sequence.apply_async(([],), task_id=f"{step.current().run_id}:named")
    elif how == "many":
        (started,) = sequence.start_many([([],)])
    else:
        started = sequence.delay([])
    steps.behave(steps.word_of(plan.do), "do", plan.name)
    return str(started.id)


@saga.define
async def starting(plan: Plan, how: str) -> Any:
    if how == "outside":
        return await saga.step(start_others, plan)
    return await saga.step(start_within, plan, how)


@saga.define
async def misbehaving(how: str) -> str:
    try:
        await saga.step(steps.misbehave, how)
    except StepFailed as failure:
        return f"{failure.outcome} {failure.error_type}"
    return "done"
