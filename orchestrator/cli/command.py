"""What all commands share: the app's Orchestrator, a console, JSON, errors as one sentence, exit codes.

Owns how a command begins and ends.  Must never know what a particular command does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click
from celery import Celery
from rich.console import Console
from rich.table import Table

from orchestrator.cli import words
from orchestrator.cli.writing import writing
from orchestrator.client import Client
from orchestrator.codec import first_line, is_name
from orchestrator.errors import OrchestratorError, UnknownSagaError
from orchestrator.saga import Saga
from orchestrator.saga import registry as sagas
from orchestrator.store import check, runs
from orchestrator.store.connection import REFUSED, Connection
from orchestrator.store.missing import unknown_run

F = TypeVar("F", bound=Callable[..., Any])
EXIT_CODES = "Exit codes: 0 done, 1 it failed, was refused or was not found, 2 wrong usage."
_PIPE_WIDTH = 200  # for grep: where there is no terminal, lines are not folded at 80


class Command(click.Command):
    """A command whose help ends with its exit codes and whose failures are one sentence."""

    exit_codes = EXIT_CODES

    def __init__(self, *args: Any, exit_codes: str = EXIT_CODES, **kwargs: Any) -> None:
        kwargs.setdefault("epilog", exit_codes)
        super().__init__(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.  Raises: ClickException, which exits with code 1; UsageError, with 2."""
        if not _shows_all() and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        try:
            with writing():
                return super().invoke(ctx)
        except OrchestratorError as error:
            raise click.ClickException(str(error)) from None
        except REFUSED as error:  # such as a role that may not read
            raise click.ClickException(f"Postgres refuses: {first_line(error)}") from None
        except UnicodeEncodeError:  # a shell hands bytes that are not UTF-8 on as lone surrogates
            raise click.UsageError("what was said is not text in UTF-8, and so nothing here is called that") from None

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse arguments; ``--help`` is written here.  Raises: ClickException."""
        with writing():
            return super().make_context(*args, **kwargs)


def _shows_all() -> bool:
    """Tell whether the terminal, or whatever reads this, takes any text: in some locales it does not."""
    return (getattr(sys.stdout, "encoding", "") or "").lower().replace("-", "") == "utf8"


as_json = click.option("--json", "json_", is_flag=True, help="Print JSON for programs.")
run_argument = click.argument("run_id", metavar="RUN")


def orchestrator_of(ctx: click.Context) -> Any:
    """Return the Orchestrator of the app, with all its tasks and sagas imported.

    Raises: ClickException if the app has none.
    """
    app: Celery = ctx.obj.app
    app.loader.import_default_modules()
    found = getattr(app, "orchestrator", None)
    if found is None:
        raise click.ClickException(
            f"the Celery app {app.main!r} has no Orchestrator: create one with `Orchestrator(app)` next to the app, "
            "and name the app with `celery -A <module> saga ...`"
        )
    return found


def client_of(ctx: click.Context) -> Client:
    """Return the client of the app.  Raises: ClickException, ConfigurationError."""
    client: Client = orchestrator_of(ctx).client
    return client


@contextlib.contextmanager
def reading(ctx: click.Context) -> Iterator[Connection]:
    """Lend a connection to a database whose schema fits.  Raises: StoreUnavailableError, SchemaError."""
    with client_of(ctx).pool.connection() as connection:
        check(connection)
        yield connection


def run_of(connection: Connection, run_id: str) -> dict[str, Any]:
    """Return the row of a run.  Raises: UnknownRunError."""
    if not is_name(run_id, limit_bytes=2600):  # which Postgres cannot be asked for
        raise unknown_run(run_id)
    row = runs.run(connection, run_id)
    if row is None:
        raise unknown_run(run_id, connection)
    return row


def saga_named(name: str) -> Saga[Any, Any]:
    """Return the latest version of a saga by its name, or by the last part of it if only one saga ends so.

    Raises: UnknownSagaError.
    """
    return sagas.latest(full_name(name))


def full_name(name: str) -> str:
    """Return the full name of a saga, or the name as it is: its code may be gone while its runs are not.

    Raises: UnknownSagaError if several sagas are meant: one that is called just so need not be any of them.
    """
    if name in sagas.names:
        return name
    ending = [known for known in sagas.names if words.short(known) == name]
    if len(ending) > 1:
        raise UnknownSagaError(f"several sagas are called {name!r}; say which: {', '.join(ending)}")
    return ending[0] if ending else name


def console(ctx: click.Context) -> Console:
    """Return the console: with colour on a terminal only, and as wide as one.

    Texts are shown as they are: a run's id, its input or its error may look like markup or an emoji of rich's.
    """
    narrow = (sys.stdout is not None and sys.stdout.isatty()) or "COLUMNS" in os.environ
    options: dict[str, Any] = {"no_color": True} if getattr(ctx.obj, "no_color", False) else {}
    options |= {"highlight": False, "markup": False, "emoji": False, "soft_wrap": False}
    return Console(width=None if narrow else _PIPE_WIDTH, **options)


def print_json(value: Any) -> None:
    """Print a value as indented JSON; instants are ISO 8601 in UTC."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=not _shows_all(), default=words.plain))


def grid(*columns: str) -> Table:
    """Return a table without lines; without columns one of labels and texts."""
    if columns:
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for name in columns:
            table.add_column(name, overflow="fold")
        return table
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


class JsonType(click.ParamType[Any]):
    """An argument that is JSON."""

    name = "JSON"

    def __init__(self, kind: type, example: str) -> None:
        self._kind = kind
        self._example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the parsed value.  Raises: BadParameter, which exits with code 2."""
        if not isinstance(value, str):
            return value
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError) as error:
            example = self._example
            if self._kind is not dict and value.strip() and not set(value) & set("[]{}'\""):
                example = json.dumps([value] if self._kind is list else value, ensure_ascii=False)  # a plain text
            self.fail(f"{value!r:.80} is not JSON ({error}); write for example '{example:.80}'", param, ctx)
        if not isinstance(parsed, self._kind):
            self.fail(f"{value!r:.80} is JSON, but not of the form '{self._example}'", param, ctx)
        return parsed


STATE_STYLES = {
    "pending": "cyan", "running": "cyan", "paused": "yellow", "compensating": "yellow", "parked": "bold red",
    "completed": "green", "failed": "red", "compensated": "magenta", "cancelled": "magenta", "terminated": "red",
    "continued": "green",
}  # fmt: skip
