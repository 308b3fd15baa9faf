"""Owns the demo's verdict: each promise as one sentence, and the SQL that would find it broken.

Business tables are read as they are, and of the orchestrator only what its runs say of themselves. A
promise is kept if its query finds no counterexample *and* there was something to examine.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Engine, text

from sagas.demo.workload import PIECES, Job

JOBS = """
create schema if not exists demo;
create table demo.jobs (
    id text primary key, saga text, ends text, currency text, amount numeric,
    source text, target text, pieces int
)
"""

ENDED = "('completed', 'failed', 'compensated', 'cancelled', 'terminated')"
NET = """
    select p.reference, e.account_id, sum(e.amount) as net
    from ledger.postings p join ledger.entries e on e.posting_id = p.id group by 1, 2
"""


@dataclass(frozen=True, slots=True)
class Promise:
    """Pair a promise with the query for its counterexamples and the query that counts what was examined."""

    says: str
    broken: str
    examined: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Say whether a promise held, on how many cases, and name the first counterexamples."""

    says: str
    examined: int
    counterexamples: tuple[str, ...]

    @property
    def kept(self) -> bool:
        """Tell whether there was something to examine and nothing wrong with it."""
        return self.examined > 0 and not self.counterexamples


PROMISES = (
    Promise(
        "Every start that returned became a run; none is lost",
        "select j.id from demo.jobs j left join orchestrator.runs r on r.id = j.id where r.id is null",
        "select count(*) from demo.jobs",
    ),
    Promise(
        "Every run came to an end, or is parked where a person is needed",
        f"""select r.id || ' is ' || r.state from demo.jobs j join orchestrator.runs r on r.id = j.id
            where r.state not in {ENDED} and not (r.state = 'parked' and j.ends = 'parked')""",
        "select count(*) from orchestrator.runs",
    ),
    Promise(
        "Every run ended as its input says that it must",
        """select j.id || ' is ' || r.state || ', not ' || j.ends
           from demo.jobs j join orchestrator.runs r on r.id = j.id
           where j.ends <> case when r.state in ('failed', 'compensated') then 'undone' else r.state end""",
        "select count(*) from demo.jobs",
    ),
    Promise(
        "Every completed transfer moved its money exactly once",
        f"""select j.id from demo.jobs j join orchestrator.runs r on r.id = j.id
            left join ({NET}) s on s.reference = j.id and s.account_id = j.source
            left join ({NET}) t on t.reference = j.id and t.account_id = j.target
            where j.saga = 'transfer' and r.state = 'completed'
            and (s.net is distinct from -j.amount or t.net is distinct from j.amount
                 or (select count(*) from ledger.postings p where p.reference = j.id) <> 2)""",
        "select count(*) from orchestrator.runs where saga like '%transfer' and state = 'completed'",
    ),
    Promise(
        "Every settled payment took and gave its money exactly once",
        f"""select j.id from demo.jobs j join orchestrator.runs r on r.id = j.id
            left join ({NET}) s on s.reference = j.id and s.account_id = j.source
            left join ({NET}) t on t.reference = j.id and t.account_id = j.target
            where j.saga = 'payment' and r.state = 'completed'
            and (s.net is distinct from -j.amount or t.net is distinct from j.amount
                 or (select count(*) from ledger.postings p where p.reference = j.id) <> 2)""",
        "select count(*) from orchestrator.runs where saga like '%payment' and state = 'completed'",
    ),
    Promise(
        "What did not complete left no trace on any account",
        f"""select j.id || ' left ' || n.net || ' on ' || n.account_id
            from demo.jobs j join orchestrator.runs r on r.id = j.id join ({NET}) n on n.reference = j.id
            where r.state <> 'completed' and n.net <> 0""",
        "select count(*) from orchestrator.runs where state in ('failed', 'compensated')",
    ),
    Promise(
        "The ledger is in balance: every posting, every currency, every account",
        """select 'posting ' || posting_id from ledger.entries group by posting_id having sum(amount) <> 0
           union all select currency from ledger.entries group by currency having sum(amount) <> 0
           union all
           select a.id from ledger.accounts a left join ledger.entries e on e.account_id = a.id
           where a.kind = 'customer' group by a.id having a.balance <> coalesce(sum(e.amount), 0)""",
        "select count(*) from ledger.postings",
    ),
    Promise(
        "No money is left on the way, and no customer is overdrawn",
        """select account_id from ledger.entries where account_id similar to 'house:(transit|pending):%'
           group by account_id having sum(amount) <> 0
           union all select id from ledger.accounts where balance < 0""",
        "select count(*) from ledger.accounts",
    ),
    Promise(
        "Every completed order and payment was charged exactly what it costs",
        """select j.id from demo.jobs j join orchestrator.runs r on r.id = j.id
           left join provider.charges c on c.key = j.id
           where j.saga in ('order', 'payment') and r.state = 'completed'
           and (c.state is distinct from 'charged' or c.amount <> j.amount or c.currency <> j.currency)""",
        "select count(*) from provider.charges where state = 'charged'",
    ),
    Promise(
        "No card stays charged for nothing: all other charges are refunded",
        """select c.key from provider.charges c left join orchestrator.runs r on r.id = c.key
           where c.state = 'charged' and coalesce(r.state, '') not in ('completed', 'parked')""",
        "select count(*) from provider.charges where state <> 'charged'",
    ),
    Promise(
        "An undo that keeps failing is never dropped: its run is parked",
        """select j.id from demo.jobs j join orchestrator.runs r on r.id = j.id
           left join provider.charges c on c.key = j.id
           where j.ends = 'parked' and (r.state <> 'parked' or c.state is distinct from 'charged')""",
        "select count(*) from orchestrator.runs where state = 'parked'",
    ),
    Promise(
        "The shelves lack what completed orders took, and nothing else",
        f"""select s.sku from warehouse.stock s
            left join warehouse.picks p on p.sku = s.sku and p.state = 'picked'
            group by s.sku, s.on_hand having s.on_hand + coalesce(sum(p.quantity), 0) <> {PIECES}
            union all select p.reference from warehouse.picks p
                      join orchestrator.runs r on r.id = p.reference join demo.jobs j on j.id = r.id
                      where (p.state = 'picked') <> (r.state = 'completed')
                         or (p.state = 'picked' and p.quantity <> j.pieces)""",
        "select count(*) from warehouse.picks",
    ),
)


