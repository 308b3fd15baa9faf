"""``explain``: why a run does not move."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

import click
from rich.text import Text

from orchestrator.cli.command import STATE_STYLES, Command, as_json, console, print_json, reading, run_argument, run_of
from orchestrator.cli.reasons import Case, Reason, reasons
from orchestrator.engine.folding import fold_of
from orchestrator.machine.journal import Attempted, decode_entry
from orchestrator.store import runs
from orchestrator.store.connection import Connection
from orchestrator.store.pauses import pauses_of


@click.command(cls=Command)
@run_argument
@as_json
@click.pass_context
def explain(ctx: click.Context, run_id: str, json_: bool) -> None:
    """Say in words why RUN does not move, and what helps.

    It looks at the run's outstanding work, at what is parked, and at the workers that are running.
    """
    with reading(ctx) as connection:
        case = read_case(connection, run_id)
    found = reasons(case)
    if json_:
        print_json({"id": run_id, "state": case.run["state"], "reasons": [_json(reason) for reason in found]})
        return
    out = console(ctx)
    state = Text(case.run["state"], style=STATE_STYLES.get(case.run["state"], ""))
    out.print(
        Text.assemble(
            "Run ", run_id, " of ", (case.run["saga"], "bold"), f" version {case.run['version']} is ", state, "."
        )
    )
    for reason in found:
        out.print(Text(f"\n{reason.text}"))
        for hint in reason.hints:
            out.print(Text(f"    {hint}", style="dim"), soft_wrap=True)


def read_case(connection: Connection, run_id: str) -> Case:
    """Read all that is known of a run, in one snapshot.  Raises: UnknownRunError."""
    with runs.snapshot(connection):
        run = run_of(connection, run_id)
        rows = runs.history(connection, run_id)
        fold = fold_of(run, rows)
        work = runs.outstanding(connection, run_id)
        ahead = runs.ahead(connection, run_id)
        held = pauses_of(connection, run["saga"], [item.queue for item in work])
        inbox, workers = runs.inbox(connection, run_id), runs.serving(connection)
        return Case(run, fold, work, inbox, workers, held, ahead, last_errors(rows))


def last_errors(rows: Iterable[tuple[int, datetime, list[Any]]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return by key and role with what its last attempt failed; the fold keeps none of undos and probes."""
    decoded = (decode_entry(form) for _, _, entries in rows for form in entries if form.get("e") == Attempted.tag)
    return {(entry.key, entry.role): entry.error for entry in decoded if isinstance(entry, Attempted)}


def _json(reason: Reason) -> dict[str, Any]:
    return {"code": reason.code, "key": reason.key, "text": reason.text, "hints": list(reason.hints)}
