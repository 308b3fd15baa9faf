"""``prune``: old runs go.

Owns arguments and output.  Must never decide what may go.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import click
from rich.text import Text

from orchestrator.cli import words
from orchestrator.cli.command import (
    STATE_STYLES,
    Command,
    as_json,
    client_of,
    console,
    full_name,
    grid,
    print_json,
    reading,
)
from orchestrator.errors import UsageError
from orchestrator.machine.states import TERMINAL, RunState
from orchestrator.retention import Pruned, age


class Age(click.ParamType[timedelta]):
    """An age such as 90d."""

    name = "AGE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Return the age.  Raises: BadParameter, which exits with code 2."""
        try:
            return age(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


_ENDED = [state.value for state in RunState if state in TERMINAL]  # of a member click would take the name, in capitals


@click.command(cls=Command)
@click.option("--older-than", type=Age(), required=True, help="Only runs that ended so long ago: 90d, 12h, 2w.")
@click.option("--state", "states", multiple=True, type=click.Choice(_ENDED), help="Only these; repeatable.")
@click.option("--saga", "saga_name", default="", metavar="NAME", help="Only runs of this saga.")
@click.option("--limit", type=click.IntRange(1), help="At most so many, the oldest.")
@click.option("--archive", metavar="FOLDER", help="Write them to a file there first, as JSON Lines.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@as_json
@click.pass_context
def prune(
    ctx: click.Context, /, older_than: timedelta, saga_name: str, dry_run: bool, json_: bool, **chosen: Any
) -> None:
    """Delete runs that have ended, with their journals, children and links.

    What has not ended stays, and all that belongs to it. Ids stay taken: starting a pruned id again is refused.
    """
    with reading(ctx):
        pass
    told = client_of(ctx).prune(older_than, saga=full_name(saga_name), dry_run=dry_run, **chosen)
    if json_:
        print_json({**told.as_json(), "dry_run": dry_run})
    else:
        _print(ctx, told, dry_run)


def _print(ctx: click.Context, told: Pruned, dry_run: bool) -> None:
    if told.total:
        table = grid("SAGA", "STATE", "RUNS")
        for (saga, state), many in sorted(told.gone.items()):
            table.add_row(saga, Text(state, style=STATE_STYLES.get(state, "")), str(many))
        console(ctx).print(table)
    if dry_run:
        click.echo(f"{words.many(told.total, 'run', 'runs')} would go.")
    else:
        click.echo(f"{words.many(told.total, 'run is', 'runs are')} gone.")
    if told.kept:
        kept = words.many(told.kept, "was kept: it belongs", "were kept: they belong")
        click.echo(f"{kept} to a run that has not ended, or not all that was asked for is done.")
    if told.archive:
        click.echo(f"Written to {told.archive}")
