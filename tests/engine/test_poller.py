"""How often a waiting caller asks: not before a result is to be expected, then closely, then ever less."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest

from orchestrator.poller import Poller, _Book, _settle
from orchestrator.store.runs import Outcome

NOW = 1000.0


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> _Book:
    monkeypatch.setattr("orchestrator.poller.monotonic", lambda: NOW)
    book = _Book()
    book.asked_at = NOW
    return book


def test_the_first_pause_lasts_most_of_the_usual_time_and_ten_milliseconds_at_the_most(book: _Book) -> None:
    book.usual_s = 0.01
    assert book.next_pause() == pytest.approx(0.007)
    book.usual_s = 3600.0
    assert book.next_pause() == 0.01


def test_while_a_result_is_to_be_expected_pauses_are_short(book: _Book) -> None:
    book.usual_s, book.asked_at = 0.01, NOW - 0.0075
    assert [book.next_pause() for _ in range(40)] == [0.0005] * 40


@pytest.mark.parametrize(("waited", "pause"), [(0.021, 0.00105), (1.0, 0.05), (60.0, 0.25)])
def test_from_then_on_they_grow_with_the_wait_to_a_quarter_of_a_second(
    book: _Book, waited: float, pause: float
) -> None:
    book.usual_s, book.asked_at = 0.01, NOW - waited
    assert book.next_pause() == pytest.approx(pause)


def test_while_the_database_is_away_it_is_asked_for_now_and_then(book: _Book) -> None:
    book.away = True
    assert book.next_pause() == 0.25


def test_how_long_callers_wait_is_learned(book: _Book) -> None:
    ended = Outcome("run", "completed", None, None, [], "shop", 1, False, [], None)
    book.asked_at = NOW - 0.008
    for _ in range(20):
        book.waiting["run"] = [Future()]
        _settle(book, {**book.waiting}, {"run": ended}, {})
    assert book.usual_s == pytest.approx(0.008, rel=0.01)


class Broken:
    """A pool whose connections cannot be had, for a reason that every caller is to hear."""

    def connection(self) -> Any:
        raise ZeroDivisionError


def test_where_no_thread_can_be_had_the_next_caller_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    poller = Poller(Broken())  # type: ignore[arg-type]
    with monkeypatch.context() as crowded, pytest.raises(RuntimeError, match="new thread"):
        crowded.setattr(threading.Thread, "start", refuse)
        poller.wait("run")
    with pytest.raises(ZeroDivisionError):
        poller.wait("run").result(timeout=30)
