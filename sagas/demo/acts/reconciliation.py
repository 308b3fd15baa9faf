"""Shows the reconciliation, on a ledger in which some balances were made wrong, while all others are at work."""

from __future__ import annotations

import random

from sagas.demo.story import COMPLETED, Act, Promise, Shown, Story
from sagas.reconciliation import reconciliation


def make(job_id: str, twist: str, chance: random.Random) -> None:
    """Return nothing: it is asked for nothing, as beat starts it."""


ACT = Act(
    name="reconciliation",
    saga=reconciliation,
    does="looks at every account in batches of a hundred, reports to compliance; beat starts it every night",
    trap="accounts by the million must not be in memory or history, and no failed batch may hide the others",
    stories=(Story(1, "a few thousand accounts, of which three are wrong", COMPLETED),),
    make=make,
    promises=(
        Promise(
            "Each error that was planted in the ledger is found once, and nothing else",
            """select coalesce(a.id, f.subject) from (select id from ledger.accounts where id like 'planted:%') a
               full join reconciliation.findings f on f.subject = a.id where a.id is null or f.subject is null""",
            "select count(*) from reconciliation.findings",
        ),
        Promise(
            "Compliance has the report, once",
            """select n.night from reconciliation.reports n
               left join demo.outside o on o.kind = 'reports' and o.key = n.night
               where o.state is distinct from 'done' or (o.body->>'findings')::int <> n.findings""",
            "select count(*) from reconciliation.reports",
        ),
    ),
    shown=(Shown("A reconciliation", "history", "", "completed"),),
)
