"""Owns the nightly reconciliation: every active account is looked at, and compliance hears what came of it."""

from __future__ import annotations

from pydantic import BaseModel

from orchestrator import MapFailed, saga
from tasks import reconciliation as steps

AT_ONCE = 10  # batches
RATE = "50/s"  # batches, over all workers: the ledger has other work too
TOLERATED = 0.1  # of the batches; beyond that the report says that it is none


class Reconciled(BaseModel):
    """Say what came of a night; it is `complete` if nearly all accounts could be looked at."""

    accounts: int
    findings: int
    unchecked: int
    complete: bool
    receipt: str


@saga.define(version=1)
async def reconciliation() -> Reconciled:
    """Look at all active accounts in batches of a hundred, report, and send the report; started by beat."""
    night = await saga.step(steps.begin, saga.info().run_id)
    try:
        summary = await saga.map(steps.check, steps.batches, concurrency=AT_ONCE, rate=RATE, tolerate=TOLERATED)
        complete = True
    except MapFailed as failed:  # there is nothing to undo, and a report of a bad night is worth more than none
        summary, complete = failed.summary, False
    unchecked = [f"batch {failure['index']}: {failure['message']}" for failure in summary.failures]
    report = await saga.step(steps.report, night, unchecked, complete)
    return Reconciled(
        accounts=report.accounts,
        findings=report.findings,
        unchecked=summary.failed,
        complete=complete,
        receipt=await saga.step(steps.send_to_compliance, report),
    )
