"""What a step failed with is its own error, whatever becomes of telling others about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery

from orchestrator import Orchestrator, Rejected, step
from orchestrator.celery.runner import Runner
from orchestrator.step import StepContext
from orchestrator.store.turns import Taken


def _page(*_: Any) -> None:
    raise ConnectionError("nobody answers the pager")


def _exit(*_: Any) -> None:
    raise SystemExit(1)


class _Backend:
    def mark_as_failure(self, *_: Any, **__: Any) -> None:
        raise OSError("the result backend is gone")

    def process_cleanup(self) -> None: ...


@pytest.fixture
def invoke() -> Iterator[Callable[[str], Any]]:
    """Runs a step as a drain does."""
    with Celery("failing", broker="memory://", set_as_current=False) as app:
        orchestrator = Orchestrator(app, database_url="postgresql://host/db")

        def debit() -> None:
            raise Rejected("insufficient funds")

        declare: Any = step
        for name, how in {"pages": {"on_failure": _page}, "exits": {"on_failure": _exit}, "stores": {}}.items():
            declare(name=f"failing.{name}", **how)(debit)
        app.tasks["failing.stores"].backend = _Backend()
        runner = Runner(app, "w@here", orchestrator._transactions, orchestrator._events("w"))
        now = datetime.now(UTC)

        def invoke(name: str) -> Any:
            until = now + timedelta(seconds=30)
            taken = Taken("run", 1, f"{name}#0", "do", name, "q", name, 1, {"a": {}, "t": 30}, 1, until, now)
            return runner.invoke(taken, StepContext("run", taken.key, 1, "run:key", until))

        yield invoke


@pytest.mark.parametrize("name", ["pages", "exits", "stores"])
def test_a_rejected_step_is_rejected_although_telling_of_it_fails(
    name: str, invoke: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """In doubt it would be tried again, and undone: a debit that never was would be credited."""
    invocation = invoke(f"failing.{name}")
    assert isinstance(invocation.error, Rejected) and str(invocation.error) == "insufficient funds"
    assert f"step run:failing.{name}#0 failed, and so did what is told of that" in caplog.text
