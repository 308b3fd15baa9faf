"""``celery -A <app> saga``: the command line of sagas, for people (tables) and programs (``--json``).

Owns arguments, output and exit codes: 0 done, 1 failed, refused or not found, 2 wrong usage.  Must never decide what
happens to a run: it leaves orders with the client, and reads.
"""

from __future__ import annotations

import click

from orchestrator.cli.bulk import bulk
from orchestrator.cli.command import EXIT_CODES
from orchestrator.cli.dev import dev
from orchestrator.cli.diagram import diagram
from orchestrator.cli.doctor import doctor
from orchestrator.cli.explain import explain
from orchestrator.cli.history import history
from orchestrator.cli.lint import lint
from orchestrator.cli.orders import cancel, pause, resolve, resume, retry, signal, skip, terminate
from orchestrator.cli.prune import prune
from orchestrator.cli.reconcile import reconcile
from orchestrator.cli.replay import replay
from orchestrator.cli.runs import list_, migrate, show, start
from orchestrator.cli.schedules import schedules

__all__ = ["saga"]


class _Group(click.Group):
    """Lists the commands in the order in which they are met, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(name="saga", cls=_Group, epilog=f"{EXIT_CODES} Every command has --help.")
def saga() -> None:
    """Start, watch and mend sagas."""


for _command in (
    dev, migrate, start, list_, show, history, explain, signal, cancel, terminate, pause, resume, retry, skip, resolve,
    bulk, schedules, doctor, reconcile, prune, diagram, lint, replay,
):  # fmt: skip
    saga.add_command(_command)
