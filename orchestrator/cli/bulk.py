"""``bulk``: one order for all runs that a filter finds, after saying what it will do.

Owns the options of the filter and the question.  Must never decide which runs an order makes sense for.
"""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

import click
from rich.text import Text

from orchestrator.bulk import ACTIONS, Effects
from orchestrator.cli.command import (
    STATE_STYLES,
    Command,
    as_json,
    client_of,
    console,
    full_name,
    grid,
    print_json,
)
from orchestrator.cli.orders import by_option, reason_option, who
from orchestrator.machine.states import TERMINAL, RunState

_OPEN = [state.value for state in RunState if state not in TERMINAL]
_FILTERS = ("states", "step", "started_after", "started_before")
_SENTENCES = {
    "cancel": "told to stop and to undo what they did",
    "terminate": "told to stop without undoing anything",
    "pause": "paused",
    "resume": "told to go on",
    "retry": "told to try again what is parked",
    "skip": "told to go on without what is parked; undos that are skipped are left undone",
}


class Moment(click.ParamType[datetime]):
    """An instant in ISO 8601; without a time zone it is local time."""

    name = "WHEN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Return the aware instant.  Raises: BadParameter, which exits with code 2."""
        if isinstance(value, datetime):
            return value
        try:
            return datetime.fromisoformat(value).astimezone()
        except (ValueError, OverflowError):
            self.fail(f"{value!r:.80} is no instant; write for example 2026-01-31T08:00", param, ctx)


class Tag(click.ParamType[tuple[str, str]]):
    """``key=value``."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Return key and value.  Raises: BadParameter, which exits with code 2."""
        if isinstance(value, tuple):
            return value
        name, equals, wanted = value.partition("=")
        if not (name and equals):
            self.fail(f"{value!r:.80} is not of the form KEY=VALUE", param, ctx)
        return name, wanted


def _each_once(
    ctx: click.Context, param: click.Parameter, tags: tuple[tuple[str, str], ...]
) -> tuple[tuple[str, str], ...]:
    """Refuse two values for one tag, which no run can have: none of them may be taken for all that was said."""
    for name, value in tags:
        if dict(tags)[name] != value:
            raise click.BadParameter(f"{name} has one value in a run, and cannot be both {value!r} and "
                                     f"{dict(tags)[name]!r}; ask for one after the other", ctx, param)  # fmt: skip
    return tags


where_option = click.option(
    "--where", "tags", multiple=True, type=Tag(), callback=_each_once, help="Only runs with this tag; repeatable."
)


@click.command(cls=Command)
@click.argument("action", type=click.Choice(ACTIONS))
@click.option("--saga", "saga_name", default="", help="Only runs of this saga.")
@click.option("--state", "states", multiple=True, type=click.Choice(_OPEN), metavar="STATE",
              help="Only runs in this state; repeatable.")  # fmt: skip
@click.option("--step", default="", help="Only runs that are parked at this step, or key.")
@click.option("--started-after", type=Moment(), help="Only runs that started then or later.")
@click.option("--started-before", type=Moment(), help="Only runs that started before.")
@where_option
@click.option("--all", "everything", is_flag=True, help="Every run that has not ended, without any filter.")
@click.option("--limit", type=click.IntRange(1), help="At most so many, the oldest.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@reason_option
@by_option
@as_json
@click.pass_context
def bulk(
    ctx: click.Context, /, action: str, saga_name: str, tags: tuple[tuple[str, str], ...], dry_run: bool, yes: bool,
    reason: str, by: str, json_: bool, everything: bool, **chosen: Any,
) -> None:  # fmt: skip
    """Order ACTION for all runs that the filter finds.

    It first says how many there are, and asks; where there is no terminal, say --yes. Only runs that have not ended are
    looked at.

    \b
      saga bulk retry --saga checkout --step charge --dry-run
    """
    client = client_of(ctx)
    if not (everything or saga_name or tags or any(chosen.get(name) for name in _FILTERS)):
        raise click.UsageError("this would take every run that has not ended: say --all if that is meant, or a filter")
    chosen |= {"saga": full_name(saga_name), "tags": dict(tags), "everything": everything}
    effects = client.bulk(action, dry_run=True, **chosen)
    if not json_:
        _print(ctx, effects)
    if not dry_run and effects.told:
        if not yes:
            _ask(effects)
        effects = client.bulk(action, by=who(by), reason=reason, **chosen)
        if not json_:
            click.echo(f"{effects.told} runs were {_SENTENCES[action]}.")
    if json_:
        print_json({**effects.as_json(), "dry_run": dry_run})


def _ask(effects: Effects) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("there is nobody to ask: say --yes, or look first with --dry-run")
    click.confirm(f"Shall {effects.told} runs be {_SENTENCES[effects.action]}?", abort=True)


def _print(ctx: click.Context, effects: Effects) -> None:
    if not effects.total:
        click.echo("There are no such runs.")
        return
    table = grid("SAGA", "STATE", "RUNS")
    for (saga, state), many in sorted(effects.found.items()):
        table.add_row(saga, Text(state, style=STATE_STYLES.get(state, "")), str(many))
    console(ctx).print(table)
    more = "" if effects.told <= len(effects.examples) else " ..."
    examples = f" ({', '.join(effects.examples)}{more})" if effects.examples else ""
    click.echo(f"\n{effects.told} of {effects.total} runs can be {_SENTENCES[effects.action]}{examples}.")
    for why, many in effects.refused.items():
        click.echo(f"{many} cannot: {why}.")
