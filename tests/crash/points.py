"""The failpoints of the package as its source names them, and which kind of test reaches which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "orchestrator"

# Reached by a test of their own, because they take a worker of Celery, or no schema.
CELERY = frozenset({
    "bell.before", "bell.after", "companion.begun", "companion.announced", "companion.child_gone",
    "companion.child_buried", "companion.ending", "companion.ended", "message.before", "message.started",
})  # fmt: skip
BEAT = frozenset({
    "beat.lead.before", "beat.lead.after", "beat.declare.before", "beat.declare.after", "beat.fire.before",
    "beat.fire.held", "beat.fire.decided", "beat.fire.after", "beat.send.before", "beat.send.sent", "beat.send.after",
    "beat.note.before", "beat.note.after", "beat.forget.before", "beat.forget.after", "beat.resign.before",
    "beat.resign.after",
})  # fmt: skip
ORDERS = frozenset({
    "trigger.before", "trigger.held", "trigger.decided", "trigger.after", "backfill.before", "backfill.held",
    "backfill.decided", "backfill.after", "schedule.pause.before", "schedule.pause.after", "schedule.resume.before",
    "schedule.resume.after",
})  # fmt: skip
RESTORE = frozenset({
    "restore.buried", "restore.begun", "restore.taken", "restore.telling", "restore.told", "restore.finishing",
    "restore.ended",
})  # fmt: skip
NIGHTLY = frozenset({
    "reconcile.open.before", "reconcile.open.gave_up", "reconcile.open.made", "reconcile.open.after", "reconcile.page",
    "reconcile.page.written", "reconcile.page.after", "reconcile.write", "reconcile.finish", "reconcile.finished",
    "reconcile.after", "prune.bury", "prune.buried", "prune.deleted", "prune.after",
})  # fmt: skip
MIGRATION = frozenset({"migrate.locked", "migrate.applied", "migrate.after"})

# What has to break first: the answer to the commit of the first outcome of a story's only run.
PRELUDES = {"recorded.after": "commit.after=raise@2"}

# Where most transactions of a run are: not only their first is to be tried.
CORE = (
    "take.reserved", "take.begun", "effect.before", "effect.after", "commit.before", "commit.after", "commits.before",
    "commits.after", "transaction.begun", "transaction.worked",
    "transaction.settled", "transaction.after",
)  # fmt: skip


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Yield every call of ``failpoint`` in the package, with the place where it is."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and "failpoint" in (
                getattr(node.func, "id", ""),
                getattr(node.func, "attr", ""),
            ):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


def name_of(call: ast.Call) -> str:
    """Return the name that a call gives, empty if it is no literal."""
    first = call.args[0] if call.args else None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""


NAMES = sorted({name_of(call) for _, call in calls()})
