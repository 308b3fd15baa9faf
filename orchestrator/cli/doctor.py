"""``doctor``: what is wrong, what it means, what to do; rings for work that lies.

Owns gathering and showing.  Must never judge, and change nothing but ring.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from orchestrator.celery.doctor import broker as ask_broker
from orchestrator.cli import restore
from orchestrator.cli.command import Command, as_json, console, orchestrator_of, print_json
from orchestrator.cli.orders import by_option
from orchestrator.codec import first_line
from orchestrator.engine.doctor import EXIT_CODE, Facts, Finding, Level, judge, lost_doorbells
from orchestrator.engine.schedules import LATE
from orchestrator.errors import OrchestratorError
from orchestrator.saga import registry as sagas
from orchestrator.step import registry as steps
from orchestrator.step import route
from orchestrator.store import check, pauses, restores, runs
from orchestrator.store import doctor as store
from orchestrator.store import schedules as schedules_store
from orchestrator.store.connection import REFUSED, Connection

_CODES = "Exit codes: 0 nothing to do, 1 warnings, 2 something is broken (or wrong usage)."
_STYLES = {Level.ADVICE: "cyan", Level.WARNING: "yellow", Level.BROKEN: "bold red"}
_PACKAGES = ("celery-orchestrator", "celery", "kombu", "psycopg", "sqlalchemy", "redis", "amqp")


@click.command(cls=Command, exit_codes=_CODES)
@click.option("--no-ring", is_flag=True, help="Only look; do not ring for work that lies.")
@restore.options
@by_option
@as_json
@click.pass_context
def doctor(ctx: click.Context, /, no_ring: bool, json_: bool, by: str, **restored: bool) -> None:
    """Look for what is wrong with Postgres, the broker, the workers and the runs; say what it means and what to do.

    Compares what Postgres says is due with what the broker holds, and rings for what lies. Harmless at any time.

    After a restore of the database to a moment in the past, stop all workers and say --after-restore before you start
    them again: it tells every run that steps may have been done already, so that none is blindly repeated.
    """
    if any(restored.values()):
        ctx.exit(restore.look_after(ctx, by, json_, **restored))
    orchestrator = orchestrator_of(ctx)
    rung: list[str] = []
    try:
        with orchestrator.client.pool.connection() as connection:
            check(connection)
            facts = _facts(orchestrator, connection)
            found = judge(facts)
            if not no_ring and not facts.broker.error:
                rung = _ring(orchestrator, connection, facts)
    except (OrchestratorError, REFUSED) as error:
        facts, found = None, [_no_database(error)]
    if json_:
        print_json({"status": _status(found), "findings": [asdict(each) for each in found], "rung": rung,
                    "versions": _versions(facts)})  # fmt: skip
    else:
        _print(console(ctx), found, rung, _versions(facts))
    ctx.exit(max((EXIT_CODE[each.level] for each in found), default=0))


def _facts(orchestrator: Any, connection: Connection) -> Facts:
    app = orchestrator.app
    before = datetime.now(UTC)
    server = store.server(connection)
    host_clock = before + (datetime.now(UTC) - before) / 2
    waiting, living = store.waiting(connection), store.living(connection)
    named = _named_queues(app)
    name = app.main or "celery"
    declared = schedules_store.listing(connection, name)
    schedules = _schedules(app, declared)
    leader = schedules_store.leader(connection, name)
    return Facts(
        server=server, host_clock=host_clock, waiting=waiting, living=living, stuck=store.stuck(connection),
        oldest=store.oldest_transaction(connection), sizes=store.sizes(connection),
        broker=ask_broker(app, sorted(named | {each.queue for each in waiting})), named_queues=frozenset(named),
        pauses=pauses.listed(connection), schedules=schedules,
        lineage=None if server.in_recovery else restores.lineage(connection),
        ahead=[
            (row["name"], row["settled_until"].astimezone(UTC)) for row in declared
            if row["gone_at"] is None and row["settled_until"] > row["now"] + LATE
        ],
        restoring=restores.open_sweep(connection) is not None,
        leader_unseen=max(schedules_store.clock(connection) - leader[1], timedelta(0)) if leader else None,
    )  # fmt: skip


def _schedules(app: Any, declared: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    """Return schedules with their problems: those that a beat has declared, and those of the code besides."""
    known = {row["name"]: row["problem"] for row in declared if row["gone_at"] is None}
    configured = app.conf.beat_schedule if isinstance(app.conf.beat_schedule, Mapping) else {}
    mine = [str(name) for name in configured if name != "celery.backend_cleanup"]  # which Celery adds by itself
    return list((dict.fromkeys(mine) | known).items())


def _named_queues(app: Any) -> set[str]:
    found = {app.conf.task_default_queue}
    found |= {step.queue for step in steps.steps.values()}
    found |= {saga.options.queue or route(saga.name) for saga in sagas.sagas.values()}
    return found - {""}


def _ring(orchestrator: Any, connection: Connection, facts: Facts) -> list[str]:
    rung = []
    for queue in lost_doorbells(facts):
        rows = sum(each.rows for each in facts.waiting if each.queue == queue)
        if orchestrator.bell.ring(queue, max(1, runs.rings_needed(connection, queue, rows))):
            rung.append(queue)
    return rung


def _no_database(error: Exception) -> Finding:
    what = str(error) if isinstance(error, OrchestratorError) else f"Postgres refuses: {first_line(error)}"
    return Finding(
        "database", Level.BROKEN, what, "nothing starts and nothing moves", "mend that first, then ask again"
    )


def _status(found: list[Finding]) -> str:
    worst = max((each.level for each in found), key=lambda level: EXIT_CODE[level], default=Level.ADVICE)
    return {Level.ADVICE: "healthy", Level.WARNING: "warning", Level.BROKEN: "broken"}[worst]


def _versions(facts: Facts | None) -> dict[str, str]:
    known = {"python": sys.version.split()[0]}
    known |= {name: importlib.metadata.version(name) for name in _PACKAGES if _is_installed(name)}
    return known | ({"postgres": facts.server.version} if facts else {})


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _print(out: Console, found: list[Finding], rung: list[str], versions: dict[str, str]) -> None:
    for each in found:
        mark = (each.level.value.ljust(9), _STYLES[each.level])
        out.print(Text.assemble(mark, (each.what, "bold")), soft_wrap=True)
        out.print(Text(f"         {each.means}"), soft_wrap=True)
        out.print(Text(f"         -> {each.do}", style="green"), soft_wrap=True)
    for queue in rung:
        out.print(Text(f"Rang for queue {queue}."))
    if all(each.level is Level.ADVICE for each in found):
        out.print(Text("Nothing is wrong.", style="green"))
    out.print(Text(", ".join(f"{name} {version}" for name, version in versions.items()), style="dim"), soft_wrap=True)
