"""The sagas of the fault tests: a trip with stops of every kind, and what a load of trips is made of."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from orchestrator import saga
from tests.faults import steps
from tests.faults.steps import ACCOUNTS, Stop

KINDS: dict[str, Any] = {
    "take": steps.take, "insist": steps.insist, "linger": steps.linger, "stay": steps.stay, "look": steps.look,
    "move": steps.move, "pay": steps.pay, "wire": steps.wire,
}  # fmt: skip


@saga.define(name="faults.trip")
async def trip(stops: list[Stop], together: bool = False) -> list[str]:
    """Go from stop to stop, or to all of them at once; at a stop of kind `wait` an hour is waited."""
    if together:
        return list(await asyncio.gather(*(saga.step(KINDS[stop.kind], stop) for stop in stops)))
    done = []
    for stop in stops:
        if stop.kind == "wait":
            await asyncio.sleep(3600)
        else:
            done.append(str(await saga.step(KINDS[stop.kind], stop)))
    return done


CANARY = 'canary "of" the loäd 5b1e'
"""Part of arguments and results of a load; it must show up nowhere but in the database."""
ENDS = ("completed",) * 5 + ("together", "compensated", "silent", "failed", "cancelled", "terminated")


def plan(number: int, dice: random.Random, ms: int) -> tuple[str, list[Stop]]:
    """Return the end that a trip of a load is to have, and its stops; all ends come round."""
    end = ENDS[number % len(ENDS)]
    first = Stop(name=f"a {CANARY}", kind="insist", ms=dice.randint(0, ms))
    source, target = dice.sample(range(ACCOUNTS), 2)
    ledger = Stop(name=f"b {CANARY}", kind="move", ms=dice.randint(0, ms), source=source, target=target)
    last = Stop(name=f"c {CANARY}", kind="look", ms=dice.randint(0, ms))
    if end in ("compensated", "failed"):
        refused = Stop(name="x", how=["reject"], kind="insist")
        return end, [first, ledger, refused] if end == "compensated" else [refused]
    if end == "silent":
        return end, [first, ledger, Stop(name="x", how=["silent"])]
    if end in ("cancelled", "terminated"):
        return end, [first, ledger, Stop(name="w", kind="wait")]
    return end, [first, ledger, last]
