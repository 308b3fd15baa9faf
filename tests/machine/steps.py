"""Steps of every kind, for sagas that only the tests run; their functions are never called by the machine."""

from __future__ import annotations

from orchestrator.machine.policy import Effect, RetryPolicy
from orchestrator.step import step

TWICE = RetryPolicy(maximum_attempts=2)


@step(effect=Effect.NONE, retry=TWICE)
def look(n: int) -> int:
    return n


@step(retry=TWICE)
def refund(n: int, result: str | None) -> None: ...


@step(compensate=refund, retry=TWICE)
def charge(n: int) -> str:
    return f"charge-{n}"


@step
def release(n: int) -> None: ...


@step(compensate=release, retry=TWICE)
def reserve(n: int) -> str:
    return f"hold-{n}"


@step(compensate=release, retry=TWICE)
def wire(n: int) -> str:
    return f"wire-{n}"


@wire.probe
def find_wire(n: int) -> str | None:
    return None


@step(compensate=release, on_unknown="park", retry=TWICE)
def careful(n: int) -> str:
    return f"careful-{n}"


@step(retry=TWICE)
def mail(n: int) -> str:
    return f"mail-{n}"


@step(effect=Effect.PIVOT, retry=TWICE)
def settle(n: int) -> str:
    return f"settled-{n}"


@step(effect=Effect.PIVOT, retry=TWICE)
def capture(n: int) -> str:
    return f"captured-{n}"


@capture.probe
def find_capture(n: int) -> str | None:
    return None


@step(effect=Effect.RETRIABLE, retry=TWICE)
def tell(n: int) -> str:
    return f"told-{n}"
