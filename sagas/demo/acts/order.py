"""Shows the order."""

from __future__ import annotations

import random

from sagas.demo.story import COMPLETED, PARKED, UNDONE, Act, Promise, Shown, Story
from sagas.demo.world import (
    DOWN_HOST,
    GOODS,
    LOST_CARD,
    LOST_SKU,
    NAMES,
    REFUND_DOWN,
    REFUND_FAILS_TWICE,
    a_card,
    an_address,
    an_amount,
)
from sagas.order import Order, order
from tasks.outside.rules import DECLINED, NO_SUCH_HOST, SOLD_OUT


def make(job_id: str, twist: str, chance: random.Random) -> Order:
    """Return a request."""
    sold_out = twist in (SOLD_OUT, REFUND_FAILS_TWICE, REFUND_DOWN)
    return Order(
        id=job_id,
        sku=twist if twist == LOST_SKU else SOLD_OUT if sold_out else chance.choice(GOODS),
        quantity=chance.randint(1, 4),
        total=an_amount(chance, "EUR"),
        card=a_card(twist),
        email=an_address(chance.choice(NAMES), twist),
    )


ACT = Act(
    name="order",
    saga=order,
    does="charges a card, takes goods from the shelf, sends a mail",
    trap="a refund that fails must not be forgotten, and a mail that fails is no reason for one",
    stories=(
        Story(50, "everything in order", COMPLETED),
        Story(8, "the card is declined", UNDONE, DECLINED),
        Story(6, "charged, but the answer is lost: the probe finds it", COMPLETED, LOST_CARD),
        Story(8, "sold out: the charge is refunded", UNDONE, SOLD_OUT),
        Story(5, "picked, but the answer is lost: goods and money go back", UNDONE, LOST_SKU),
        Story(4, "sold out, and the refund fails twice", UNDONE, REFUND_FAILS_TWICE),
        Story(3, "the confirmation bounces: no reason to undo", COMPLETED, NO_SUCH_HOST),
        Story(2, "the mail host is down: no reason either", COMPLETED, DOWN_HOST),
        Story(2, "sold out, and the refund keeps failing: parked for a person", PARKED, REFUND_DOWN),
    ),
    make=make,
    promises=(
        Promise(
            "An undo that keeps failing is never dropped: its run is parked",
            """select j.id from demo.jobs j join orchestrator.runs r on r.id = j.id
               left join demo.outside c on c.kind = 'charges' and c.key = j.id
               where j.ends = 'parked' and (r.state <> 'parked' or c.state is distinct from 'done')""",
            "select count(*) from orchestrator.runs where state = 'parked'",
        ),
        Promise(
            "The shelves lack what completed orders took, and nothing else",
            """select p.key from demo.outside p join orchestrator.runs r on r.id = p.key
               join demo.jobs j on j.id = r.id
               where p.kind = 'picks' and ((p.state = 'done') <> (r.state = 'completed')
                                           or (p.state = 'done' and (p.body->>'quantity')::int <> j.pieces))
               union all select j.id from demo.jobs j join orchestrator.runs r on r.id = j.id
                         left join demo.outside p on p.kind = 'picks' and p.key = j.id
                         where j.saga = 'order' and r.state = 'completed' and p.key is null""",
            "select count(*) from demo.outside where kind = 'picks'",
        ),
    ),
    shown=(
        Shown("One run undone", "history", LOST_SKU, "compensated"),
        Shown("One run that needs a person", "explain", REFUND_DOWN, "parked"),
    ),
)
