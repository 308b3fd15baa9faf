"""Owns what is printed when all runs have ended: ledger, stories, commands, speed, verdict."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sqlalchemy import Connection, Engine, text

from sagas.demo import world
from sagas.demo.promises import Verdict
from sagas.demo.story import Act, Job
from tasks.money import MINOR_DIGITS, Currency

POSITIONS = {
    "customers": "customer:%",
    "merchants": "merchant:%",
    "in transit": "house:transit:%",
    "pending": "house:pending:%",
    "at other banks": "house:nostro:%",
    "spent elsewhere": "mirror:%",
    "house equity": "house:equity:%",
}
SHOWN_COUNTEREXAMPLES = 3

LATENCIES = """
    select count(*) as runs, max(finished_at) - min(started_at) as took,
           percentile_cont(0.5) within group (order by finished_at - started_at) as p50,
           percentile_cont(0.95) within group (order by finished_at - started_at) as p95
    from orchestrator.runs where id in (select id from demo.jobs) and
    finished_at < coalesce(cast(:before as timestamptz), 'infinity')
"""
BUSIEST = """
    select count(*) from orchestrator.runs where finished_at is not null and id in (select id from demo.jobs)
    group by date_trunc('second', finished_at) order by 1 desc limit 1
"""


def programme(console: Console, acts: Sequence[Act]) -> None:
    """Print what will be played: each saga with what it does, and where others fall."""
    table = Table(box=None, padding=(0, 2), show_header=False)
    for act in acts:
        table.add_row(f"[bold]{act.name}", f"{act.does}\n[dim]the trap: {act.trap}[/]")
    console.print(table)
    console.print()


def heading(console: Console, title: str) -> None:
    """Print a section's title."""
    console.print()
    console.rule(f"[bold]{title}", align="left", style="dim")


def ledger(console: Console, engine: Engine) -> None:
    """Print the sum over all entries by position and currency; each column must add up to zero."""
    heading(console, "The ledger")
    currencies = tuple(world.OPENING)
    with engine.connect() as conn:
        sums = {name: _sums(conn, pattern) for name, pattern in POSITIONS.items()}
    table = _table("", *currencies)
    for name, by_currency in sums.items():
        table.add_row(name, *(_amount(by_currency.get(currency), currency) for currency in currencies))
    totals = {c: sum((s.get(c, Decimal(0)) for s in sums.values()), Decimal(0)) for c in currencies}
    table.add_row("[bold]sum of all entries", *(f"[bold]{_amount(totals[c], c)}" for c in currencies))
    console.print(table)


def stories(console: Console, engine: Engine, acts: Sequence[Act], jobs: Sequence[Job]) -> None:
    """Print what went in, by kind of request, and how it came out."""
    heading(console, "What went in, and how it ended")
    with engine.connect() as conn:
        states = {row.id: row.state for row in conn.execute(text("select id, state from orchestrator.runs"))}
    counted: dict[tuple[str, str], dict[str, int]] = {}
    for job in jobs:
        ends = counted.setdefault((job.act.name, job.story.says), {})
        state = states.get(job.id, "lost")
        ends[state] = ends.get(state, 0) + 1
    table = Table(box=None, padding=(0, 2))
    for column in ("saga", "request", "ended"):
        table.add_column(column, header_style="dim")
    for act in acts:
        for place, story in enumerate(act.stories):
            ends = counted.get((act.name, story.says), {})
            ended = ", ".join(f"{count} {state}" for state, count in sorted(ends.items()))
            table.add_row(f"[bold]{act.name}" if place == 0 else "", story.says, ended)
    console.print(table)


def command(console: Console, title: str, *arguments: str) -> None:
    """Print what an operator's command says, as anybody can ask it: ``celery -A tasks.app saga ...``."""
    heading(console, title)
    console.print(f"  [dim]$ celery -A tasks.app saga {' '.join(arguments)}[/]")
    width = {"COLUMNS": str(console.width)} | ({"FORCE_COLOR": "1"} if console.is_terminal else {})
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "tasks.app", "saga", *arguments],
        env=os.environ | width,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=30,
    )
    console.file.write(done.stdout)
    console.file.flush()


@dataclass(frozen=True, slots=True)
class Outage:
    """Hold when no worker was up, as aware UTC instants."""

    began_at: datetime
    ended_at: datetime


def speed(console: Console, engine: Engine, outage: Outage, starts_per_second: float) -> None:
    """Print throughput, and latency from start to end of a run, by the database's clock."""
    heading(console, "Speed")
    with engine.connect() as conn:
        every = conn.execute(text(LATENCIES), {"before": None}).one()
        calm = conn.execute(text(LATENCIES), {"before": outage.began_at}).one()
        busiest = conn.scalar(text(BUSIEST)) or 0
    dead = (outage.ended_at - outage.began_at).total_seconds()
    table = _table("", "runs", "median", "p95")
    table.add_row("ended before the kill", str(calm.runs), _span(calm.p50), _span(calm.p95))
    table.add_row(
        f"all, retries and {dead:.1f} s without a worker included",
        str(every.runs),
        _span(every.p50),
        _span(every.p95),
    )
    console.print(table)
    pace = f"{every.runs} runs ended in {every.took.total_seconds():.1f} s, in the busiest second {busiest}"
    console.print(f"  [dim]{pace}; clients started {starts_per_second:.0f} a second.[/]")


def verdicts(console: Console, found: Iterable[Verdict]) -> bool:
    """Print every promise with its verdict; return whether all were kept."""
    heading(console, "The promises")
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column()
    table.add_column()
    table.add_column(justify="right", style="dim")
    kept = True
    for verdict in found:
        kept = kept and verdict.kept
        mark = "[green]ok[/]" if verdict.kept else "[bold red]FAILED[/]"
        table.add_row(mark, verdict.says, f"{verdict.examined} examined")
        for example in verdict.counterexamples[:SHOWN_COUNTEREXAMPLES]:
            table.add_row("", f"[red]{escape(example)}", "")
        if len(verdict.counterexamples) > SHOWN_COUNTEREXAMPLES:
            table.add_row("", f"[red]and {len(verdict.counterexamples) - SHOWN_COUNTEREXAMPLES} more", "")
    console.print(table)
    return kept


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2))
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right", header_style="dim")
    return table


def _sums(conn: Connection, pattern: str) -> dict[str, Decimal]:
    query = "select currency, sum(amount) as total from ledger.entries where account_id like :pattern group by 1"
    return {row.currency: row.total for row in conn.execute(text(query), {"pattern": pattern})}


def _amount(amount: Decimal | None, currency: Currency) -> str:
    return f"{amount:,.{MINOR_DIGITS[currency]}f}" if amount else "0"


def _span(span: timedelta | None) -> str:
    if span is None:
        return "-"
    seconds = span.total_seconds()
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
