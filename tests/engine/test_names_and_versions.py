"""What a caller gets of a run whose name the engine chose, or whose saga has gone on to another version."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

from orchestrator import saga
from orchestrator.client import Client
from orchestrator.result import SagaResult
from orchestrator.settings import Settings
from orchestrator.starting import prepare
from orchestrator.step import StepContext, current_step
from orchestrator.store.runs import Outcome


@saga.define(name="versions.ship", version=1)
async def ship(sku: str) -> int:
    return 300


@saga.define(name="versions.ship", version=2)
async def ship_2(sku: str) -> list[str]:
    return [sku]


@saga.define(name="versions.other")
async def other() -> None: ...


def ended(handle_of: Any, version: int, output: Any) -> SagaResult:
    client = Client(Settings.from_environment({}, database_url="postgresql://host/db"), lambda *_: None, str)
    result = SagaResult(client, "r", handle_of)
    result.ended = Outcome("r", "completed", output, None, [], "versions.ship", version, False, [], None)
    return result


def test_a_result_is_read_as_the_version_gives_it_that_the_run_was_started_with() -> None:
    assert ended(ship_2, 1, 300).get() == 300
    assert ended(ship, 2, ["LAMP"]).get() == ["LAMP"]
    assert ended(ship_2, 2, ["LAMP"]).get() == ["LAMP"]
    assert ended(other, 1, 300).get() == 300
    assert ended(None, 1, 300).get() == 300


def started_in(key: str) -> str:
    token = current_step.set(StepContext("r", "k", 1, key, datetime.now(UTC)))
    try:
        return prepare(cast(Any, other), {}, {}, lambda: "celery")[0].id
    finally:
        current_step.reset(token)


def test_a_run_that_a_step_starts_is_named_after_it_however_long_that_is() -> None:
    assert started_in("r:start#0") == "r:start#0:0"
    names = [started_in(f"{'r' * 490}:{step}#0") for step in ("start", "start", "restart")]
    assert names[0] == names[1] != names[2]
    assert all(len(name) <= 500 for name in names)
