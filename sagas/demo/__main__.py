"""Runs the demonstration; the exit code is 0 only if every promise held."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from sqlalchemy import Engine, text

from orchestrator import OrchestratorError
from sagas.demo import promises, report, stage, workload
from sagas.demo.feed import Feed
from sagas.demo.report import Outage
from sagas.demo.stage import Stage, WorkerDiedError
from sagas.demo.watch import Tally, Watch
from sagas.demo.workload import PARKED, Job
from tasks import provider, warehouse

SEED = 20261121
KILL_AFTER_SHARE = 0.35
DOWN_SECONDS = 1.5
LONGEST_SECONDS = 45.0


def main() -> int:
    """Set the stage, let the runs run, judge them."""
    parser = argparse.ArgumentParser(prog="python -m sagas.demo", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path(".dev/demo"), help="servers, logs; thrown away each time")
    data_dir = parser.parse_args().data_dir
    console = Console(highlight=False)
    console.print("\n[bold]Durable sagas on Celery and Postgres[/]")
    console.print(
        "[dim]Transfers, orders and payments on a double-entry ledger. Some are refused, some fail, some\n"
        "time out after their effect, and the worker is killed in the middle. Each must end completed\n"
        "or undone, never in between.[/]\n"
    )
    try:
        with stage.opened(data_dir, functools.partial(_tell, console)) as on:
            return 0 if _perform(console, on) else 1
    except (WorkerDiedError, OrchestratorError) as error:
        console.print(f"\n[bold red]The demonstration ends here.[/] {escape(str(error))}\n")
        return 1


def _tell(console: Console, what: str, details: str) -> None:
    console.print(f"  [green]✓[/]  {what} [dim]({details})[/]")


def _perform(console: Console, on: Stage) -> bool:
    jobs = workload.jobs(SEED)
    with on.engine.begin() as conn:
        conn.execute(text(promises.JOBS))
    ended, outage = _let_them_run(console, on, jobs)
    report.ledger(console, on.engine)
    report.stories(console, on.engine, jobs)
    undone = _one(on.engine, jobs, warehouse.SLOW_SKU, "compensated")
    if undone is not None:
        report.command(console, f"One run undone, {undone}", "history", undone)
    parked = _one(on.engine, jobs, provider.REFUND_DOWN, "parked")
    if parked is not None:
        report.command(console, f"One run that needs a person, {parked}", "explain", parked)
    if not ended:
        for stuck in _stuck(on.engine):
            report.command(console, f"Why {stuck} does not move", "explain", stuck)
    report.speed(console, on.engine, outage)
    kept = report.verdicts(console, promises.judge(on.engine, on.effect_log))
    _close(console, kept and ended, len(jobs))
    return kept and ended


def _let_them_run(console: Console, on: Stage, jobs: Sequence[Job]) -> tuple[bool, Outage]:
    """Start the jobs, kill the worker, start it again; return whether all ended, and the outage."""
    console.print()
    feed = Feed(on.engine, jobs, workload.STARTS_PER_SECOND)

    def look_after() -> None:
        feed.require_well()
        on.worker.require_alive()

    with Watch(console, on.engine, len(jobs), look_after) as watch:
        feed.start()
        moved = watch.until(lambda tally: tally.ended >= KILL_AFTER_SHARE * len(jobs), LONGEST_SECONDS)
        killed_at = datetime.now(UTC)
        on.worker.kill()
        dead_since = time.monotonic()
        left = Tally.read(on.engine)
        watch.say("[red]✗[/]", f"The worker is killed with SIGKILL, {left.under_way} runs under way; starts go on")
        watch.until(lambda _: time.monotonic() - dead_since >= DOWN_SECONDS, LONGEST_SECONDS)
        on.worker.start()
        outage = Outage(killed_at, datetime.now(UTC))
        watch.say("[green]✓[/]", f"The worker is started again, {watch.tally.under_way} runs wait for it")
        ended = watch.until(lambda tally: _over(tally, feed, jobs), LONGEST_SECONDS)
        if ended:
            watch.say("[green]✓[/]", "Every run has ended, or is parked as planned")
        else:
            watch.say("[red]✗[/]", f"{watch.tally.under_way} runs have not ended; giving up")
        if not moved:
            watch.say("[red]✗[/]", f"In the first {LONGEST_SECONDS:.0f} s the runs hardly moved")
    return moved and ended, outage


def _over(tally: Tally, feed: Feed, jobs: Sequence[Job]) -> bool:
    planned = sum(1 for job in jobs if job.story.ends == PARKED)
    return feed.started == len(jobs) and tally.under_way == 0 and tally.parked >= planned


def _one(engine: Engine, jobs: Sequence[Job], twist: str, state: str) -> str | None:
    wanted = [job.id for job in jobs if job.story.twist == twist]
    query = text("select min(id) from orchestrator.runs where state = :state and id = any(:wanted)")
    with engine.connect() as conn:
        found = conn.scalar(query, {"state": state, "wanted": wanted})
    return None if found is None else str(found)


def _stuck(engine: Engine) -> list[str]:
    query = text("select id from orchestrator.runs where finished_at is null and state <> 'parked' order by id limit 3")
    with engine.connect() as conn:
        return list(conn.scalars(query))


def _close(console: Console, kept: bool, runs: int) -> None:
    console.print()
    if kept:
        console.print(f"[bold green]Every promise held[/], over {runs} runs and one killed worker.\n")
    else:
        console.print("[bold red]A promise was broken.[/] The worker's log and the data directory are kept.\n")


if __name__ == "__main__":
    sys.exit(main())
