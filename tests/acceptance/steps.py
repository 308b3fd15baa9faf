"""Steps that behave as they are told: per attempt one word of a plan.

Owns what can go wrong with a step.  Every effect is a line in a file, written at once, as a provider would keep it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from celery import shared_task
from celery.exceptions import Ignore, Reject
from pydantic import BaseModel
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from orchestrator import Effect, Rejected, RetryPolicy, step


class Plan(BaseModel):
    """What a step is to do, attempt by attempt; the last word goes on."""

    name: str
    kind: str = "act"
    do: list[str] = ["ok"]
    undo: list[str] = ["ok"]
    found: str | None = None


class Refused(Exception):
    """Declared as certainly without effect."""


class SpeechlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


def world() -> Path:
    return Path(os.environ["ACCEPTANCE_WORLD"])


def note(what: str, name: str, told: Any = None) -> None:
    """Do something to the world: one line, appended at once."""
    current = step.current()
    line = {"run": current.run_id, "what": what, "name": name, "attempt": current.attempt, "told": told}
    line |= {"key": current.idempotency_key, "pid": os.getpid()}
    with (world() / "effects").open("a") as file:
        file.write(json.dumps(line) + "\n")


def wait_at(gate: str) -> None:
    path = world() / f"gate {gate}"
    while not path.exists():
        time.sleep(0.005)


def behave(word: str, what: str, name: str) -> str:
    """Do `what` in the way that `word` says."""
    match word:
        case "ok":
            note(what, name)
        case "reject":
            raise Rejected(f"{name} is not possible")
        case "refuse":
            raise Refused(name)
        case "error":
            raise RuntimeError(f"{what} of {name} failed")
        case "late":  # the answer is lost, the effect is there
            note(what, name)
            raise TimeoutError(f"{what} of {name} timed out")
        case "gate":
            note("at", name)
            wait_at(f"{step.current().run_id} {name}")
            note(what, name)
        case "thread":  # in which the provider is called
            with ThreadPoolExecutor(1) as threads:
                note(what, name, threads.submit(lambda: step.current().idempotency_key).result())
        case "hang":
            note("at", name)
            wait_at("of nobody")
        case "die":
            note(what, name)
            os.kill(os.getpid(), signal.SIGKILL)
        case _:
            raise AssertionError(word)
    return f"{name} done"


def word_of(plan: list[str]) -> str:
    return plan[min(step.current().attempt, len(plan)) - 1]


QUICK = RetryPolicy(
    initial_interval=timedelta(milliseconds=20), maximum_interval=timedelta(milliseconds=50), maximum_attempts=3,
    non_retryable_error_types=(Refused,),
)  # fmt: skip


@step(retry=QUICK)
def take_back(plan: Plan, result: str | None) -> None:
    """Undo: remembers what it was told of the result."""
    behave(word_of(plan.undo), "undo", plan.name)
    note("told", plan.name, result)


@step(compensate=take_back, retry=QUICK)
def act(plan: Plan) -> str:
    return behave(word_of(plan.do), "do", plan.name)


@step(retry=QUICK)
def take_back_and_tell(plan: Plan) -> None:
    """Undo: returns what is not as it is annotated, and could not be stored."""
    behave(word_of(plan.undo), "undo", plan.name)
    return (word for word in plan.undo)  # type: ignore[return-value]


@step(compensate=take_back_and_tell, retry=QUICK)
def act_undone_talkatively(plan: Plan) -> str:
    return behave(word_of(plan.do), "do", plan.name)


@step(compensate=take_back, retry=QUICK, on_unknown="park")
def act_or_park(plan: Plan) -> str:
    return behave(word_of(plan.do), "do", plan.name)


@step(compensate=take_back, retry=QUICK)
def act_probed(plan: Plan) -> str:
    return behave(word_of(plan.do), "do", plan.name)


@act_probed.probe
def look_up(plan: Plan) -> str | None:
    note("probe", plan.name)
    return plan.found


@step(compensate=take_back, retry=QUICK, start_to_close_timeout=timedelta(milliseconds=400))
def act_in_time(plan: Plan) -> str:
    return behave(word_of(plan.do), "do", plan.name)


@step(effect=Effect.PIVOT, retry=QUICK)
def pivot(plan: Plan) -> str:
    return behave(word_of(plan.do), "do", plan.name)


@step(effect=Effect.RETRIABLE, retry=QUICK)
def after_pivot(plan: Plan) -> str:
    return behave(word_of(plan.do), "do", plan.name)


@step(effect=Effect.NONE, retry=QUICK)
def look(plan: Plan) -> str:
    return behave(word_of(plan.do), "do", plan.name)


@step(retry=QUICK)
def undeclared(plan: Plan) -> str:
    return behave(word_of(plan.do), "do", plan.name)


@step(local=True, effect=Effect.NONE, retry=QUICK)
def look_locally(plan: Plan) -> str:
    return behave(word_of(plan.do), "do", plan.name)


@step(effect=Effect.NONE, retry=QUICK)
async def look_async(plan: Plan) -> str:
    await asyncio.sleep(0)
    return behave(word_of(plan.do), "do", plan.name)


@step(compensate=take_back, retry=QUICK, heartbeat_timeout=timedelta(milliseconds=800))
def train(plan: Plan) -> str:
    """Beats with what it has done so far; the next attempt goes on from there."""
    current = step.current()
    note("from", plan.name, current.heartbeat_details)
    current.heartbeat({"epoch": current.attempt})
    return behave(word_of(plan.do), "do", plan.name)


@step(compensate=take_back, retry=QUICK)
def beat_until_told(plan: Plan) -> str:
    """Beats for as long as its result is wanted."""
    note("at", plan.name)
    try:
        while True:
            step.current().heartbeat()
            time.sleep(0.01)
    finally:
        note("do", plan.name)


# -- values that cannot be stored --------------------------------------------------------------------------------------
def _numbers() -> Iterator[int]:
    yield 1


BAD_VALUES: dict[str, Any] = {
    "NUL": "a\0b",
    "NaN": float("nan"),
    "Infinity": [float("inf")],
    "lone surrogate": {"a": "\ud800"},
    "huge integer": 10**5000,
    "size": "x" * 300_000,
}


def bad_value(which: str) -> Any:
    if which == "depth":
        deep: list[Any] = []
        for _ in range(200):
            deep = [deep]
        return deep
    if which == "generator":
        return _numbers()
    return BAD_VALUES[which]


@step(retry=QUICK)
def return_bad(which: str) -> Any:
    return bad_value(which)


@step(retry=QUICK, effect=Effect.NONE)
def raise_bad(which: str) -> None:
    if which == "SystemExit":
        raise SystemExit(3)
    if which == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if which == "GeneratorExit":
        raise GeneratorExit
    if which == "__str__ raises":
        raise SpeechlessError
    if which == "NUL in the message":
        raise ValueError("a\0b \ud800")
    raise ValueError("y" * 2_000_000)


# -- plain Celery tasks ------------------------------------------------------------------------------------------------
@shared_task(name="plain.add")
def add(x: int, y: int) -> int:
    return x + y


@shared_task(name="plain.pause")
def pause(seconds: float) -> None:
    time.sleep(seconds)


@shared_task(name="plain.again", bind=True, max_retries=3)
def again(self: Any, succeed_at: int) -> int:
    note("do", "again")
    if step.current().attempt < succeed_at:
        raise self.retry(exc=RuntimeError("not yet"), countdown=0.02)
    return step.current().attempt


@shared_task(name="plain.again_at", bind=True)
def again_at(self: Any, succeed_at: int) -> int:
    """Retries at an instant without a time zone, which Celery takes for UTC."""
    if step.current().attempt < succeed_at:
        raise self.retry(eta=datetime.now(UTC).replace(tzinfo=None) + timedelta(milliseconds=20))
    return step.current().attempt


@shared_task(name="plain.again_some_day", bind=True)
def again_some_day(self: Any) -> None:
    raise self.retry(countdown=1e12)


@shared_task(
    name="plain.autoretry", autoretry_for=(ConnectionError,), max_retries=3, retry_backoff=False, default_retry_delay=0
)
def autoretry(succeed_at: int) -> int:
    note("do", "autoretry")
    if step.current().attempt < succeed_at:
        raise ConnectionError("not yet")
    return step.current().attempt


@shared_task(name="plain.take_back")
def take_back_plainly(plan: dict[str, Any], result: str | None) -> None:
    note("undo", plan["name"], result)


@step(compensate=take_back_plainly, retry=QUICK)
def act_undone_plainly(plan: Plan) -> str:
    return behave(word_of(plan.do), "do", plan.name)


@shared_task(name="plain.ignore")
def ignore() -> None:
    raise Ignore


@shared_task(name="plain.reject")
def reject() -> None:
    note("do", "reject")
    raise Reject("not wanted", requeue=False)


# -- a ledger ----------------------------------------------------------------------------------------------------------
LEDGER = """
CREATE TABLE accounts (id text PRIMARY KEY, balance numeric NOT NULL CHECK (balance >= 0));
CREATE TABLE movements (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, run text NOT NULL, key text NOT NULL UNIQUE,
    account text NOT NULL, amount numeric NOT NULL);
