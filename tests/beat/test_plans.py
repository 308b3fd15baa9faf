"""The statements of beat keep their indexes when there are many slots."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from orchestrator.store import schedules as store
from orchestrator.store.connection import Connection, open_connection

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MANY = """
INSERT INTO orchestrator.schedules (app, name, task, reads, settled_until)
SELECT 'a', 's' || n, 't', 'r', now() FROM generate_series(1, 20) n;
INSERT INTO orchestrator.slots (app, schedule, slot, origin, state, run_id, at)
SELECT 'a', 's' || n % 20, '2026-01-01'::timestamptz + n * interval '1 min', 'schedule', 'started', 'r' || n, now()
FROM generate_series(1, 20000) n;
INSERT INTO orchestrator.slots (app, schedule, slot, origin, state, run_id, at)
SELECT 'a', 's1', '2027-01-01'::timestamptz + n * interval '1 min', 'schedule',
    (ARRAY['running', 'waiting', 'sending'])[n % 3 + 1], 'r' || n, now()
FROM generate_series(1, 30) n;
INSERT INTO orchestrator.runs (id, saga, version, input, root_id, queue, started_at)
SELECT 'r' || n, 's', 1, '{}', 'r' || n, 'q', now() FROM generate_series(1, 6000) n;
ANALYZE;
"""
STATEMENTS: dict[str, tuple[Callable[[Connection], Any], set[str]]] = {
    "standing": (lambda c: store.standing(c, "a"), {"slots_open"}),
    "hold": (lambda c: store.hold(c, "a", "s1", "holder"), {"schedules_pkey"}),
    "open_slots": (lambda c: store.open_slots(c, "a", "s1"), {"slots_open", "runs_pkey"}),
    "unsent": (lambda c: store.unsent(c, "a", ["s2"]), {"slots_open"}),
    "change": (lambda c: store.change(c, "a", "s1", NOW, "sent"), {"slots_pkey"}),
    "listing": (lambda c: store.listing(c, "a"), {"slots_pkey"}),
    "forget": (lambda c: store.forget(c, "a", timedelta(days=1)), {"slots_pkey"}),
    "decide": (
        lambda c: store.decide(c, "a", "s1", NOW, origin="schedule", state="started", run_id="x"), set(),
    ),
}  # fmt: skip


@pytest.fixture
def plans(database_url: str) -> Iterator[tuple[Connection, list[str]]]:
    """A connection to a database with many slots, and the plan of every statement that it runs."""
    with open_connection(database_url, name="test") as connection:
        connection.execute(MANY)
        seen: list[str] = []
        connection.add_notice_handler(lambda notice: seen.append(notice.message_primary or ""))
        connection.execute("LOAD 'auto_explain'")
        for setting in ("log_min_duration = 0", "log_level = notice"):
            connection.execute(f"SET auto_explain.{setting}")  # type: ignore[arg-type]
        seen.clear()
        yield connection, seen


@pytest.mark.parametrize("name", STATEMENTS)
def test_every_statement_keeps_its_index(plans: tuple[Connection, list[str]], name: str) -> None:
    connection, seen = plans
    call, indexes = STATEMENTS[name]
    call(connection)
    text = "\n".join(seen)
    assert seen, "auto_explain shows the plans"
    assert not re.search(r"Seq Scan on (slots|runs)\b", text), text
    assert {index for index in indexes if index not in text} == set(), text
