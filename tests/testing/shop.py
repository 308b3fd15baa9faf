"""A shop for the environment and the explorer: its world is a few dictionaries that outlive every process."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, text

from orchestrator import Effect, Rejected, RetryPolicy, saga, step


class World:
    """The outside: money on accounts, and what providers remember."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin again: ann has 100, nobody else anything."""
        self.money = {"ann": 100, "bob": 0, "house": 0}
        self.charges: dict[str, str] = {}
        self.mails: list[str] = []

    @property
    def total(self) -> int:
        return sum(self.money.values())

    def move(self, source: str, target: str, amount: int) -> None:
        self.money[source] -= amount
        self.money[target] += amount


world = World()
TWICE = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_attempts=2)


# -- as it should be ---------------------------------------------------------------------------------------------------
@step
def refund(order: str, result: str | None) -> None:
    if world.charges.get(order) == "charged":
        world.move("house", "ann", 10)
    world.charges[order] = "refunded"


@step(compensate=refund, start_to_close_timeout=timedelta(seconds=30))
def charge(order: str) -> str:
    if world.charges.get(order) == "refunded":
        raise Rejected("this order was refunded before")
    if order not in world.charges:
        world.move("ann", "house", 10)
        world.charges[order] = "charged"
    return f"charge of {order}"


@step(effect=Effect.NONE, retry=TWICE)
def mail(order: str) -> None:
    world.mails.append(order)


@saga.define(name="kit.checkout", deadline=timedelta(days=3))
async def checkout(order: str) -> str:
    paid = await saga.step(charge, order)
    await saga.sleep(timedelta(days=1))
    await saga.step(mail, order)
    return paid


@step(transactional=True)
def unbook(connection: Connection, n: int) -> None:
    connection.execute(text("DELETE FROM bookings WHERE n = :n"), {"n": n})


@step(transactional=True, compensate=unbook)
def book(connection: Connection, n: int) -> int:
    connection.execute(text("INSERT INTO bookings VALUES (:n)"), {"n": n})
    return n


@saga.define(name="kit.booking")
async def booking(n: int) -> int:
    done = await saga.step(book, n)
    await saga.step(mail, str(n))
    return done


@saga.define(name="kit.approval")
async def approval(order: str) -> str:
    await saga.step(charge, order)
    by: str = await saga.wait_signal("approved", str, timeout=timedelta(days=1))
    await saga.step(mail, order)
    return by


@step
def start_checkout(order: str) -> str:
    return str(checkout.delay(order))


@saga.define(name="kit.parent")
async def parent(order: str) -> str:
    return await saga.step(start_checkout, order)


@saga.define(name="kit.fickle")
async def fickle(order: str) -> None:
    """Break the one rule: it asks for something else whenever it is run again."""
    fickle_runs.append(order)
    await saga.step(mail, f"{order} {len(fickle_runs)}")


fickle_runs: list[str] = []


@step(effect=Effect.NONE, rate_limit="1/m")
def ask(order: str) -> None: ...


@saga.define(name="kit.limited")
async def limited(order: str) -> None:
    await saga.step(ask, order)


@saga.define(name="kit.linked")
async def linked(n: int) -> int:
    await saga.step(mail, str(saga.uuid4()))
    if n > 0:
        saga.continue_as_new(n - 1)
    return n


@saga.define(name="kit.parcel")
async def parcel(order: str) -> str:
    async with saga.lock("order", "any"):
        await saga.step(charge, order)
        await saga.sleep(timedelta(hours=1))
    return order


@saga.define(name="kit.family")
async def family(order: str) -> list[str]:
    return [await saga.child(parcel, f"{order}-{n}") for n in range(2)]


# -- as it should not be -----------------------------------------------------------------------------------------------
@step
def pay(order: str) -> None:
    if order not in world.charges:
        world.move("ann", "house", 10)
        world.charges[order] = "charged"


@step
def pay_back(order: str) -> None:
    if world.charges.pop(order, None):
        world.move("house", "ann", 10)


@saga.define(name="kit.forgetful")
async def forgetful(order: str) -> None:
    """Undo by hand, and only what reported success: a payment that timed out stays taken."""
    await saga.step(pay, order)
    try:
        await saga.step(mail, order)
    except Exception:
        await saga.step(pay_back, order)
        raise


@step
def give_again(order: str) -> None:
    """Not idempotent: whoever asks again is paid again."""
    world.move("house", "ann", 10)


@step(compensate=give_again)
def take(order: str) -> None:
    if order not in world.charges:
        world.move("ann", "house", 10)
        world.charges[order] = "charged"


@saga.define(name="kit.generous")
async def generous(order: str) -> None:
    await saga.step(take, order)
    await saga.step(mail, order)


@step(effect=Effect.NONE)
def look(account: str) -> int:
    return world.money[account]


@step
def debit_back(account: str, amount: int, order: str) -> None:
    if world.charges.pop(order, None):
        world.move("house", account, amount)


@step(compensate=debit_back)
def debit(account: str, amount: int, order: str) -> None:
    """Trust whoever looked before."""
    if order not in world.charges:
        world.move(account, "house", amount)
        world.charges[order] = "charged"


@saga.define(name="kit.racy")
async def racy(order: str) -> str:
    """Look first and debit then: two of them at once overdraw the account."""
    if await saga.step(look, "ann") < 60:
        return "refused"
    await saga.step(debit, "ann", 60, order)
    return "paid"


def names(calls: list[Any]) -> list[tuple[str, str]]:
    """Return what was called, as (short name, role)."""
    return [(call.name.rpartition(".")[2], call.role) for call in calls]
