"""Steps that behave as a stop of a trip says; every effect is told to the effect log, or is a row of the ledger.

Owns what can go wrong within a step, and the ledger's tables.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from datetime import timedelta
from pathlib import Path

from pydantic import BaseModel
from sqlalchemy import Connection, text

from orchestrator import Effect, Rejected, RetryPolicy, step
from tests.proof import effects
from tests.proof.effects import EffectLog

FOLDER = "FAULTS_FOLDER"
LIMIT = timedelta(seconds=4)
QUICK = RetryPolicy(
    initial_interval=timedelta(milliseconds=20), maximum_interval=timedelta(milliseconds=100), maximum_attempts=3
)
PATIENT = RetryPolicy(
    initial_interval=timedelta(milliseconds=20), maximum_interval=timedelta(milliseconds=300), maximum_attempts=60
)
ACCOUNTS, BALANCE = 20, 1000
LEDGER = f"""
CREATE TABLE accounts (id integer PRIMARY KEY, balance bigint NOT NULL);
INSERT INTO accounts SELECT n, {BALANCE} FROM generate_series(0, {ACCOUNTS - 1}) AS n;
"""


class Stop(BaseModel):
    """One stop of a trip: what is to be done there, and how it goes, attempt by attempt (the last goes on)."""

    name: str
    kind: str = "take"
    how: list[str] = ["ok"]
    undo: list[str] = ["ok"]
    ms: int = 0
    source: int = 0
    target: int = 1
    remembered: bool = False  # whether who keeps the effect remembers that it was undone, and refuses it from then on


# -- gates: files by which a test holds a step, and hears from it ------------------------------------------------------
def folder() -> Path:
    return Path(os.environ[FOLDER])


def hold(where: str) -> None:
    """Say that this attempt is here, and wait until a test lets it go on."""
    current = step.current()
    name = f"{current.run_id} {where} {current.attempt}"
    (folder() / f"at {name}").write_text(str(os.getpid()))
    while not (folder() / f"go {name}").exists():
        time.sleep(0.005)


def behave(stop: Stop, words: list[str]) -> str:
    """Have the effect of a stop, in the way that the word for this attempt says."""
    word = words[min(step.current().attempt, len(words)) - 1]
    log = EffectLog.of_environment()
    time.sleep(stop.ms / 1000)
    if word == "reject":
        raise Rejected(f"{stop.name} is not possible")
    if word == "fail":
        raise RuntimeError(f"{stop.name} does not answer")
    if word == "deaf":  # to the alarm of its time limit, as code is that does not come back to the interpreter
        signal.setitimer(signal.ITIMER_REAL, 0)
    if word in ("before", "deaf", "hog"):
        hold("before")
    if word == "eat":
        eat_memory()
    if word == "hog":
        bytearray(b"x") * (512 << 20)
    if stop.remembered:
        remember_or_refuse(stop)
    log.effect()
    if word == "silent":
        raise TimeoutError(f"{stop.name} did, and does not answer")
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "murder":  # of the worker's main process, and so of all its children
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(30)
    if word == "after":
        hold("after")
    log.returned()
    return stop.name


def remember_or_refuse(stop: Stop) -> None:
    """Note an undo; refuse what was undone."""
    current = step.current()
    note = folder() / f"undone {current.run_id} {stop.name}"
    if current.undoes:
        note.touch()
    elif note.exists():
        raise Rejected(f"{stop.name} was undone")


def eat_memory() -> None:
    """Ask for more memory than this process may have."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + (64 << 20), before[1]))
    try:
        bytearray(512 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@step(retry=PATIENT, start_to_close_timeout=LIMIT)
def give_back(stop: Stop, result: str | None) -> None:
    behave(stop, stop.undo)


@step(compensate=give_back, retry=QUICK, start_to_close_timeout=LIMIT)
def take(stop: Stop) -> str:
    return behave(stop, stop.how)


@step(compensate=give_back, retry=PATIENT, start_to_close_timeout=LIMIT)
def insist(stop: Stop) -> str:
    """Take, with the patience for a machine on which everything is killed all the time."""
    return behave(stop, stop.how)


@step(compensate=give_back, retry=QUICK, start_to_close_timeout=timedelta(seconds=20))
def linger(stop: Stop) -> str:
    """Take, with time enough to be overtaken."""
    return behave(stop, stop.how)


@step(compensate=give_back, retry=QUICK, start_to_close_timeout=timedelta(minutes=5))
def stay(stop: Stop) -> str:
    """Take, with so much time that it is overtaken in it, though others wait for what its frozen worker has locked."""
    return behave(stop, stop.how)


@step(compensate=give_back, retry=PATIENT, start_to_close_timeout=LIMIT)
def wire(stop: Stop) -> str:
    """Take, from somebody who can be asked what became of it."""
    return behave(stop, stop.how)


@wire.probe
def find_wire(stop: Stop) -> str | None:
    current, log = step.current(), EffectLog.of_environment()
    mine = (current.run_id, current.key, "do")
    return stop.name if any((e.run, e.key, e.direction) == mine for e in effects.read(log.path, growing=True)) else None


@step(effect=Effect.NONE, retry=PATIENT, start_to_close_timeout=LIMIT)
def look(stop: Stop) -> str:
    return behave(stop, stop.how)


# -- the ledger --------------------------------------------------------------------------------------------------------
def _move(conn: Connection, stop: Stop, cents: int) -> None:
    for account, amount in sorted([(stop.source, -cents), (stop.target, cents)]):
        values = {"id": account, "amount": amount}
        conn.execute(text("UPDATE accounts SET balance = balance + :amount WHERE id = :id"), values)
    conn.execute(text(effects.INSERT), effects.transactional_row())


@step(transactional=True, retry=PATIENT, start_to_close_timeout=LIMIT)
def move_back(conn: Connection, stop: Stop, result: str | None) -> None:
    _move(conn, stop, -1)


@step(transactional=True, compensate=move_back, retry=PATIENT, start_to_close_timeout=LIMIT)
def move(conn: Connection, stop: Stop) -> str:
    return _pay(conn, stop)


@step(transactional=True, compensate=move_back, retry=PATIENT, start_to_close_timeout=timedelta(seconds=10))
def pay(conn: Connection, stop: Stop) -> str:
    """Move, with time enough to be overtaken."""
    return _pay(conn, stop)


def _pay(conn: Connection, stop: Stop) -> str:
    word = stop.how[min(step.current().attempt, len(stop.how)) - 1]
    if word == "before":
        hold("before")
    _move(conn, stop, 1)
    time.sleep(stop.ms / 1000)
    if word == "after":
        hold("after")
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return stop.name
