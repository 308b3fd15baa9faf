"""``replay``: recorded runs against today's code, for CI; and recording them as files.

Owns where histories come from and what is printed.  What fits and what does not is `orchestrator.testing.replay`'s.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from orchestrator.cli.command import Command, as_json, console, orchestrator_of, print_json, reading, saga_named
from orchestrator.errors import DriftError, OrchestratorError, UnknownSagaError
from orchestrator.machine.states import RunState
from orchestrator.store import filters
from orchestrator.store.connection import Connection
from orchestrator.store.recorded import recorded
from orchestrator.testing.history import History
from orchestrator.testing.history import replay as replay_history

_FIELDS = ("saga", "version", "id", "input", "started", "deadline", "journal")


@dataclass(frozen=True, slots=True)
class _Replayed:
    """A history and what came of it: no problem means that it fits."""

    history: History
    problem: str = ""
    drifted: bool = False

    def json(self) -> dict[str, Any]:
        about = {name: self.history[name] for name in ("id", "saga", "version")}
        return {**about, "rows": len(self.history["journal"]), "fits": not self.problem, "problem": self.problem}


@click.command(
    cls=Command,
    exit_codes="Exit codes: 0 every run fits today's code; 1 one does not, its saga is not registered, or there was "
    "nothing to replay; 2 wrong usage.",
)
@click.argument("run_ids", metavar="[RUN]...", nargs=-1)
@click.option("--from", "paths", multiple=True, type=click.Path(exists=True, path_type=Path), metavar="PATH",
              help="A file of a recorded run, or a folder of them, instead of the database; repeatable.")  # fmt: skip
@click.option("--saga", "saga_name", default="", help="Only runs of this saga.")
@click.option("--state", "states", multiple=True, type=click.Choice([state.value for state in RunState]),
              metavar="STATE", help="Only runs in this state, such as running; repeatable.")  # fmt: skip
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000),
              help="At most so many from the database, the newest first.")  # fmt: skip
@click.option("--save", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
              help="Also write each run, with its arguments and results, as a file to replay later.")  # fmt: skip
@as_json
@click.pass_context
def replay(
    ctx: click.Context,
    run_ids: tuple[str, ...],
    paths: tuple[Path, ...],
    saga_name: str,
    states: tuple[str, ...],
    limit: int,
    save: Path | None,
    json_: bool,
) -> None:
    """Replay recorded runs with the code that is here, and show where it asks for something else.

    Replays RUNs, files (--from), or else the newest runs of the database. Nothing is run and nothing is changed: steps
    are answered from the record. For CI, keep files next to your tests:

    \b
      saga replay --saga checkout --state running --save histories
      saga replay --from histories
    """
    orchestrator_of(ctx)  # so that all sagas are imported
    histories = list(_of_files(paths))
    if run_ids or not paths:
        with reading(ctx) as connection:
            histories += _of_database(connection, run_ids, saga_name, states, limit)
    if paths and not run_ids:
        histories = [history for history in histories if _wanted(history, saga_name)]
    for history in histories if save is not None else ():
        _save(save, history)  # type: ignore[arg-type]
    replayed = [_replay(history) for history in histories]
    print_json([each.json() for each in replayed]) if json_ else _print(ctx, replayed)
    if not replayed or any(each.problem for each in replayed):
        ctx.exit(1)


# -- where they come from ----------------------------------------------------------------------------------------------
def _of_files(paths: Sequence[Path]) -> Iterator[History]:
    for path in paths:
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            yield _read(file)


def _read(file: Path) -> History:
    try:
        history = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise click.ClickException(f"{file} cannot be read as a recorded run: {error}") from None
    if not isinstance(history, dict) or not all(name in history for name in _FIELDS):
        raise click.ClickException(
            f"{file} is no recorded run; make one with `saga replay RUN --save FOLDER`, or keep `run.history` of a test"
        )
    return history


def _of_database(
    connection: Connection, run_ids: Sequence[str], saga_name: str, states: Sequence[str], limit: int
) -> Iterator[History]:
    if not run_ids:
        name = saga_named(saga_name).name if saga_name else ""
        run_ids = [
            row["id"] for row in filters.listed(connection, filters.listing(states=states, saga=name, limit=limit))
        ]
    yield from [recorded(connection, run_id) for run_id in run_ids]


def _wanted(history: History, saga_name: str) -> bool:
    return not saga_name or history["saga"] == saga_named(saga_name).name


def _save(folder: Path, history: History) -> None:
    whole = f"{history['saga']}@{history['version']}-{history['id']}"
    name = re.sub(r"[^\w.@-]+", "_", whole, flags=re.ASCII)[:200]
    if name != whole:  # what another run may be called as well
        name += f"-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(history, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise click.ClickException(f"nothing can be saved in {folder}: {error.strerror}") from None


# -- what came of them -------------------------------------------------------------------------------------------------
def _replay(history: History) -> _Replayed:
    try:
        replay_history(history)
    except DriftError as drift:
        return _Replayed(history, str(drift), drifted=True)
    except UnknownSagaError as error:
        return _Replayed(history, str(error))
    except (OrchestratorError, LookupError, TypeError, ValueError) as error:
        return _Replayed(history, f"it cannot be replayed: {type(error).__name__}: {error}")
    return _Replayed(history)


_STYLES = {"-": "red", "+": "green"}


def _print(ctx: click.Context, replayed: Sequence[_Replayed]) -> None:
    if not replayed:
        click.echo("There is nothing to replay, so nothing was proved; see `saga list`.")
        return
    out = console(ctx)
    for each in replayed:
        history = each.history
        word, style = ("fits", "green") if not each.problem else ("drift" if each.drifted else "fails", "bold red")
        line = Text(f"{word:6}", style=style)
        rows = len(history["journal"])
        line.append(f"{history['saga']}@{history['version']} {history['id']}, {rows} rows", style="default not bold")
        out.print(line, soft_wrap=True)
        for problem in each.problem.splitlines():
            out.print(Text(f"       {problem}", style=_STYLES.get(problem[:1], "")), soft_wrap=True)
    failed = sum(bool(each.problem) for each in replayed)
    click.echo(f"{len(replayed) - failed} of {len(replayed)} runs fit this code.")
