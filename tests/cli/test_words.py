"""How values read on a terminal."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

from orchestrator.cli import words
from orchestrator.codec import to_message


def test_values_of_plain_tasks_read_without_their_envelopes() -> None:
    given = to_message([Decimal("9.90"), {"on": date(2026, 1, 31)}])
    assert words.value(given) == '["9.90", {"on": "2026-01-31"}]'
    assert words.arguments({"*args": given}) == '"9.90", {"on": "2026-01-31"}'
