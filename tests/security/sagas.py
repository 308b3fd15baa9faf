"""What a message may start: a saga that says what it was given, and one that keeps a secret."""

from __future__ import annotations

from orchestrator import Effect, Rejected, saga, step


@step(effect=Effect.NONE)
def repeat(text: str, times: int = 1) -> str:
    if text == "refuse":
        raise Rejected("as it was asked to")
    return text * times


@saga.define(name="security.repeat")
async def repeated(text: str, times: int = 1) -> str:
    return await saga.step(repeat, text, times)


@saga.define(name="security.other")
async def other(text: str) -> str:
    return text
