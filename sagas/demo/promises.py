"""Owns the demo's verdict: each promise as one sentence, and the SQL that would find it broken.

Business tables are read as they are, the outside world is asked over HTTP, and of the orchestrator only what its
runs say of themselves. A promise is kept if its query finds no counterexample *and* there was something to examine.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from sqlalchemy import Connection, Engine, text

from sagas.demo.story import Act, Job, Promise
from tasks.outside.rules import RULES

SCHEMA = """
create schema if not exists demo;
create table demo.jobs (
    id text primary key, saga text, ends text, currency text, amount numeric,
    source text, target text, pieces int
);
create table demo.outside (kind text, key text, state text, body jsonb);
create table demo.epochs (job text, epoch int, attempt int, pid int);
create view demo.net as
    select p.reference, e.account_id, sum(e.amount) as net
    from ledger.postings p join ledger.entries e on e.posting_id = p.id group by 1, 2;
"""

ENDED = "('completed', 'failed', 'compensated', 'cancelled', 'terminated')"


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


OF_ALL = (
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
)

OF_MONEY = (
    Promise(
        "What did not complete left no trace on any account",
        """select j.id || ' left ' || n.net || ' on ' || n.account_id
           from demo.jobs j join orchestrator.runs r on r.id = j.id join demo.net n on n.reference = j.id
           where r.state <> 'completed' and n.net <> 0""",
        "select count(*) from orchestrator.runs where state in ('failed', 'compensated')",
    ),
    Promise(
        "The ledger is in balance: every posting, every currency, every account",
        """select 'posting ' || posting_id from ledger.entries group by posting_id having sum(amount) <> 0
           union all select currency from ledger.entries group by currency having sum(amount) <> 0
           union all
           select a.id from ledger.accounts a left join ledger.entries e on e.account_id = a.id
           where a.kind = 'customer' and a.id not like 'planted:%'
           group by a.id having a.balance <> coalesce(sum(e.amount), 0)""",
        "select count(*) from ledger.postings",
    ),
    Promise(
        "No money is left on the way, and no customer is overdrawn",
        """select account_id from ledger.entries where account_id similar to 'house:(transit|pending):%'
           group by account_id having sum(amount) <> 0
           union all select id from ledger.accounts where balance < 0""",
        "select count(*) from ledger.accounts",
    ),
)

OF_CARDS = (
    Promise(
        "Every completed order and payment was charged exactly what it costs",
        """select j.id from demo.jobs j join orchestrator.runs r on r.id = j.id
           left join demo.outside c on c.kind = 'charges' and c.key = j.id
           where j.saga in ('order', 'payment') and r.state = 'completed'
           and (c.state is distinct from 'done' or (c.body->'money'->>'amount')::numeric <> j.amount
                or c.body->'money'->>'currency' <> j.currency)""",
        "select count(*) from demo.outside where kind = 'charges' and state = 'done'",
    ),
    Promise(
        "No card stays charged for nothing: all other charges are refunded",
        """select c.key from demo.outside c left join orchestrator.runs r on r.id = c.key
           where c.kind = 'charges' and c.state = 'done' and coalesce(r.state, '') not in ('completed', 'parked')""",
        "select count(*) from demo.outside where kind = 'charges' and state <> 'done'",
    ),
)


MONEY, CARDS = {"transfer", "order", "payment"}, {"order", "payment"}


def note(conn: Connection, job: Job) -> None:
    """Write down a job whose start has returned."""
    request, money = job.request, job.money
    row = {
        "id": job.id,
        "saga": job.act.name,
        "ends": job.story.ends,
        "currency": money.currency if money else None,
        "amount": money.amount if money else None,
        "source": getattr(request, "source", getattr(request, "customer", getattr(request, "account", None))),
        "target": getattr(request, "target", getattr(request, "merchant", None)),
        "pieces": getattr(request, "quantity", None),
    }
    _insert(conn, "jobs", [row])


def judge(engine: Engine, acts: Sequence[Act], outside_url: str, outside_log: Path, models: Path) -> list[Verdict]:
    """Look for a counterexample to every promise that these acts concern."""
    with engine.begin() as conn:
        _insert(conn, "outside", _back_office(outside_url))
        _insert(conn, "epochs", _epochs(models))
        verdicts = [_judge(conn, promise) for promise in _promises(acts)]
    if any(act.has_effects_outside for act in acts):
        verdicts.append(_effects_once(outside_log))
    return verdicts


def _promises(acts: Sequence[Act]) -> list[Promise]:
    names = {act.name for act in acts}
    shared = [*OF_ALL, *(OF_MONEY if names & MONEY else ()), *(OF_CARDS if names & CARDS else ())]
    return [*shared, *(promise for act in acts for promise in act.promises)]


def _back_office(url: str) -> list[dict[str, object]]:
    """Return what the outside world says of itself."""
    with httpx.Client(base_url=url, trust_env=False) as http:
        told = {kind: http.get(f"/{kind}").raise_for_status().json()["records"] for kind in RULES}
    return [
        {"kind": kind, "key": each["key"], "state": each["state"], "body": json.dumps(each["body"])}
        for kind, records in told.items()
        for each in records
    ]


def _epochs(models: Path) -> list[dict[str, object]]:
    """Return what was written down of every training."""
    logs = models.glob("*/training.log")
    epochs = [json.loads(line) | {"job": log.parent.name} for log in logs for line in log.read_text().splitlines()]
    return [{name: epoch[name] for name in ("job", "epoch", "attempt", "pid")} for epoch in epochs]


def _insert(conn: Connection, table: str, rows: list[dict[str, object]]) -> None:
    if rows:
        names = tuple(rows[0])
        values = ", ".join(f":{name}" for name in names)
        conn.execute(text(f"insert into demo.{table} ({', '.join(names)}) values ({values})"), rows)


def _judge(conn: Connection, promise: Promise) -> Verdict:
    found = tuple(str(row[0]) for row in conn.execute(text(promise.broken)))
    return Verdict(promise.says, int(conn.scalar(text(promise.examined)) or 0), found)


def _effects_once(outside_log: Path) -> Verdict:
    lines = [json.loads(line) for line in outside_log.read_text().splitlines()]
    counted = Counter(f"{line['event']} {line['kind']} {line['key']}" for line in lines)
    twice = tuple(effect for effect, times in counted.items() if times > 1)
    return Verdict("Nothing outside happened twice: no charge, no refund, no pick, no mail", len(counted), twice)
