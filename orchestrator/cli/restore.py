"""``doctor --after-restore``: what a restore of the database leaves to be done, and what to do next.

Owns the options and the words.  Must never decide what becomes of a run or a step.
"""

from __future__ import annotations

from collections.abc import Callable

import click
from rich.text import Text

from orchestrator.cli import words
from orchestrator.cli.command import console, grid, print_json, reading
from orchestrator.cli.orders import who
from orchestrator.engine import restore as engine
from orchestrator.engine.restore import Aftermath
from orchestrator.errors import OrchestratorError
from orchestrator.store import restores

_SHOWN = 20
_MEANS = {
    "probed": "the provider is asked, and what was not done is done",
    "parked": "a person must say whether it was done",
    "repeated": "read-only, or rolled back with the database",
    "undone": "the run goes back; undos are done again",
}
_OPTIONS = (
    click.option("--after-restore", is_flag=True,
                 help="The database was set back: let no run repeat what it may have done. Stop all workers first."),
    click.option("--dry-run", is_flag=True, help="With --after-restore: only say what would be done."),
    click.option("--snapshot", is_flag=True,
                 help="With --after-restore: the files were set back as a whole, or made anew from a template on "
                      "the same server, which leaves no trace."),
    click.option("--nothing-lost", is_flag=True,
                 help="The database was moved or failed over, and every commit is there."),
)  # fmt: skip


def options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options about a restore to a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def look_after(
    ctx: click.Context, by: str, json_: bool, *, after_restore: bool, dry_run: bool, snapshot: bool, nothing_lost: bool
) -> int:
    """Do what was said about a restore; returns the exit code: 1 if something waits for a person.

    Raises: UsageError for options that contradict each other.
    """
    if nothing_lost == after_restore or (nothing_lost and (dry_run or snapshot)):
        raise click.UsageError("say --after-restore (with or without --dry-run, --snapshot), or --nothing-lost")
    try:
        if nothing_lost:
            return _acknowledge(ctx, json_)
        aftermath = _aftermath(ctx, who(by), dry_run, snapshot)
    except OrchestratorError as error:
        raise _Broken(str(error)) from None
    if json_:
        print_json({"dry_run": dry_run, "needed": aftermath.needed or snapshot, **aftermath.found})
    else:
        _print(ctx, aftermath, dry_run)
    return 1 if _count(aftermath, "parked") else 0


class _Broken(click.ClickException):
    """Refused, or there is no database: what is broken stays so."""

    exit_code = 2


def _acknowledge(ctx: click.Context, json_: bool) -> int:
    with reading(ctx) as connection:
        restores.acknowledge(connection)
    if json_:
        print_json({"acknowledged": True})
    else:
        click.echo("Noted: this database goes on where it is, and nothing was lost.")
    return 0


def _aftermath(ctx: click.Context, by: str, dry_run: bool, snapshot: bool) -> Aftermath:
    with reading(ctx) as connection:
        if dry_run:
            return engine.look_ahead(connection)
        return engine.look_after(connection, by, always=snapshot)


def _count(aftermath: Aftermath, fate: str) -> int:
    return sum(counts.get(fate, 0) for counts in aftermath.found["steps"].values())


def _print(ctx: click.Context, aftermath: Aftermath, dry_run: bool) -> None:
    if not aftermath.needed:
        click.echo(
            "Nothing says that this database was restored since it was last looked at, so that nothing was done. If "
            "its files were set back as a whole (a snapshot of the disk), or it was made anew from an older copy on "
            "the same server (a template), say --snapshot too."
        )
        if not dry_run:
            return
    found = aftermath.found
    runs = words.many(found["runs"], "run", "runs")
    click.echo(f"{runs} had not ended at that moment; each {'would be' if dry_run else 'was'} told.")
    if found["steps"]:
        table = grid("STEP", "WHAT", "HOW MANY", "")
        for task, counts in sorted(found["steps"].items()):
            for fate, many in sorted(counts.items()):
                table.add_row(task, fate, str(many), Text(_MEANS[fate], style="dim"))
        console(ctx).print(table)
    parked = [item for item in found["listed"] if item["fate"] == "parked"]
    for item in parked[:_SHOWN]:
        click.echo(f"  parked: {item['run']} {item['key']}")
    click.echo(_NEXT_DRY if dry_run else _NEXT)


_NEXT_DRY = "\nNothing was changed. Stop all workers and beats, then say it without --dry-run."
_NEXT = """
Steps that these runs ask for from now on are probed or parked in the same way: they may have been done as well.
Next:
  start the workers
  saga list --state parked            # what waits for a person; then saga explain RUN
  saga bulk retry --step STEP         # for steps whose other side knows their idempotency keys
  saga reconcile                      # what was begun after that moment is in no record here: compare with outside
  saga schedules                      # slots since that moment are caught up; pause a schedule that must not
Runs that were started after that moment are gone: whoever started them starts them again, with the same ids."""
