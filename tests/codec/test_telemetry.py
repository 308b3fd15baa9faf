"""Observers of what happened."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

import pytest

from orchestrator import telemetry

EVENT = telemetry.RunStarted(run_id="order-42", saga="checkout", at=datetime(2026, 1, 1, tzinfo=UTC), version=1)


def test_observers_see_events_until_they_unsubscribe() -> None:
    seen: list[telemetry.Event] = []
    unsubscribe = telemetry.subscribe(seen.append)
    telemetry.emit(EVENT)
    unsubscribe()
    telemetry.emit(EVENT)
    assert seen == [EVENT]


def test_an_observer_that_raises_is_logged_once_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: telemetry.Event) -> None:
        raise ValueError("no")

    seen: list[telemetry.Event] = []
    ends = [telemetry.subscribe(broken), telemetry.subscribe(seen.append)]
    with caplog.at_level(logging.ERROR, logger="orchestrator.telemetry"):
        telemetry.emit(EVENT)
        telemetry.emit(EVENT)
    for end in ends:
        end()
    assert seen == [EVENT, EVENT]
    assert len(caplog.records) == 1
    assert "order-42" in caplog.text
