"""Shows the transfer."""

from __future__ import annotations

import random

from sagas.demo.story import COMPLETED, UNDONE, Act, Promise, Shown, Story
from sagas.demo.world import LOST_IBAN, NAMES, a_currency, an_amount
from sagas.transfer import transfer
from tasks.outside.rules import EMPTY_IBAN
from tasks.transfers import Transfer


def make(job_id: str, twist: str, chance: random.Random) -> Transfer:
    """Return a request."""
    currency = a_currency(chance)
    source, target = chance.sample(NAMES, 2)
    if twist in ("closed", "frozen"):
        target = twist
    from_bank = twist in ("another bank", LOST_IBAN, EMPTY_IBAN)
    return Transfer(
        id=job_id,
        source=f"iban:{twist} {job_id}" if from_bank else f"customer:{source}:{currency}",
        target=f"customer:{target}:{currency}",
        money=an_amount(chance, currency, too_much=twist == "too much"),
    )


ACT = Act(
    name="transfer",
    saga=transfer,
    does="takes money from one account and gives it to another",
    trap="a debit that was refused must not be 'reversed' into a gift; one that timed out must be reversed",
    stories=(
        Story(75, "everything in order", COMPLETED),
        Story(10, "more than the account holds", UNDONE, "too much"),
        Story(8, "the receiving account is closed", UNDONE, "closed"),
        Story(6, "the receiving account is frozen: retried, then given up", UNDONE, "frozen"),
        Story(8, "from another bank", COMPLETED, "another bank"),
        Story(4, "another bank refuses: nothing to give back", UNDONE, EMPTY_IBAN),
        Story(4, "another bank does not answer: what it may have debited goes back", UNDONE, LOST_IBAN),
    ),
    make=make,
    promises=(
        Promise(
            "Every completed transfer moved its money exactly once",
            """select j.id from demo.jobs j join orchestrator.runs r on r.id = j.id
               left join demo.net s on s.reference = j.id and s.account_id = j.source
               left join demo.net t on t.reference = j.id and t.account_id = j.target
               where j.saga = 'transfer' and r.state = 'completed'
               and (t.net is distinct from j.amount or (j.source not like 'iban:%' and s.net is distinct from -j.amount)
                    or (select count(*) from ledger.postings p where p.reference = j.id)
                       <> case when j.source like 'iban:%' then 1 else 2 end)""",
            "select count(*) from orchestrator.runs where saga like '%transfer' and state = 'completed'",
        ),
        Promise(
            "Other banks lack what came from them, and nothing else",
            """select j.id from demo.jobs j join orchestrator.runs r on r.id = j.id
               left join demo.outside o on o.kind = 'debits' and o.key = j.id
               where j.source like 'iban:%' and (r.state = 'completed') <> (coalesce(o.state, '') = 'done')""",
            "select count(*) from demo.outside where kind = 'debits'",
        ),
    ),
    shown=(Shown("A debit that may have happened, reversed", "history", LOST_IBAN, "compensated"),),
)
