"""What only the newer release of the fault app has: a step and a saga that older workers have never heard of."""

from __future__ import annotations

from orchestrator import Effect, saga, step
from tests.faults import steps
from tests.faults.steps import Stop


@step(effect=Effect.NONE, retry=steps.PATIENT, start_to_close_timeout=steps.LIMIT)
def admire(stop: Stop) -> str:
    return steps.behave(stop, stop.how)


@saga.define(name="faults.excursion")
async def excursion(stop: Stop) -> list[str]:
    """Do what the older release knows, then what it does not, then what it knows."""
    return [
        await saga.step(steps.look, stop),
        await saga.step(admire, stop),
        await saga.step(steps.look, stop),
    ]
