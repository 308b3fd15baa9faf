"""A step is interrupted when its time is over, in the main thread and in others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator.celery import runner
from orchestrator.celery.runner import StepTimeout, time_limit


def spin(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.001)


def in_this_thread(work: Callable[[], object]) -> object:
    assert threading.current_thread() is threading.main_thread()
    return work()


def in_another_thread(work: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result(60)


WHERE = pytest.mark.parametrize("within", [in_this_thread, in_another_thread])


@WHERE
def test_a_step_that_overruns_is_interrupted(within: Callable[[Callable[[], object]], object]) -> None:
    def overrun() -> None:
        with time_limit(0.05):
            spin(30.0)

    with pytest.raises(StepTimeout, match=r"start_to_close_timeout of 0\.05 s"):
        within(overrun)


@WHERE
def test_what_ended_in_time_is_left_alone(within: Callable[[Callable[[], object]], object]) -> None:
    def several() -> int:
        ended = 0
        for _ in range(50):
            with time_limit(0.01):
                ended += 1
            spin(0.001)
        spin(0.1)
        return ended

    assert within(several) == 50


def test_of_a_step_that_takes_long_somebody_is_told_once_and_it_is_interrupted_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "_HANGS_AFTER_S", 0.05)
    told: list[float] = []
    began = time.monotonic()
    with pytest.raises(StepTimeout), time_limit(0.2, lambda: told.append(time.monotonic() - began)):
        spin(30.0)
    assert len(told) == 1 and told[0] >= 0.05
    assert time.monotonic() - began >= 0.2


def test_of_what_has_little_time_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_HANGS_AFTER_S", 0.05)
    told: list[int] = []
    with pytest.raises(StepTimeout), time_limit(0.04, lambda: told.append(1)):
        spin(30.0)
    assert told == []
