"""``schedules``: what beat fires and when, and orders for it.

Owns arguments and output.  Must never decide what a slot becomes.
"""

from __future__ import annotations

import getpass
from datetime import datetime
from typing import Any

import click
from rich.text import Text

from orchestrator.cli import words
from orchestrator.cli.command import (
    STATE_STYLES,
    Command,
    as_json,
    console,
    grid,
    orchestrator_of,
    print_json,
    reading,
)
from orchestrator.engine.schedules import Decision
from orchestrator.store import runs

name_argument = click.argument("name")
_STYLES = {"started": "green", "sent": "green", "waiting": "yellow", "sending": "yellow", "skipped": "red"}


class _Group(Command, click.Group):
    """A group that is a command as well; its failures are one sentence too."""


@click.group(cls=_Group, invoke_without_command=True)
@click.option("--next", "upcoming", default=1, show_default=True, type=click.IntRange(0, 1000),
              help="Show so many coming slots of each.")  # fmt: skip
@as_json
@click.pass_context
def schedules(ctx: click.Context, upcoming: int, json_: bool) -> None:
    """List what beat fires and when; pause, resume, trigger and backfill it.

    Without a subcommand it lists. Any number of beats may run; one of them leads.
    """
    if ctx.invoked_subcommand is None:
        _list(ctx, upcoming, json_)


def _list(ctx: click.Context, upcoming: int, json_: bool) -> None:
    desk = orchestrator_of(ctx).schedules
    found, leader = desk.listing(upcoming), desk.leader()
    if json_:
        told = {"beat": leader[0], "seen_at": leader[1]} if leader else None
        print_json({"leader": told, "schedules": found})
        return
    if not found:
        click.echo("There are no schedules; entries of app.conf.beat_schedule are shown here.")
        return
    with reading(ctx) as connection:
        now = runs.inbox(connection, "").now
    _print(ctx, found, now)
    if leader is None:
        click.echo("\nNo beat leads, so nothing fires: start one with `celery -A <your app> beat`.")
    else:
        click.echo(f"\nBeat: {leader[0].rpartition(' ')[0]}, seen {words.ago(leader[1], now)}.")


def _print(ctx: click.Context, found: list[dict[str, Any]], now: datetime) -> None:
    table = grid("SCHEDULE", "TASK", "TIMETABLE", "NEXT", "LAST")
    for each in found:
        table.add_row(each["name"], each["task"], each["timetable"], _next(each, now), _last(each, now))
    out = console(ctx)
    out.print(table)
    for each in found:
        if each["problem"]:
            out.print(Text(f"{each['name']!r}: {each['problem']}", style="red"))


def _next(each: dict[str, Any], now: datetime) -> Text:
    if each["paused"]:
        paused = each["paused"]
        reason = f": {paused['reason']}" if paused["reason"] else ""
        return Text(f"paused by {paused['by']}{reason}", style=STATE_STYLES["paused"])
    if each["gone_at"]:
        return Text("not in the code of the beat that leads", style="red")
    lines = [f"{words.moment(slot)} ({words.ago(slot, now)})" for slot in each["next"]]
    return Text("\n".join(lines)) if lines or not each["problem"] else Text("never", style="red")


def _last(each: dict[str, Any], now: datetime) -> Text:
    if not each["last"]:
        return Text("")
    last = each["last"]
    state = "started" if last["state"] == "running" else last["state"]
    more = f", {each['outstanding']} waiting" if each["outstanding"] else ""
    return Text(f"{state} {words.ago(last['slot'], now)}{more}", style=_STYLES.get(state, ""))


# -- orders ------------------------------------------------------------------------------------------------------------
@schedules.command(cls=Command)
@name_argument
@click.option("--reason", default="", help="Why; shown in the list.")
@click.option("--by", default="", help="Who decides; the name of this account by default.")
@as_json
@click.pass_context
def pause(ctx: click.Context, name: str, reason: str, by: str, json_: bool) -> None:
    """Let the schedule NAME fire nothing until it is resumed. Runs that have started go on."""
    new = orchestrator_of(ctx).schedules.pause(name, reason, by or _account())
    _say(json_, {"name": name, "paused": True, "changed": new}, f"{name} {'is' if new else 'was already'} paused.")


@schedules.command(cls=Command)
@name_argument
@click.option("--catch-up", is_flag=True, help="Treat the slots that passed meanwhile as missed ones.")
@as_json
@click.pass_context
def resume(ctx: click.Context, name: str, catch_up: bool, json_: bool) -> None:
    """Let the schedule NAME fire again, from its next slot on."""
    new = orchestrator_of(ctx).schedules.resume(name, catch_up=catch_up)
    _say(json_, {"name": name, "paused": False, "changed": new}, f"{name} {'fires again' if new else 'is not paused'}.")


@schedules.command(
    cls=Command, exit_codes="Exit codes: 0 it fired, or waits its turn; 1 it was refused; 2 wrong usage."
)
@name_argument
@as_json
@click.pass_context
def trigger(ctx: click.Context, name: str, json_: bool) -> None:
    """Fire the schedule NAME now, even if it is paused. Its overlap policy counts."""
    decision: Decision = orchestrator_of(ctx).schedules.trigger(name)
    _say(json_, {"name": name, **_slot(decision)}, _sentence(decision))
    if decision.state == "skipped":
        ctx.exit(1)


@schedules.command(cls=Command)
@name_argument
@click.option("--since", required=True, help="The first instant, ISO 8601 with its zone: 2026-03-01T00:00+01:00.")
@click.option("--until", required=True, help="The last instant; slots that are yet to come are left to beat.")
@as_json
@click.pass_context
def backfill(ctx: click.Context, name: str, since: str, until: str, json_: bool) -> None:
    """Fire the slots of NAME in a range that have not fired, the oldest first.

    With an overlap policy other than `allow` they run one after the other, as long as a beat leads.
    """
    desk = orchestrator_of(ctx).schedules
    decisions: list[Decision] = desk.backfill(name, _instant("--since", since), _instant("--until", until))
    if json_:
        print_json({"name": name, "slots": [_slot(each) for each in decisions]})
        return
    for each in decisions:
        click.echo(_sentence(each))
    if not decisions:
        click.echo("There is no slot in that time that has not fired.")


def _instant(option: str, text: str) -> datetime:
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        instant = datetime.min
    if instant.tzinfo is None:
        raise click.UsageError(
            f"{option} must be an instant with its zone, such as 2026-03-01T00:00+01:00, not {text!r}"
        )
    return instant


def _account() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # an account without a name, as containers have
        return ""


def _slot(decision: Decision) -> dict[str, Any]:
    return {
        "slot": decision.slot, "state": decision.state, "id": decision.run_id, "because": decision.because,
    }  # fmt: skip


def _sentence(decision: Decision) -> str:
    because = f": {decision.because}" if decision.because else ""
    return f"{words.moment(decision.slot)}  {decision.state}{because}  {decision.run_id}"


def _say(json_: bool, told: dict[str, Any], sentence: str) -> None:
    if json_:
        print_json(told)
    else:
        click.echo(sentence)