def note(conn: Connection, job: Job) -> None:
    """Write down a job whose start has returned."""
    request = job.request
    row = {
        "id": job.id,
        "saga": job.id.partition("-")[0],
        "ends": job.story.ends,
        "currency": job.money.currency,
        "amount": job.money.amount,
        "source": getattr(request, "source", getattr(request, "customer", None)),
        "target": getattr(request, "target", getattr(request, "merchant", None)),
        "pieces": getattr(request, "quantity", None),
    }
    columns = ", ".join(row)
    conn.execute(text(f"insert into demo.jobs ({columns}) values ({', '.join(f':{name}' for name in row)})"), row)


def judge(engine: Engine, effect_log: Path) -> list[Verdict]:
    """Look for a counterexample to every promise."""
    with engine.connect() as conn:
        verdicts = [_judge(conn, promise) for promise in PROMISES]
    return [*verdicts, _effects_once(effect_log)]


def _judge(conn: Connection, promise: Promise) -> Verdict:
    found = tuple(str(row[0]) for row in conn.execute(text(promise.broken)))
    return Verdict(promise.says, int(conn.scalar(text(promise.examined)) or 0), found)


def _effects_once(effect_log: Path) -> Verdict:
    lines = [json.loads(line) for line in effect_log.read_text().splitlines()]
    counted = Counter(f"{line['effect']} {line['key']}" for line in lines)
    twice = tuple(effect for effect, times in counted.items() if times > 1)
    return Verdict("No charge, refund, pick or mail happened twice", len(counted), twice)
