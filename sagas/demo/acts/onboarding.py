"""Shows the onboarding; its day of waiting takes two seconds here."""

from __future__ import annotations

import random
from datetime import timedelta

from sagas.demo.story import COMPLETED, UNDONE, Act, Promise, Shown, Story
from sagas.demo.world import DOWN_HOST, LOST_IBAN, NAMES, an_address
from sagas.onboarding import onboarding
from tasks.customers import Signup
from tasks.outside.rules import FORGED


def make(job_id: str, twist: str, chance: random.Random) -> Signup:
    """Return a request."""
    name = chance.choice(NAMES)
    return Signup(
        id=job_id,
        name=name,
        email=an_address(f"{name}.{job_id}", twist),
        document=twist if twist == FORGED else "passport",
        currencies=("EUR", "USD"),
        iban=twist if twist == LOST_IBAN else chance.choice((None, "DE02")),
        follow_up_after=timedelta(seconds=2),
    )


ACT = Act(
    name="onboarding",
    saga=onboarding,
    does="makes a profile, checks who it is, opens accounts, welcomes, sleeps a day (here 2 s), asks how it goes",
    trap="a mail that fails must not undo a finished onboarding, nor a day of sleep hold a worker",
    stories=(
        Story(15, "everything in order", COMPLETED),
        Story(6, "the document is forged: told so, and the profile is removed", UNDONE, FORGED),
        Story(3, "the other bank does not answer: no link, and no harm", COMPLETED, LOST_IBAN),
        Story(3, "both mails fail: a customer all the same", COMPLETED, DOWN_HOST),
    ),
    make=make,
    promises=(
        Promise(
            "Who was onboarded is a customer with accounts, whatever became of the mails",
            """select j.id from demo.jobs j join orchestrator.runs r on r.id = j.id
               left join customers.profiles p on p.id = j.id
               where j.saga = 'onboarding' and r.state = 'completed'
               and (p.status is distinct from 'active'
                    or (select count(*) from ledger.accounts a where a.id like 'customer:' || j.id || ':%') <> 2)""",
            "select count(*) from orchestrator.runs where saga like '%onboarding' and state = 'completed'",
        ),
        Promise(
            "Who was refused left no profile, no account and no link to a bank",
            """select j.id from demo.jobs j join orchestrator.runs r on r.id = j.id
               where j.saga = 'onboarding' and r.state <> 'completed'
               and (exists (select from customers.profiles p where p.id = j.id)
                    or exists (select from ledger.accounts a where a.id like 'customer:' || j.id || ':%')
                    or exists (select from demo.outside o
                               where o.kind = 'links' and o.key = j.id and o.state = 'done'))""",
            "select count(*) from orchestrator.runs where saga like '%onboarding' and state = 'compensated'",
        ),
    ),
    shown=(Shown("One who was refused", "history", FORGED, "compensated"),),
)
