"""Shows the sync of an account at another bank."""

from __future__ import annotations

import random

from sagas.demo.story import COMPLETED, Act, Promise, Shown, Story
from sagas.sync import SyncRequest, sync

TRANSACTIONS, PAGE = 3000, 125  # more than twenty pages, so that it goes on as new once


def make(job_id: str, twist: str, chance: random.Random) -> SyncRequest:
    """Return a request."""
    return SyncRequest(account=f"{job_id}-{TRANSACTIONS}", page_size=PAGE)


ACT = Act(
    name="sync",
    saga=sync,
    does="fetches 3,000 transactions of an account page by page, looks at each page in three ways, books it",
    trap="a history must not grow with the pages, and nothing may be booked twice",
    stories=(Story(1, "everything, though the bank stumbles at first", COMPLETED),),
    make=make,
    promises=(
        Promise(
            "Every transaction of the other bank is booked once, and every odd one is found",
            f"""select j.id from demo.jobs j join orchestrator.runs r on r.id = j.id
               where j.saga = 'sync' and r.state = 'completed'
               and ((select count(*) from ledger.postings p
                     where p.kind = 'spent' and p.reference like j.source || '/%') <> {TRANSACTIONS}
                    or (select count(distinct reference) from ledger.postings p
                        where p.kind = 'spent' and p.reference like j.source || '/%') <> {TRANSACTIONS}
                    or (select count(*) from bank.anomalies a
                        where a.id like j.source || '/%') <> {TRANSACTIONS // 500})""",
            "select count(*) from ledger.postings where kind = 'spent'",
        ),
        Promise(
            "No link of a sync has a longer history than twenty pages make",
            """select run_id from orchestrator.history where run_id like 'sync-%'
               group by run_id having count(*) > 400""",
            "select count(distinct run_id) from orchestrator.history where run_id like 'sync-%'",
        ),
    ),
    shown=(Shown("A sync, at its end", "show", "", "completed"),),
    has_effects_outside=False,
)