CREATE TABLE notes (run text NOT NULL);
"""


class Transfer(BaseModel):
    source: str
    target: str
    amount: Decimal
    pause: str = ""


def _move(conn: Connection, account: str, amount: Decimal) -> int:
    values = {"id": account, "amount": amount, "run": step.current().run_id, "key": step.current().idempotency_key}
    moved = conn.execute(
        text("UPDATE accounts SET balance = balance + :amount WHERE id = :id AND balance + :amount >= 0"), values
    )
    if moved.rowcount == 0:
        raise Rejected(f"{account} does not exist, or has too little")
    row = conn.execute(
        text("INSERT INTO movements (run, key, account, amount) VALUES (:run, :key, :id, :amount) RETURNING id"), values
    )
    return int(row.scalar_one())


def _pause(transfer: Transfer, where: str) -> None:
    if transfer.pause == where and step.current().attempt == 1:
        note("at", where)
        wait_at(f"{step.current().run_id} {where}")


@step(transactional=True, retry=QUICK)
def undo_debit(conn: Connection, transfer: Transfer, result: int | None) -> None:
    assert result is not None
    _move(conn, transfer.source, transfer.amount)


@step(transactional=True, compensate=undo_debit, retry=QUICK)
def debit(conn: Connection, transfer: Transfer) -> int:
    movement = _move(conn, transfer.source, -transfer.amount)
    _pause(transfer, "debit")
    return movement


@step(transactional=True, effect=Effect.COMPENSATABLE, retry=QUICK)
def credit(session: Session, transfer: Transfer) -> int:
    movement = _move(session.connection(), transfer.target, transfer.amount)
    _pause(transfer, "credit")
    return movement


@step(transactional=True, retry=QUICK)
def misbehave(conn: Connection, how: str) -> None:
    """Write a row, then do what a transactional step should not, or cannot."""
    conn.execute(text("INSERT INTO notes VALUES (:run)"), {"run": step.current().run_id})
    if how in ("commit", "rollback", "close"):
        getattr(conn, how)()
    if how == "error":
        raise RuntimeError("after the row")
    if how == "duplicate":
        conn.execute(text("INSERT INTO accounts VALUES ('taken', 0)"))
    if how == "duplicate, rejected":
        try:
            conn.execute(text("INSERT INTO accounts VALUES ('taken', 0)"))
        except IntegrityError as error:
            raise Rejected("taken already") from error
