"""Steps of every kind, the saga of the simulation and one that is its child and in a hurry.

Owns the declarations.  What the functions do is the provider's of the seed that is being played.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, text

from orchestrator import Effect, RetryPolicy, saga, step
from tests.machine.programs import Language, Program
from tests.proof import effects
from tests.simulation.provider import Provider

_SOON = RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_attempts=2)
_LATER = RetryPolicy(initial_interval=timedelta(hours=2), maximum_interval=timedelta(hours=3), maximum_attempts=3)
_AT_ONCE = RetryPolicy(initial_interval=timedelta(0), maximum_attempts=3)
_TIME = timedelta(seconds=3)
_provider: list[Provider] = []


def use(provider: Provider | None) -> None:
    """Let steps act on this provider."""
    _provider[:] = [provider] if provider else []


def _row(connection: Connection, thing: int) -> None:
    _provider[0].work(thing)
    connection.execute(text(effects.INSERT), effects.transactional_row())


@step(effect=Effect.NONE, retry=_SOON, start_to_close_timeout=_TIME)
def look(n: int) -> int:
    _provider[0].do(n)
    return n


@step(effect=Effect.NONE, retry=_SOON, start_to_close_timeout=_TIME, local=True)
def jot(n: int) -> int:
    _provider[0].do(n)
    return n


@step(effect=Effect.NONE, retry=_SOON, start_to_close_timeout=timedelta(hours=1), heartbeat_timeout=_TIME)
def haul(n: int) -> int:
    for part in range(3):
        _provider[0].rest(0.4)
        step.current().heartbeat(part)
    _provider[0].do(n)
    return n


@step(retry=_SOON, start_to_close_timeout=_TIME)
def refund(n: int, result: str | None) -> None:
    _provider[0].undo(n)


@step(compensate=refund, retry=_SOON, start_to_close_timeout=_TIME)
def charge(n: int) -> str:
    _provider[0].do(n)
    return f"charge-{n}"


@step(queue="b", start_to_close_timeout=_TIME)
def release(n: int) -> None:
    _provider[0].undo(n)


@step(compensate=release, queue="b", retry=_LATER, start_to_close_timeout=_TIME)
def reserve(n: int) -> str:
    _provider[0].do(n)
    return f"hold-{n}"


@step(compensate=release, retry=_AT_ONCE, start_to_close_timeout=_TIME)
def wire(n: int) -> str:
    _provider[0].do(n)
    return f"wire-{n}"


@wire.probe
def find_wire(n: int) -> str | None:
    return f"wire-{n}" if _provider[0].probe(n) else None


@step(compensate=release, on_unknown="park", retry=_SOON, start_to_close_timeout=_TIME)
def careful(n: int) -> str:
    _provider[0].do(n)
    return f"careful-{n}"


@step(retry=_SOON, start_to_close_timeout=_TIME)
def mail(n: int) -> str:
    _provider[0].do(n)
    return f"mail-{n}"


@step(effect=Effect.PIVOT, retry=_SOON, start_to_close_timeout=_TIME)
def settle(n: int) -> str:
    _provider[0].do(n)
    return f"settle-{n}"


@step(effect=Effect.PIVOT, retry=_SOON, start_to_close_timeout=_TIME)
def capture(n: int) -> str:
    _provider[0].do(n)
    return f"capture-{n}"


@capture.probe
def find_capture(n: int) -> str | None:
    return f"capture-{n}" if _provider[0].probe(n) else None


@step(effect=Effect.RETRIABLE, retry=_SOON, start_to_close_timeout=_TIME)
def tell(n: int) -> str:
    _provider[0].do(n)
    return f"tell-{n}"


@step(transactional=True, retry=_SOON, start_to_close_timeout=_TIME)
def strike_out(connection: Connection, n: int) -> None:
    _row(connection, n)


@step(transactional=True, compensate=strike_out, retry=_SOON, start_to_close_timeout=_TIME)
def write_down(connection: Connection, n: int) -> str:
    _row(connection, n)
    return f"row-{n}"


@step(retry=_SOON, start_to_close_timeout=_TIME, concurrency=2)
def unload(n: int) -> None:
    _provider[0].undo(n)


@step(compensate=unload, retry=_SOON, start_to_close_timeout=_TIME, concurrency=1)
def load(n: int) -> str:
    """Pass a gate, on the way back too."""
    _provider[0].do(n)
    return f"load-{n}"


@step(effect=Effect.NONE, retry=_SOON, start_to_close_timeout=_TIME, rate_limit="2/s")
def peek(n: int) -> int:
    _provider[0].do(n)
    return n


@step(effect=Effect.NONE, retry=_SOON, start_to_close_timeout=_TIME)
def numbers(cursor: int | None, first: int, pages: int) -> tuple[list[int], int | None]:
    """Return two numbers at a time, from `first` on."""
    page = cursor or 0
    _provider[0].work(first)
    return [first + 2 * page, first + 2 * page + 1], page + 1 if page + 1 < pages else None


UNDOABLE = {s.__name__: s for s in (charge, reserve, wire, careful, write_down)}
PIVOTS = {s.__name__: s for s in (settle, capture)}
GATED = {s.__name__: s for s in (load, peek)}
STEPS = UNDOABLE | PIVOTS | GATED | {s.__name__: s for s in (look, jot, haul, mail, tell)}
AT_THE_PROVIDER = {s.name for s in (charge, reserve, wire, careful, mail, settle, capture, tell, load)}
UNLOGGED = {write_down.name, strike_out.name, find_wire.name, find_capture.name, numbers.name}
TASKS = [s.name for s in (*STEPS.values(), refund, release, strike_out, unload, find_wire, find_capture, numbers)]


async def _once(n: int) -> Any:
    return await saga.once(f"n{n}", lambda: _provider[0].once(n))


async def _child(program: Program) -> Any:
    return await saga.child(simulated, program)


async def _hurried(program: Program) -> Any:
    return await saga.child(hurried, program)


async def _stray(program: Program, seconds: int) -> None:
    saga.child(simulated, program)
    await asyncio.sleep(seconds)


async def _disowned(program: Program, seconds: int) -> None:
    request = saga.child(simulated, program)
    await asyncio.sleep(seconds)
    request.cancel()


async def _again(program: Program) -> None:
    saga.continue_as_new(program)


async def _gate(name: str) -> int:
    return saga.version(name, 1, 2)


async def _all(programs: list[Program]) -> list[str]:
    done = await asyncio.gather(*map(LANGUAGE.perform, programs), return_exceptions=True)
    return [type(each).__name__ for each in done]


async def _urgent(name: str, n: int, priority: int) -> Any:
    return await saga.step(STEPS[name].with_options(priority=priority), n)


async def _mapped(name: str, first: int, many: int, options: dict[str, Any]) -> int:
    return (await saga.map(STEPS[name], range(first, first + many), **options)).failed


async def _paged(name: str, first: int, pages: int, options: dict[str, Any]) -> int:
    return (await saga.map(STEPS[name], numbers, args=(first, pages), **options)).failed


LANGUAGE = Language(
    STEPS, once=_once, child=_child, hurried=_hurried, stray=_stray, disowned=_disowned, again=_again, gate=_gate,
    all=_all, urgent=_urgent, mapped=_mapped, paged=_paged,
)  # fmt: skip


@saga.define(name="tests.simulated")
async def simulated(program: Program) -> Any:
    return await LANGUAGE.perform(program)


@saga.define(name="tests.hurried", deadline=timedelta(seconds=4), on_code_error="compensate")
async def hurried(program: Program) -> Any:
    return await LANGUAGE.perform(program)


SAGAS = [simulated.target, hurried.target, "orchestrator.map@1"]
