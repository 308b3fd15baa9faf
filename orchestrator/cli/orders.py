"""``cancel``, ``terminate``, ``pause``, ``resume``, ``retry``, ``skip``, ``resolve``: orders for a run, on record."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from orchestrator.cli.command import Command, JsonType, as_json, client_of, full_name, print_json, run_argument
from orchestrator.client import Client
from orchestrator.errors import UsageError, as_typed
from orchestrator.machine.states import RunState
from orchestrator.saga import registry as sagas

reason_option = click.option("--reason", default="", help="Why; kept in the run's history.")
by_option = click.option("--by", default="", help="Who decides; the name of this account by default.")
key_argument = click.argument("key", required=False)


def _order(function: Callable[..., None]) -> click.Command:
    """Make a command of a function that leaves an order."""
    for option in (by_option, reason_option, as_json, click.pass_context):
        function = option(function)
    return click.command(cls=Command)(function)


def _say(json_: bool, run_id: str, action: str, sentence: str, **more: Any) -> None:
    if json_:
        print_json({"id": run_id, "ordered": action, **more})
    else:
        click.echo(f"{sentence} Watch it with: saga show {as_typed(run_id)}")


@_order
@run_argument
def cancel(ctx: click.Context, run_id: str, reason: str, by: str, json_: bool) -> None:
    """Ask RUN to stop and undo what it did.

    It does so in its own time: what is running is awaited, then everything is compensated. Refused after the run's
    point of no return.
    """
    client_of(ctx).cancel(run_id, reason, who(by))
    _say(json_, run_id, "cancel", f"Run {run_id} was told to stop and to undo what it did.")


@_order
@run_argument
def terminate(ctx: click.Context, run_id: str, reason: str, by: str, json_: bool) -> None:
    """Stop RUN at once and undo nothing.

    What it did and did not undo is listed under `left` afterwards. To have it undone use `cancel`.
    """
    client_of(ctx).terminate(run_id, reason, who(by))
    _say(json_, run_id, "terminate", f"Run {run_id} was told to stop without undoing anything.")


@click.command(cls=Command)
@run_argument
@click.argument("name")
@click.argument("payload", type=JsonType(object, '{"by": "ann"}'), required=False)
@click.option("--id", "signal_id", help="The signal's id; a second one with the same id changes nothing.")
@as_json
@click.pass_context
def signal(ctx: click.Context, run_id: str, name: str, payload: Any, signal_id: str | None, json_: bool) -> None:
    """Send signal NAME to RUN, with a JSON value as its PAYLOAD.

    One that comes before the saga waits for it is kept.

    \b
      saga signal order-42 approved '{"by": "ann"}'
    """
    signal_id = client_of(ctx).signal(run_id, name, payload, signal_id)
    _say(json_, run_id, "signal", f"Run {run_id} was sent {name} (id {signal_id}).", name=name, signal=signal_id)


saga_option = click.option("--saga", "saga_name", default="", help="All runs of this saga, and those to come.")
queue_option = click.option("--queue", default="", help="All that is due on this queue.")


@_order
@queue_option
@saga_option
@click.argument("run_id", metavar="[RUN]", required=False)
def pause(
    ctx: click.Context, run_id: str | None, saga_name: str, queue: str, reason: str, by: str, json_: bool
) -> None:
    """Hold RUN where it is, or a whole saga, or a queue, until `resume`.

    Steps that a run has asked for go on and are recorded; then nothing more is asked for. It can be cancelled and
    terminated as it stands, and its deadline holds. Of a saga that is paused, new runs stay pending. Of a queue that is
    paused nothing is taken, be it turns or steps; what runs is finished.
    """
    if _one_run(run_id, saga_name, queue):
        client_of(ctx).operate(str(run_id), "pause", by=who(by), reason=reason)
        _say(json_, str(run_id), "pause", f"Run {run_id} is paused.")
        return
    name = full_name(saga_name)
    new = client_of(ctx).pause(saga=name, queue=queue, by=who(by), reason=reason)
    _say_all(json_, "pause", name, queue, new, "is paused" if new else "is paused already")


@_order
@queue_option
@saga_option
@click.argument("run_id", metavar="[RUN]", required=False)
def resume(
    ctx: click.Context, run_id: str | None, saga_name: str, queue: str, reason: str, by: str, json_: bool
) -> None:
    """Let RUN go on after `pause`, or a whole saga, or a queue.

    A run that was paused by itself stays so when its saga is resumed.
    """
    if _one_run(run_id, saga_name, queue):
        client = client_of(ctx)
        state = client.outcome(str(run_id)).state
        client.operate(str(run_id), "resume", by=who(by), reason=reason)
        # What is parked is not shown as paused, nor is what has not heard of it: the order is left in any case.
        known = f"is not paused, it is {state}; a pause that it does not show yet is lifted"
        _say(json_, str(run_id), "resume", f"Run {run_id} {'goes on' if state == RunState.PAUSED else known}.")
        return
    name = full_name(saga_name)
    ended = client_of(ctx).resume(saga=name, queue=queue, by=who(by), reason=reason)
    _say_all(json_, "resume", name, queue, ended, "goes on" if ended else "is not paused")


def _one_run(run_id: str | None, saga_name: str, queue: str) -> bool:
    if sum(map(bool, (run_id, saga_name, queue))) != 1:
        raise click.UsageError("name a RUN, or --saga NAME, or --queue NAME")
    return bool(run_id)


def _say_all(json_: bool, action: str, saga_name: str, queue: str, changed: bool, sentence: str) -> None:
    kind, name = ("saga", saga_name) if saga_name else ("queue", queue)
    if json_:
        print_json({kind: name, "ordered": action, "changed": changed})
    else:
        click.echo(f"{kind.capitalize()} {name} {sentence}.")
    if saga_name and saga_name not in sagas.names:
        note = f"Note: no saga of this app is called {name}; the order holds for runs of that name, if there are any."
        click.echo(note, err=True)


@_order
@run_argument
@key_argument
def retry(ctx: click.Context, run_id: str, key: str | None, reason: str, by: str, json_: bool) -> None:
    """Try again what is parked in RUN.

    KEY may be left out if only one thing is parked. A run that parked as a whole (drift, an error in saga code) is
    replayed with the code of today.
    """
    client = client_of(ctx)
    key = _only_key(client, run_id, key)
    client.operate(run_id, "retry", key, by=who(by), reason=reason)
    _say(json_, run_id, "retry", f"{_named(key)} of run {run_id} is tried again.", key=key)


@_order
@run_argument
@key_argument
def skip(ctx: click.Context, run_id: str, key: str | None, reason: str, by: str, json_: bool) -> None:
    """Go on without what is parked in RUN.

    A skipped undo is not done: the effect stays and is listed under `left`. KEY may be left out if only one thing is
    parked.
    """
    client = client_of(ctx)
    key = _only_key(client, run_id, key)
    client.operate(run_id, "skip", key, by=who(by), reason=reason)
    _say(json_, run_id, "skip", f"{_named(key)} of run {run_id} is skipped.", key=key)


@_order
@click.option("--result", type=JsonType(object, '{"id": 7}'), help="It happened, with this result (JSON).")
@click.option("--no-effect", is_flag=True, help="It certainly did not happen.")
@run_argument
@key_argument
def resolve(
    ctx: click.Context, run_id: str, key: str | None, reason: str, by: str, json_: bool,
    result: Any, no_effect: bool,
) -> None:  # fmt: skip
    """Settle by hand what is parked in RUN.

    For a step say what became of it: --result JSON or --no-effect. For an undo that you did yourself say neither. For a
    run that parked as a whole --result is its output. KEY may be left out if only one thing is parked.
    """
    given = ctx.get_parameter_source("result") is ParameterSource.COMMANDLINE
    if given and no_effect:
        raise click.UsageError("--result and --no-effect exclude each other")
    client = client_of(ctx)
    key = _only_key(client, run_id, key)
    role = next((item["role"] for item in _parked(client, run_id) if item["key"] == key), "")
    if role == "undo" and (given or no_effect):
        raise click.UsageError(f"the undo of {key} is parked: resolving says that you did it, without a result")
    if role and role != "undo" and not (given or (no_effect and key)):
        wanted = "--result JSON or --no-effect" if key else "--result JSON, the output of the run"
        raise click.UsageError(f"say what became of {key or 'it'}: {wanted}")
    client.operate(run_id, "resolve", key, by=who(by), reason=reason, value=result, no_effect=no_effect)
    _say(json_, run_id, "resolve", f"{_named(key)} of run {run_id} is settled.", key=key)


def _parked(client: Client, run_id: str) -> list[dict[str, Any]]:
    return [item for item in client.outcome(run_id).parked if isinstance(item, dict)]


def who(by: str) -> str:
    """Return who decides: as named, else the account at the keyboard."""
    try:
        return by or getpass.getuser()
    except (OSError, KeyError):  # an account without a name, as containers have
        return ""


def _only_key(client: Client, run_id: str, key: str | None) -> str:
    """Return the key that was named, or the only one that is parked.  Raises: UsageError."""
    if key is not None:
        return key
    keys = [str(item["key"]) for item in _parked(client, run_id)]
    if len(keys) > 1:
        named = ", ".join(item or "''" for item in keys)
        raise UsageError(f"several things are parked in run {run_id}; name one of them: {named}")
    return keys[0] if keys else ""


def _named(key: str) -> str:
    return f"Step {key}" if key else "The whole"
