"""``migrate``, ``start``, ``list`` and ``show``."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from orchestrator.cli import words
from orchestrator.cli.bulk import where_option
from orchestrator.cli.command import (
    STATE_STYLES,
    Command,
    JsonType,
    as_json,
    client_of,
    console,
    full_name,
    grid,
    orchestrator_of,
    print_json,
    reading,
    run_argument,
    run_of,
    saga_named,
)
from orchestrator.cli.example import example_call
from orchestrator.errors import PayloadError, SagaFailed, as_typed
from orchestrator.machine.states import TERMINAL, RunState
from orchestrator.result import SagaResult
from orchestrator.saga import Saga
from orchestrator.store import filters, runs
from orchestrator.store import migrate as migrate_schema
from orchestrator.store.gates import LINE
from orchestrator.store.runs import Outstanding


@click.command(cls=Command)
@as_json
@click.pass_context
def migrate(ctx: click.Context, json_: bool) -> None:
    """Create the database schema, or bring it up to this release.

    Safe to run several times, and from several places at once.
    """
    applied = migrate_schema(orchestrator_of(ctx).settings.dsn)
    if json_:
        print_json({"applied": applied})
    elif applied:
        click.echo(f"The orchestrator schema was brought up to date; applied: {', '.join(applied)}.")
    else:
        click.echo("The orchestrator schema is up to date.")


# -- start -------------------------------------------------------------------------------------------------------------
@click.command(
    cls=Command,
    exit_codes="Exit codes: 0 started (with --wait: and completed); 1 refused, or with --wait failed or not finished "
    "in time; 2 wrong usage, such as arguments that do not fit the saga.",
)
@click.argument("name")
@click.argument("args", type=JsonType(list, '["order-42", 3]'), required=False, metavar="[ARGS]")
@click.option("--kwargs", type=JsonType(dict, '{"order": 42}'), help="Keyword arguments, a JSON object.")
@click.option("--id", "run_id", help="The run id. Starting the same id with the same input again changes nothing.")
@click.option("--countdown", type=float, metavar="SECONDS", help="Start that much later.")
@click.option("--priority", type=click.IntRange(0, 9), help="Higher first.")
@click.option(
    "--wait", type=click.FloatRange(min=0), metavar="SECONDS", help="Wait for the run to end and print its result."
)
@as_json
@click.pass_context
def start(
    ctx: click.Context,
    name: str,
    args: list[Any] | None,
    kwargs: dict[str, Any] | None,
    run_id: str | None,
    countdown: float | None,
    priority: int | None,
    wait: float | None,
    json_: bool,
) -> None:
    """Start a run of saga NAME and print its id.

    NAME is the saga's full name, or the last part of it. ARGS is a JSON array of its arguments:

    \b
      saga start checkout '[{"id": "order-42"}]' --id order-42 --wait 10
    """
    client = client_of(ctx)
    saga = saga_named(name)
    options = {"task_id": run_id, "countdown": countdown, "priority": priority}
    new, _ = client.prepare(saga, _encoded(saga, args, kwargs), {k: v for k, v in options.items() if v is not None})
    result = client.start_encoded(saga, new)
    if wait is None:
        if json_:
            print_json({"id": result.id, "saga": saga.name, "version": saga.options.version})
        else:
            click.echo(result.id)
        return
    if not json_:
        click.echo(result.id)
    _await(ctx, result, wait, json_)


def _encoded(saga: Saga[Any, Any], args: list[Any] | None, kwargs: dict[str, Any] | None) -> Any:
    try:
        return saga.codec.encode_call(tuple(args or ()), kwargs or {}, from_json=True)
    except (PayloadError, TypeError) as error:
        raise click.UsageError(f"{error}\nFor example: saga start {saga.name} '{example_call(saga)}'") from None


def _await(ctx: click.Context, result: SagaResult, seconds: float, json_: bool) -> None:
    try:
        result.get(timeout=seconds)
    except TimeoutError as error:
        raise click.ClickException(str(error)) from None
    except SagaFailed:
        if not json_:
            raise
    outcome = client_of(ctx).outcome(result.id)
    if json_:
        print_json({"id": result.id, "state": outcome.state, "output": outcome.output, "error": outcome.error,
                    "left": outcome.left})  # fmt: skip
    else:
        click.echo(f"{outcome.state}: {words.value(outcome.output)}")
    if outcome.state != RunState.COMPLETED:
        ctx.exit(1)


_STATES = [state.value for state in RunState]


# -- list --------------------------------------------------------------------------------------------------------------
@click.command(name="list", cls=Command)
@click.option("--state", "states", multiple=True, type=click.Choice(_STATES), metavar="STATE",
              help="Only runs in this state, such as parked; repeatable.")  # fmt: skip
@click.option("--saga", "saga_name", default="", help="Only runs of this saga.")
@where_option
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000), help="At most so many.")
@as_json
@click.pass_context
def list_(
    ctx: click.Context, states: tuple[str, ...], saga_name: str, tags: tuple[tuple[str, str], ...], limit: int,
    json_: bool,
) -> None:  # fmt: skip
    """List runs, the newest first."""
    with reading(ctx) as connection:
        found = filters.listed(connection, _listing(states, saga_name, tags, limit))
        now = runs.inbox(connection, "").now
    more, found = len(found) > limit, found[:limit]
    if json_:
        print_json(found)
        return
    if not found:
        click.echo(
            f"There are no runs{' like that' if states or saga_name or tags else ' yet; start one with `saga start`'}."
        )
        return
    _print_list(ctx, found, now)
    if more:
        click.echo(f"... and older ones; see more with --limit {limit * 10}.")


def _listing(states: tuple[str, ...], saga_name: str, tags: tuple[tuple[str, str], ...], limit: int) -> Any:
    return filters.listing(states=states, saga=full_name(saga_name), tags=dict(tags), limit=limit + 1)


def _print_list(ctx: click.Context, found: list[dict[str, Any]], now: datetime) -> None:
    names = {run["saga"] for run in found}
    shown = words.short if len({words.short(name) for name in names}) == len(names) else str
    table = grid("RUN", "SAGA", "STATE", "STARTED", "TOOK")
    for column in table.columns[2:]:
        column.no_wrap = True
    for run in found:
        state = Text(run["state"], style=STATE_STYLES.get(run["state"], ""))
        table.add_row(
            run["id"],
            shown(run["saga"]),
            state,
            words.ago(run["started_at"], now),
            _took(run) if run["finished_at"] else "",
        )
    console(ctx).print(table)


def _took(run: dict[str, Any]) -> str:
    """Return how long an ended run took; nothing if it was told to end before its start."""
    length = run["finished_at"] - run["started_at"]
    return words.duration(length) if length >= timedelta(0) else ""


# -- show --------------------------------------------------------------------------------------------------------------
@click.command(cls=Command)
@run_argument
@as_json
@click.pass_context
def show(ctx: click.Context, run_id: str, json_: bool) -> None:
    """Show how RUN stands: its input and output, its error, what is left, parked and outstanding."""
    with reading(ctx) as connection:
        run = run_of(connection, run_id)
        work = runs.outstanding(connection, run_id)
        now = runs.inbox(connection, run_id).now
    if json_:
        print_json({**run, "outstanding": [_work_json(item) for item in work]})
        return
    table = grid()
    for label, text in _facts(run, now):
        table.add_row(label, text)
    out = console(ctx)
    out.print(table)
    if work:
        out.print()
        out.print(_work_table(work, now))
    if run["state"] not in TERMINAL:
        click.echo(f"\nWhy it stands there: saga explain {as_typed(run_id)}")


def _facts(run: dict[str, Any], now: datetime) -> list[tuple[str, str | Text]]:
    facts: list[tuple[str, str | Text]] = [
        ("run", run["id"]),
        ("saga", f"{run['saga']}, version {run['version']}"),
        ("state", Text(run["state"], style=STATE_STYLES.get(run["state"], ""))),
        ("started" if run["started_at"] <= (run["finished_at"] or now) else "starts",
         f"{words.moment(run['started_at'])} ({words.ago(run['started_at'], now)})"),
    ]  # fmt: skip
    if run["finished_at"]:
        took = _took(run)
        facts.append(
            ("finished", f"{words.moment(run['finished_at'])}, {f'took {took}' if took else 'before its start'}")
        )
    elif run["deadline_at"]:
        facts.append(("deadline", f"{words.moment(run['deadline_at'])} ({words.ago(run['deadline_at'], now)})"))
    facts.append(("queue", run["queue"] + (f", priority {run['priority']}" if run["priority"] else "")))
    facts.append(("input", words.arguments(run["input"]) or "nothing"))
    facts += _shown(run["published"] or {}, run["tags"])
    if run["state"] == RunState.COMPLETED:
        facts.append(("output", words.value(run["output"])))
    if run["error"]:
        facts.append(("error", words.error(run["error"])))
    if run["past_pivot"]:
        facts.append(("pivot", "passed: it can only go forward"))
    if run["parent_id"]:
        facts.append(("parent", run["parent_id"]))
    facts += [("left", f"{item['key']} ({item['outcome']}), not undone") for item in run["left_effects"]]
    if run["state"] not in TERMINAL:  # the row of one that was terminated still tells what had parked
        facts += [("parked", _parked(item)) for item in run["parked"]]
    return facts


def _shown(published: dict[str, Any], tags: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what a run shows of itself: `saga.progress`, `saga.publish`, `saga.tag`."""
    if tags:
        yield "tags", words.arguments(dict(sorted(tags.items())))
    progress = published.get("progress")
    if isinstance(progress, dict) and progress.keys() == {"done", "total", "note"}:
        of = "" if progress["total"] is None else f" of {progress['total']}"
        yield "progress", f"{progress['done']}{of}" + (f", {progress['note']}" if progress["note"] else "")
        published = {name: value for name, value in published.items() if name != "progress"}
    if published:
        yield "published", words.arguments(published)


def _parked(item: dict[str, Any]) -> str:
    return f"{item['key'] or 'the run itself'} ({item['role']}): {item['why']}"


def _work_table(work: list[Outstanding], now: datetime) -> Table:
    table = grid("OUTSTANDING", "WHAT", "QUEUE", "ATTEMPT", "WHEN")
    for item in work:
        attempt = "" if item.role == "turn" else str(item.attempt + (not item.begun))
        table.add_row(item.key or "(next turn)", item.role, item.queue, attempt, _when(item, now))
    return table


def _when(item: Outstanding, now: datetime) -> str:
    if item.begun and item.begun_at:
        return f"running for {words.duration(now - item.begun_at)}"
    if item.in_line:
        return "in line"
    if item.due_at - now > LINE / 2:
        return "paused"
    return words.ago(item.due_at, now) if item.due_at > now else f"due {words.ago(item.due_at, now)}"


def _work_json(item: Outstanding) -> dict[str, Any]:
    return {name: getattr(item, name) for name in Outstanding.__slots__ if name != "now"}
