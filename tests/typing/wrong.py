"""What mypy must refuse: each line that ends in a comment ``# E: code`` has exactly that error, no other line has one.

Never run: mypy reads it, see test_typing.py.
"""

from __future__ import annotations

from datetime import timedelta

from pydantic import BaseModel

from orchestrator import Orchestrator, saga
from tests.typing.right import amounts, approve, book, charge, pay


class Approval(BaseModel):
    by: str


@saga.define
async def steps(amount: int) -> str:
    await saga.step(charge, "three")  # E: call-overload
    await saga.step(charge)  # E: call-overload
    await saga.step(charge, amount, colour="red")  # E: call-arg
    await saga.step(book, None, amount)  # E: call-overload
    number: int = await saga.step(charge, amount)  # E: call-overload
    return number  # E: return-value


@saga.define
async def told(amount: int) -> str:
    approval = await saga.wait_signal("approved", Approval)
    await saga.wait_signal(7, Approval)  # E: call-overload
    await saga.wait_signal("approved", Approval, timeout="5 s")  # E: call-overload
    return str(approval.who)  # E: attr-defined


@saga.define
async def families(amount: int) -> str:
    await saga.child(pay, "three")  # E: arg-type
    await saga.child(charge, amount)  # E: arg-type
    await saga.child(pay, amount, by="ann")  # E: call-arg
    results: list[int] = await saga.child(approve, amount)  # E: arg-type
    async with saga.lock("account", amount, timeout="a minute"):  # E: arg-type
        pass
    with saga.scope():  # E: attr-defined
        return str(results)


@saga.define
async def maps(amount: int) -> int:
    await saga.map(charge, [1], concurrency="3")  # E: arg-type
    await saga.map(charge, [1], rate=100)  # E: arg-type
    await saga.map(charge, [1], tolerance=1)  # E: call-arg
    await saga.map(charge, amounts, args=7)  # E: arg-type
    return int((await saga.map(charge, [1])).done)  # E: attr-defined


@saga.define
async def shown(amount: int) -> None:
    saga.progress("half")  # E: arg-type
    saga.publish("half")  # E: call-arg
    saga.tag(customer=[7])  # E: arg-type
    saga.version("change", "1", 2)  # E: arg-type


@saga.define(deadline=3600)  # E: call-overload, untyped-decorator
async def late(amount: int) -> None: ...


async def outside() -> None:
    pay.delay("three")  # E: arg-type
    pay.start_many([1, 2])  # E: list-item
    pay.delay(3).signal(approved=True)  # E: call-arg
    pay.apply_async((3,)).wait()  # E: attr-defined
    pay.apply_async((3,), countdwon=3)  # E: call-arg
    pay.apply_async((3,), priority="high")  # E: arg-type
    pay.start_many([(1,)], task_id="a")  # E: call-arg
    await saga.sleep("an hour")  # E: arg-type
    saga.sleep(timedelta(hours=1))  # E: unused-coroutine


def operators(orchestrator: Orchestrator) -> None:
    orchestrator.bulk("restart", saga=pay)  # E: arg-type
    orchestrator.bulk("retry", sage=pay)  # E: call-arg
    orchestrator.pause(pay)  # E: call-arg
    orchestrator.prune(90)  # E: arg-type
    pay.AsyncResult("a").skip()  # E: call-arg
