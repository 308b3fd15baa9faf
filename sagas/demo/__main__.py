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
from sagas.demo import promises, report, stage
from sagas.demo.acts import ACTS, jobs_of
from sagas.demo.feed import Feed
from sagas.demo.report import Outage
from sagas.demo.stage import Stage, WorkerDiedError
from sagas.demo.story import PARKED, Act, Job
from sagas.demo.watch import Tally, Watch

SEED = 20261121
STARTS_PER_SECOND = 75.0
KILL_AFTER_SHARE = 0.35
KILL_NOT_BEFORE_SECONDS = 2.0
MIDDLE = (0.3, 0.6)  # of a long job
DOWN_SECONDS = 1.5
LONGEST_SECONDS = 120.0  # a multiple of what it takes; for machines that have other work
SHOWN_AMONG_ALL = ("order", "training")  # the acts of which a run is looked at when all are played


def main() -> int:
    """Set the stage, let the runs run, judge them."""
    parser = argparse.ArgumentParser(prog="python -m sagas.demo", description=__doc__)
    parser.add_argument("saga", nargs="*", help=f"play only these: {', '.join(ACTS)}")
    parser.add_argument("--data-dir", type=Path, default=Path(".dev/demo"), help="servers, logs; thrown away each time")
    options = parser.parse_args()
    unknown = [name for name in options.saga if name not in ACTS]
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}; choose from {', '.join(ACTS)}")
    acts = [act for act in ACTS.values() if not options.saga or act.name in options.saga]
    console = Console(highlight=False)
    console.print("\n[bold]Durable sagas on Celery and Postgres[/]")
    console.print(
        "[dim]Each saga below is an async function whose steps are Celery tasks. Many of its runs are started now.\n"
        "Some are refused, some fail, some get no answer from outside, and the worker is killed in the middle.\n"
        "Each must end completed or undone, never in between.[/]\n"
    )
    report.programme(console, acts)
    try:
        with stage.opened(options.data_dir, functools.partial(_tell, console)) as on:
            return 0 if _perform(console, on, acts) else 1
    except (WorkerDiedError, OrchestratorError) as error:
        console.print(f"\n[bold red]The demonstration ends here.[/] {escape(str(error))}\n")
        return 1


def _tell(console: Console, what: str, details: str) -> None:
    console.print(f"  [green]✓[/]  {what} [dim]({details})[/]")


def _perform(console: Console, on: Stage, acts: Sequence[Act]) -> bool:
    jobs = jobs_of(acts, SEED)
    ended, outage = _let_them_run(console, on, acts, jobs)
    if any(job.money for job in jobs):
        report.ledger(console, on.engine)
    report.stories(console, on.engine, acts, jobs)
    _look_closer(console, on, acts, jobs)
    if not ended:
        for stuck in _stuck(on.engine):
            report.command(console, f"Why {stuck} does not move", "explain", stuck)
    report.speed(console, on.engine, outage, STARTS_PER_SECOND)
    found = promises.judge(on.engine, acts, on.outside.url, on.outside_log, on.models)
    kept = report.verdicts(console, found)
    _close(console, kept and ended, len(jobs))
    return kept and ended


def _look_closer(console: Console, on: Stage, acts: Sequence[Act], jobs: Sequence[Job]) -> None:
    """Show a few runs as an operator sees them."""
    for act in acts:
        for shown in act.shown:
            found = _one(on.engine, act, jobs, shown.twist, shown.state)
            if found is not None and (len(acts) == 1 or act.name in SHOWN_AMONG_ALL):
                report.command(console, f"{shown.title}, {found}", shown.command, found)


def _let_them_run(console: Console, on: Stage, acts: Sequence[Act], jobs: Sequence[Job]) -> tuple[bool, Outage]:
    """Start the jobs, kill the worker, start it again; return whether all ended, and the outage."""
    console.print()
    feed = Feed(on.engine, jobs, STARTS_PER_SECOND)

    def look_after() -> None:
        feed.require_well()
        on.worker.require_alive()

    with Watch(console, on.engine, [act.name for act in acts], len(jobs), look_after) as watch:
        feed.start()
        moved = watch.until(lambda tally: _is_in_the_middle(tally, watch, acts, jobs), LONGEST_SECONDS)
        killed_at = datetime.now(UTC)
        on.worker.kill()
        dead_since = time.monotonic()
        left = Tally.read(on.engine)
        watch.say("[red]✗[/]", f"The worker is killed with SIGKILL, {left.under_way} runs under way; starts go on")
        watch.until(lambda _: time.monotonic() - dead_since >= DOWN_SECONDS, LONGEST_SECONDS)
        on.worker.start()
        watch.say(" ", "A new worker is started")
        watch.until(lambda _: on.worker.is_ready, LONGEST_SECONDS)
        outage = Outage(killed_at, datetime.now(UTC))
        watch.say("[green]✓[/]", f"The new worker is up, {watch.tally.under_way} runs wait for it")
        ended = watch.until(lambda tally: _over(tally, feed, jobs), LONGEST_SECONDS)
        if ended:
            watch.say("[green]✓[/]", "Every run has ended, or is parked as planned")
        else:
            watch.say("[red]✗[/]", f"{watch.tally.under_way} runs have not ended; giving up")
        if not moved:
            watch.say("[red]✗[/]", f"In the first {LONGEST_SECONDS:.0f} s the runs hardly moved")
    return moved and ended, outage


def _is_in_the_middle(tally: Tally, watch: Watch, acts: Sequence[Act], jobs: Sequence[Job]) -> bool:
    """Tell whether a good part has ended and every long job is in its middle, or about to leave it."""
    far = [act.middle() for act in acts if act.middle is not None]
    good_part = tally.ended >= KILL_AFTER_SHARE * len(jobs) and watch.elapsed_seconds >= KILL_NOT_BEFORE_SECONDS
    if not far:
        return good_part
    return min(far) >= MIDDLE[0] and (good_part or max(far) >= MIDDLE[1])


def _over(tally: Tally, feed: Feed, jobs: Sequence[Job]) -> bool:
    planned = sum(1 for job in jobs if job.story.ends == PARKED)
    return feed.started == len(jobs) and tally.under_way == 0 and tally.parked >= planned


def _one(engine: Engine, act: Act, jobs: Sequence[Job], twist: str, state: str) -> str | None:
    wanted = [job.id for job in jobs if job.act is act and job.story.twist == twist]
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
