"""``history``: a run's journal as a timeline."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from orchestrator.cli import words
from orchestrator.cli.command import Command, as_json, console, print_json, reading, run_argument, run_of
from orchestrator.cli.timeline import Event, events, took
from orchestrator.errors import as_typed
from orchestrator.machine.journal import encode
from orchestrator.machine.states import TERMINAL
from orchestrator.store import runs

_ROOM = 160  # characters of a value, unless --full


@click.command(cls=Command)
@run_argument
@click.option("--traceback", is_flag=True, help="Show the traceback of every error.")
@click.option("--full", is_flag=True, help="Show arguments, results and errors whole.")
@as_json
@click.pass_context
def history(ctx: click.Context, run_id: str, traceback: bool, full: bool, json_: bool) -> None:
    """Tell what happened to RUN: steps with their input, output and attempts, errors, undo, operators.

    Times count from the start of the run. With --json: one object per entry of the journal.
    """
    with reading(ctx) as connection:
        run = run_of(connection, run_id)
        rows = runs.history(connection, run_id)
        now = runs.inbox(connection, run_id).now
    found = events(rows, 0 if full else _ROOM)
    if json_:
        print_json([_json(event) for event in found])
        return
    out = console(ctx)
    out.print(_heading(run, full, now))
    for part in _parts(found, run["started_at"], traceback):
        out.print(part, soft_wrap=isinstance(part, Text))
    if run["state"] not in TERMINAL:
        click.echo(f"\nIt is {run['state']}; what it waits for: saga explain {as_typed(run_id)}")


def _heading(run: dict[str, Any], full: bool, now: datetime) -> Text:
    text = Text(run["saga"], style="bold")
    text.append(f" version {run['version']}, run {run['id']}\n", style="not bold")
    call = words.arguments(run["input"], 0 if full else _ROOM)
    began = "started" if run["started_at"] <= (run["finished_at"] or now) else "its start was set for"
    text.append(f"{began} {words.moment(run['started_at'])} with ({call})\n", style="not bold")
    return text


def _parts(found: list[Event], started: datetime, traceback: bool) -> Iterator[Table | Text]:
    """Yield tables of events and, between them, tracebacks, which are not folded."""
    offsets = [_offset(event.at - started) for event in found]
    width = max(map(len, offsets), default=0)
    table, shown = _new_table(width), -1
    for event, offset in zip(found, offsets, strict=True):
        table.add_row(
            "" if event.seq == shown else offset, *(Text(t, style=event.style) for t in (event.mark, event.text))
        )
        shown = event.seq
        for line in event.details:
            table.add_row("", "", Text(f"  {line}", style="dim"))
        if traceback and event.error and event.error.get("traceback"):
            yield table
            yield Text(_indented(str(event.error["traceback"]), width + 5), style="dim")
            table = _new_table(width)
    yield table


def _new_table(width: int) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(justify="right", style="dim", no_wrap=True, width=width)
    table.add_column(no_wrap=True, width=1)
    table.add_column(overflow="fold")
    return table


def _indented(text: str, by: int) -> str:
    return "\n".join(" " * by + line for line in text.rstrip().splitlines())


def _offset(length: timedelta) -> str:
    seconds = length.total_seconds()
    sign = "-" if seconds <= -0.0005 else "+"  # what it was told before its start
    return f"{sign}{abs(seconds):.3f} s" if abs(seconds) < 60 else f"{sign}{words.duration(length)}"


def _json(event: Event) -> dict[str, Any]:
    length = took(event.entry, event.at)
    seconds = {"seconds": length.total_seconds()} if length is not None else {}
    return {"seq": event.seq, "at": event.at, "kind": event.entry.tag, "text": event.text, **seconds,
            **{name: value for name, value in encode(event.entry).items() if name != "e"}}  # fmt: skip
