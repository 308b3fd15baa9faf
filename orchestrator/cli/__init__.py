"""``celery -A <app> saga``: the command line of sagas, for people (tables) and programs (``--json``).

Owns arguments, output and exit codes: 0 done, 1 failed, refused or not found, 2 wrong usage.  Must never decide what
happens to a run: it leaves orders with the client, and reads.

Every ``celery`` command loads this module, a worker's start too: a command is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from orchestrator.cli.writing import writing

__all__ = ["saga"]

_MODULES = {
    "dev": "dev", "migrate": "runs", "start": "runs", "list": "runs", "show": "runs", "history": "history",
    "explain": "explain", "signal": "orders", "cancel": "orders", "terminate": "orders", "pause": "orders",
    "resume": "orders", "retry": "orders", "skip": "orders", "resolve": "orders", "bulk": "bulk",
    "schedules": "schedules", "doctor": "doctor", "reconcile": "reconcile", "prune": "prune", "diagram": "diagram",
    "lint": "lint", "replay": "replay",
}  # fmt: skip


class _Group(click.Group):
    """Lists the commands in the order in which they are met, and imports those that are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _MODULES:
            return None
        module = import_module(f"orchestrator.cli.{_MODULES[name]}")
        command: click.Command = getattr(module, "list_" if name == "list" else name)
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse arguments; ``--help`` is written here.  Raises: ClickException."""
        with writing():
            return super().make_context(*args, **kwargs)


@click.group(
    name="saga",
    cls=_Group,
    epilog="Exit codes: 0 done, 1 it failed, was refused or was not found, 2 wrong usage. Every command has --help.",
)
def saga() -> None:
    """Start, watch and mend sagas."""
