"""Shows the payment."""

from __future__ import annotations

import random

from sagas.demo.story import COMPLETED, UNDONE, Act, Promise, Shown, Story
from sagas.demo.world import DOWN_HOST, LOST_CARD, NAMES, SHOPS, a_card, a_currency, an_address, an_amount
from sagas.payment import payment
from tasks.outside.rules import DECLINED
from tasks.payments import Payment


def make(job_id: str, twist: str, chance: random.Random) -> Payment:
    """Return a request."""
    currency = a_currency(chance)
    customer, shop = chance.choice(NAMES), chance.choice(SHOPS)
    return Payment(
        id=job_id,
        customer=f"customer:{customer}:{currency}",
        merchant=f"merchant:{'closed' if twist == 'closed' else shop}:{currency}",
        card=a_card(twist),
        money=an_amount(chance, currency, too_much=twist == "too much"),
        customer_email=an_address(customer, twist),
        merchant_email=an_address(shop, twist),
    )


ACT = Act(
    name="payment",
    saga=payment,
    does="holds the money, charges, settles with the merchant, tells both",
    trap="settling is the point of no return: a failed notification must never reverse it",
    stories=(
        Story(40, "everything in order", COMPLETED),
        Story(8, "more than the wallet holds", UNDONE, "too much"),
        Story(8, "the card is declined: the hold is released", UNDONE, DECLINED),
        Story(6, "charged, but the answer is lost: the probe finds it", COMPLETED, LOST_CARD),
        Story(3, "the merchant is closed: refused at the pivot, all undone", UNDONE, "closed"),
        Story(3, "settled, both mails fail: never reversed", COMPLETED, DOWN_HOST),
    ),
    make=make,
    promises=(
        Promise(
            "Every settled payment took and gave its money exactly once",
            """select j.id from demo.jobs j join orchestrator.runs r on r.id = j.id
               left join demo.net s on s.reference = j.id and s.account_id = j.source
               left join demo.net t on t.reference = j.id and t.account_id = j.target
               where j.saga = 'payment' and r.state = 'completed'
               and (s.net is distinct from -j.amount or t.net is distinct from j.amount
                    or (select count(*) from ledger.postings p where p.reference = j.id) <> 2)""",
            "select count(*) from orchestrator.runs where saga like '%payment' and state = 'completed'",
        ),
    ),
    shown=(Shown("A payment that was refused at the point of no return", "history", "closed", "compensated"),),
)
