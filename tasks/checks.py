"""Owns what must be true between the runs of the sagas, the ledger and the outside world; must never change anything.

Run by ``saga reconcile``, at night by beat. They need the ledger in the database of the runs. The card provider's
statement of wallet payments is compared as well, if CARD_STATEMENT names the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator import reconcile
from orchestrator.reconcile import Looked
from tasks.outside import client


def _ended(saga: str, money: str = "money") -> str:
    """A page of the ended runs of a saga, with the reference under which it posted."""
    return f"""
    SELECT id, state, input #>> '{{request,id}}' AS reference, input #>> '{{request,source}}' AS source,
        (input #>> '{{request,{money},amount}}')::numeric AS amount,
        input #>> '{{request,{money},currency}}' AS currency
    FROM orchestrator.runs WHERE saga = '{saga}' AND finished_at IS NOT NULL AND state <> 'continued'
        AND id > %(after)s ORDER BY id LIMIT %(limit)s
    """


def _standing(kind: str) -> str:
    """Postings of a kind that nothing has reversed."""
    return f"""(SELECT count(*) FROM ledger.postings p WHERE p.reference = r.reference AND p.kind = '{kind}'
        AND NOT EXISTS (SELECT FROM ledger.postings u WHERE u.reverses = p.id))"""


reconcile.check(
    "a transfer that is completed has moved its money once, one that is not has moved none",
    sql=f"""
    SELECT id AS key, amount, currency, CASE
        WHEN state = 'completed' AND credits <> 1 THEN 'completed, and credited ' || credits || ' times'
        WHEN state = 'completed' AND debits <> 1 AND source NOT LIKE 'iban:%%'
            THEN 'completed, and debited ' || debits || ' times'
        WHEN state NOT IN ('completed', 'terminated') AND debits + credits > 0
            THEN state || ', and ' || debits || ' debits and ' || credits || ' credits stand'
    END AS problem
    FROM (SELECT r.*, {_standing("debit")} AS debits, {_standing("credit")} AS credits
          FROM ({_ended("sagas.transfer.transfer")}) AS r) AS t ORDER BY id
    """,
)

reconcile.check(
    "a payment that is completed is settled once, one that is compensated is not settled and holds nothing",
    sql=f"""
    SELECT id AS key, amount, currency, CASE
        WHEN state = 'completed' AND settled <> 1 THEN 'completed, and settled ' || settled || ' times'
        WHEN state NOT IN ('completed', 'terminated') AND settled > 0 THEN state || ', and settled'
        WHEN state NOT IN ('completed', 'terminated') AND held > 0 THEN state || ', and its money is still held'
    END AS problem
    FROM (SELECT r.*, {_standing("settle")} AS settled, {_standing("hold")} AS held
          FROM ({_ended("sagas.payment.payment")}) AS r) AS t ORDER BY id
    """,
)

if "CARD_STATEMENT" in os.environ:
    reconcile.statement(
        "every card charge of a wallet payment is on the provider's statement",
        file=lambda: Path(os.environ["CARD_STATEMENT"]),
        columns={"key": "Reference", "amount": "Amount", "currency": "Currency"},
        sql="""
        SELECT p.reference AS key, sum(e.amount) AS amount, min(e.currency) AS currency
        FROM (SELECT DISTINCT reference FROM ledger.postings
              WHERE kind = 'settle' AND reference > %(after)s ORDER BY reference LIMIT %(limit)s) AS r
        JOIN ledger.postings p ON p.reference = r.reference AND p.kind = 'settle'
        JOIN ledger.entries e ON e.posting_id = p.id AND e.amount > 0
        GROUP BY p.reference ORDER BY p.reference
        """,
    )


@reconcile.check("an order that is completed has its charge and its goods, one that is not has neither")
def orders(connection: Any, after: str, limit: int) -> Iterator[Looked]:
    """Ask the provider and the warehouse. Raises: httpx.HTTPError."""
    query = _ended("sagas.order.order", money="total")
    for run_id, state, reference, _, amount, currency in connection.execute(query, {"after": after, "limit": limit}):
        there = [what for what in ("charges", "picks") if client.find(what, reference) is not None]
        wrong = state != "terminated" and len(there) != (2 if state == "completed" else 0)
        yield Looked(
            run_id, f"{state}, and has {' and '.join(there) or 'nothing'}" if wrong else None, amount, currency
        )


reconcile.check(
    "a training that is completed has deployed its model, one that is not has deployed none",
    sql="""
    SELECT r.id AS key, CASE
        WHEN r.state = 'completed' AND d.model IS DISTINCT FROM r.output ->> 'model'
            THEN 'completed, and deployed ' || coalesce(d.model, 'nothing')
        WHEN r.state NOT IN ('completed', 'terminated') THEN r.state || ', and deployed ' || d.model
    END AS problem
    FROM (SELECT * FROM orchestrator.runs WHERE saga = 'sagas.training.training' AND finished_at IS NOT NULL
          AND id > %(after)s ORDER BY id LIMIT %(limit)s) AS r
    LEFT JOIN models.deployments d ON d.job = r.input #>> '{job,id}'
    ORDER BY r.id
    """,
)

reconcile.check(
    "a transaction that was synced is posted once if it is booked, and else not at all",
    sql="""
    SELECT t.id AS key, t.amount, 'EUR' AS currency, CASE
        WHEN booked AND posted <> 1 THEN 'booked, and posted ' || posted || ' times'
        WHEN NOT booked AND posted > 0 THEN 'not booked, and posted ' || posted || ' times'
    END AS problem
    FROM (SELECT * FROM bank.transactions WHERE id > %(after)s ORDER BY id LIMIT %(limit)s) AS t
    CROSS JOIN LATERAL (
        SELECT count(*) AS posted FROM ledger.postings p WHERE p.reference = t.id AND p.kind = 'spent'
    ) AS p
    ORDER BY t.id
    """,
)

reconcile.check(
    "a nightly look at the ledger that is completed has its report",
    sql="""
    SELECT r.id AS key, CASE WHEN n.night IS NULL THEN 'completed, and no report' END AS problem
    FROM (SELECT id FROM orchestrator.runs WHERE saga = 'sagas.reconciliation.reconciliation' AND state = 'completed'
          AND id > %(after)s ORDER BY id LIMIT %(limit)s) AS r
    LEFT JOIN reconciliation.reports n ON n.night = r.id
    ORDER BY r.id
    """,
)

reconcile.check(
    "an onboarding that is completed has an active customer with accounts, one that is not has left nothing",
    sql="""
    SELECT r.id AS key, CASE
        WHEN r.state = 'completed' AND c.status IS DISTINCT FROM 'active' THEN 'completed, and no active customer'
        WHEN r.state = 'completed' AND accounts <> jsonb_array_length(r.output -> 'accounts')
            THEN 'completed, and has ' || accounts || ' accounts'
        WHEN r.state NOT IN ('completed', 'terminated') AND accounts > 0 THEN r.state || ', and has accounts'
    END AS problem
    FROM (SELECT * FROM orchestrator.runs WHERE saga = 'sagas.onboarding.onboarding' AND finished_at IS NOT NULL
          AND id > %(after)s ORDER BY id LIMIT %(limit)s) AS r
    LEFT JOIN customers.profiles c ON c.id = r.input #>> '{signup,id}'
    CROSS JOIN LATERAL (
        SELECT count(*) AS accounts FROM ledger.accounts a
        WHERE starts_with(a.id, 'customer:' || (r.input #>> '{signup,id}') || ':')
    ) AS has
    ORDER BY r.id
    """,
)

reconcile.check(
    "a posting has two entries of one currency that sum to zero",
    sql="""
    SELECT p.id::text AS key, amount, currency, CASE
        WHEN entries <> 2 THEN 'has ' || entries || ' entries'
        WHEN currencies <> 1 THEN 'is in ' || currencies || ' currencies'
        WHEN total <> 0 THEN 'its entries sum to ' || total
    END AS problem
    FROM (SELECT id FROM ledger.postings WHERE id > coalesce(nullif(%(after)s, '')::bigint, 0)
          ORDER BY id LIMIT %(limit)s) AS p
    CROSS JOIN LATERAL (
        SELECT count(*) AS entries, count(DISTINCT e.currency) AS currencies, sum(e.amount) AS total,
            max(e.amount) AS amount, min(e.currency) AS currency
        FROM ledger.entries e WHERE e.posting_id = p.id
    ) AS e
    ORDER BY p.id
    """,
)

reconcile.check(
    "a customer's account carries what its entries say",
    sql="""
    SELECT a.id AS key, a.balance AS amount, a.currency, CASE
        WHEN a.balance <> booked THEN 'carries ' || a.balance || ', its entries say ' || booked
    END AS problem
    FROM (SELECT * FROM ledger.accounts WHERE kind = 'customer' AND id > %(after)s ORDER BY id LIMIT %(limit)s) AS a
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(e.amount), 0) AS booked FROM ledger.entries e WHERE e.account_id = a.id
    ) AS e
    ORDER BY a.id
    """,
)
