"""A night in a process of its own, which a test may kill: ``python -m tests.reconcile.night URL reconcile FOLDER``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from orchestrator import reconcile, saga
from orchestrator.client import Client
from orchestrator.reconcile import Looked
from orchestrator.settings import Settings


@saga.define(name="night.correct")
async def correct(found: Looked) -> str:
    return found.key


@reconcile.check("numbers", corrected_by=correct)
def numbers(connection: Any, after: str, limit: int) -> Iterator[Looked]:
    """A thousand things of which every hundredth is bad; slow, so that somebody can come between."""
    time.sleep(0.02)
    for key, is_bad in connection.execute(
        "SELECT id, bad FROM things WHERE id > %s ORDER BY id LIMIT %s", (after, limit)
    ):
        yield Looked(key, "is bad" if is_bad else None)


def main(url: str, order: str, folder: str) -> None:
    client = Client(Settings.from_environment({}, database_url=url), lambda queue, times: None, lambda: "celery")
    if order == "reconcile":
        reconcile.on_breaks(lambda report: print(f"told of {report.breaks}", flush=True))
        client.reconcile(directory=folder)
    else:
        client.prune(timedelta(0), archive=folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
