"""Runs of every kind of end, whose steps tell the effect log what they do.

Owns the sagas and what each run must end as, wherever its process dies.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from celery import chain, group, signature
from sqlalchemy import Connection as SqlConnection
from sqlalchemy import text

from orchestrator import Effect, Rejected, RetryPolicy, StepFailed, saga, step
from orchestrator.saga import Saga
from tests.proof import effects
from tests.proof.effects import EffectLog

AT_ONCE = RetryPolicy(initial_interval=timedelta(0), maximum_interval=timedelta(0), maximum_attempts=5)
ONE_RETRY = RetryPolicy(initial_interval=timedelta(0), maximum_interval=timedelta(0), maximum_attempts=2)
# An effect of an attempt whose process may still live is waited for until this is over.
SHORT = timedelta(seconds=0.5)


@step(retry=AT_ONCE)
def give_back(name: str, result: str | None) -> None:
    if name == "stubborn":
        raise Rejected("it cannot be given back")
    with EffectLog.of_environment().around():
        pass


@step(compensate=give_back, retry=AT_ONCE, start_to_close_timeout=SHORT)
def take(name: str) -> str:
    if name == "bad":
        raise Rejected(name)
    with EffectLog.of_environment().around():
        return f"{name}!"


@step(compensate=give_back, retry=ONE_RETRY)
def lose_the_answer(name: str) -> str:
    EffectLog.of_environment().effect()
    raise ConnectionError("no answer")


@step(compensate=give_back, on_unknown="park", retry=ONE_RETRY)
def ask_a_person(name: str) -> str:
    raise ConnectionError("no answer")


@step(compensate=give_back, concurrency=1, key="name", rate_limit="1000/s", retry=AT_ONCE, start_to_close_timeout=SHORT)
def queue_up(name: str) -> str:
    with EffectLog.of_environment().around():
        return name


@step(effect=Effect.NONE, retry=AT_ONCE)
def beat(times: int) -> int:
    context = step.current()
    for n in range(times):
        context.heartbeat({"n": n})
    with EffectLog.of_environment().around():
        return times


@step(effect=Effect.PIVOT, retry=AT_ONCE)
def settle(name: str) -> str:
    EffectLog.of_environment().effect()
    if step.current().attempt == 1:
        raise ConnectionError("no answer")
    EffectLog.of_environment().returned()
    return name


@settle.probe
def ask_for(name: str) -> str | None:
    log = EffectLog.of_environment()
    context = step.current()
    there = any((e.run, e.key) == (context.run_id, context.key) for e in effects.read(log.path))
    return name if there else None


@step(transactional=True, retry=AT_ONCE)
def strike_out(conn: SqlConnection, name: str) -> None:
    conn.execute(text(effects.INSERT), effects.transactional_row())


@step(transactional=True, compensate=strike_out, retry=AT_ONCE)
def write_down(conn: SqlConnection, name: str) -> str:
    conn.execute(text(effects.INSERT), effects.transactional_row())
    return name


@saga.define(name="crash.row")
async def in_a_row(names: list[str]) -> list[str]:
    """Do what is named, one after the other; a name that begins with w is written down, `wait` waits for an hour."""
    done = []
    for name in names:
        if name == "wait":
            await saga.sleep(timedelta(hours=1))
        elif name == "nap":
            await saga.sleep(timedelta(milliseconds=20))
        elif name == "once":
            done.append(await saga.once("number", lambda: "seven"))
        elif name == "beat":
            await saga.step(beat, 2)
        elif name == "lost":
            await saga.step(lose_the_answer, name)
        elif name == "ask":
            done.append(await saga.step(ask_a_person, name))
        elif name == "settle":
            done.append(await saga.step(settle, name))
        elif name == "line":
            done += await asyncio.gather(saga.step(queue_up, name), saga.step(queue_up, name))
        elif name.startswith("w"):
            done.append(await saga.step(write_down, name))
        else:
            done.append(await saga.step(take, name))
    return done


@saga.define(name="crash.held")
async def held_up(names: list[str]) -> list[str]:
    done = [await saga.step(take, names[0])]
    if "nap" in names:
        await saga.sleep(timedelta(milliseconds=20))
        done.append(await saga.step(take, names[-1]))
    return done


@saga.define(name="crash.side")
async def side_by_side(names: list[str]) -> list[str]:
    return list(await asyncio.gather(*(saga.step(take, name) for name in names)))


@saga.define(name="crash.forward")
async def past_the_pivot(names: list[str]) -> str:
    await saga.step(take, "held")
    settled = await saga.step(settle, "payment")
    try:
        await saga.step(take, "bad")
    except StepFailed:
        return f"{settled}, unsaid"
    return settled


@saga.define(name="crash.child")
async def child_of_a_family(names: list[str]) -> list[str]:
    async with saga.lock("till"):
        return [await saga.step(take, name) for name in names]


@saga.define(name="crash.family")
async def family(names: list[str]) -> list[str]:
    """Do what is named: with children, in a scope that fails, under a lock, for many, and as one link after another."""
    done: list[str] = []
    if "scope" in names:
        try:
            async with saga.scope():
                await saga.step(take, "given up")
                await saga.step(take, "bad")
        except StepFailed:
            done.append("second way")
    async with saga.lock("till"):
        done.append(await saga.step(take, "a"))
    for part in await asyncio.gather(saga.child(child_of_a_family, ["b", "c"]), saga.child(child_of_a_family, ["d"])):
        done += part
    if "canvas" in names:
        link = partial(signature, take.name)
        done.append(await saga.step(chain(link(("g",)), group(link(), link()))))
    if "many" in names:
        done.append(str((await saga.map(take, ["e", "bad", "f"], page=2, tolerate=1)).succeeded))
    if "bad" in names:
        await saga.step(take, "bad")
    if "link" in names:
        saga.continue_as_new([name for name in names if name != "link"])
    if "signal" in names:
        done.append(await saga.wait_signal("go", str))
    return done


@saga.define(name="crash.behind")
async def behind(names: list[str]) -> str:
    async with saga.lock(*names):
        return await saga.step(take, names[0])


@saga.define(name="crash.circle")
async def in_a_circle(names: list[str]) -> str:
    """Hold the first lock that is named and ask for the second: in a child, if there is a third name."""
    async with saga.lock(names[0]):
        await saga.step(take, names[0])
        await saga.sleep(timedelta(milliseconds=200))  # the others are to hold theirs by then
        if names[2:]:
            return await saga.child(behind, names[1:2])
        async with saga.lock(names[1]):
            return await saga.step(take, names[1])


@dataclass(frozen=True)
class Planned:
    """A run to be started, and what it must end as."""

    saga: Saga[Any, Any]
    names: list[str]
    ends: str  # one of these states, with spaces between: whether a rejected step was ever in doubt decides
    joins: bool = False  # started in a transaction of the caller


ORDINARY = {
    "kept": Planned(in_a_row, ["a", "b", "w"], "completed"),
    "joined": Planned(in_a_row, ["a"], "completed", joins=True),
    "undone": Planned(in_a_row, ["a", "b", "bad"], "compensated"),
    "in doubt": Planned(in_a_row, ["a", "lost"], "compensated"),
    "written": Planned(in_a_row, ["w1", "w2", "bad"], "compensated"),
    "parallel": Planned(side_by_side, ["a", "b", "c", "d"], "completed"),
    "half parallel": Planned(side_by_side, ["a", "bad"], "compensated"),
    "failed": Planned(in_a_row, ["bad"], "failed compensated"),
    "beating": Planned(in_a_row, ["beat", "nap", "a"], "completed"),
    "once": Planned(in_a_row, ["once", "a"], "completed"),
    "forward": Planned(past_the_pivot, [], "completed"),
    "cancelled": Planned(in_a_row, ["a", "wait"], "cancelled"),
    "terminated": Planned(in_a_row, ["a", "wait"], "terminated"),
    "parked": Planned(in_a_row, ["stubborn", "bad"], "failed compensated"),
    "limited": Planned(in_a_row, ["line", "a", "bad"], "compensated"),
}
BRIEF = {
    "joined": Planned(in_a_row, ["a", "b"], "completed", joins=True),
    "limited": Planned(in_a_row, ["line"], "completed"),
    "beating": Planned(in_a_row, ["beat", "once"], "completed"),
    "cancelled": Planned(in_a_row, ["w", "a", "wait"], "cancelled"),
}
BURIED = {
    "buried": Planned(in_a_row, ["a", "b"], "completed"),
    "judged": Planned(in_a_row, ["a", "b"], "completed"),
}
OVERTAKEN = {
    "late": Planned(in_a_row, ["a", "b"], "completed"),
    "corrected": Planned(in_a_row, ["a", "wait"], "cancelled"),
    "rewritten": Planned(in_a_row, ["w"], "completed"),
}
MET = {
    "met": Planned(side_by_side, ["a", "b", "c"], "completed"),
    "passed on": Planned(in_a_row, ["a", "ask", "b"], "completed"),
}
STOPPED = {
    "stopped": Planned(in_a_row, ["a"], "completed"),
    "postponed": Planned(in_a_row, ["a"], "completed"),
}
HANGING = {
    "before": Planned(in_a_row, ["a", "b"], "completed"),
    "hangs": Planned(in_a_row, ["a", "b"], "completed"),
    "behind": Planned(in_a_row, ["a", "bad"], "compensated"),
}
FORGOTTEN = {
    "forgotten": Planned(in_a_row, ["a", "wait"], "cancelled"),
    "ignored": Planned(in_a_row, ["a"], "completed cancelled"),
}
HELD = {
    "under way": Planned(held_up, ["a", "nap", "b"], "completed"),
    "to come": Planned(held_up, ["a"], "completed"),
}
FAMILY = {
    "kept": Planned(family, ["scope", "many"], "completed"),
    "undone": Planned(family, ["many", "canvas", "bad"], "compensated"),
    "linked": Planned(family, ["link", "signal"], "completed"),
    "cancelled": Planned(in_a_row, ["a", "wait"], "cancelled"),
}
CIRCLE = {
    "parent": Planned(in_a_circle, ["x", "y", "child"], "completed compensated"),
    "other": Planned(in_a_circle, ["y", "x"], "completed compensated"),
}
BROKEN = {"broken": Planned(in_a_row, ["a", "b", "c"], "completed")}
STORIES = {
    "ordinary": ORDINARY,
    "brief": BRIEF,
    "buried": BURIED,
    "overtaken": OVERTAKEN,
    "met": MET,
    "stopped": STOPPED,
    "hanging": HANGING,
    "forgotten": FORGOTTEN,
    "held": HELD,
    "broken": BROKEN,
    "family": FAMILY,
    "circle": CIRCLE,
}
