"""How the journal of a run reads, where no run of the command line's own tests has such entries."""

from __future__ import annotations

from datetime import UTC, datetime

from orchestrator.cli.timeline import events
from orchestrator.machine.journal import (
    Asked,
    Attempted,
    CancelRefused,
    Carried,
    CodeBegan,
    Late,
    Operated,
    Parked,
    Settled,
    Unasked,
    encode,
)

START = datetime(2026, 1, 1, tzinfo=UTC)


def test_history_says_by_which_error_a_scope_was_left_that_cannot_be_undone_and_what_became_of_it() -> None:
    error = {"type": "ValueError", "message": "after all"}
    entries = [
        Asked("scope#0", "scope#0", {"error": error}, kind="scope"),
        Parked("", "pivot", "it cannot be undone", error),
        Operated("retry", by="ann"),
        Unasked("scope#0"),
    ]
    told = [(event.text, *event.details) for event in events([(0, START, [encode(entry) for entry in entries])])]
    assert told == [
        ("an exception leaves scope#0: what was done inside is to be undone", "ValueError: after all"),
        ("the run parked: it cannot be undone",),
        ("operator: retry by ann",),
        ("scope#0 is taken back: code that is tried again need not ask for it",),
    ]


def test_history_says_why_a_cancel_was_refused() -> None:
    refused = [CancelRefused(), CancelRefused("deadline"), CancelRefused("reported")]
    told = [event.text for event in events([(0, START, [encode(entry) for entry in refused])])]
    assert told == [
        "cancel refused: the point of no return was passed",
        "the deadline changes nothing: the point of no return was passed",
        "cancel refused: a child that is done is undone only with its parent",
    ]


def test_history_says_what_a_link_took_over_and_when_its_code_began() -> None:
    carried = [Carried({}), Carried({"account 7": "lock#0"}, ("n1",), alarmed=True), CodeBegan()]
    told = [event.text for event in events([(0, START, [encode(entry) for entry in carried])])]
    assert told == [
        "took over from the link before: what nobody has heard",
        "took over from the link before: lock account 7, the ids of signals, a deadline that has passed",
        "the saga function begins",
    ]


def test_history_cuts_a_page_of_an_error_and_tells_once_what_parked_a_run() -> None:
    page = {"type": "HTTPError", "message": "<" * 8000}
    blocked = {"type": "BlockedError", "message": "it ran for 30 s"}
    entries = [Asked("do#0", "do", {}), Attempted("do#0", 1, page), Parked("", "code", "it ran for 30 s", blocked)]
    rows = [(0, START, [encode(entry) for entry in entries])]
    _, attempt, parked = events(rows, 160)
    assert len(attempt.details[-1]) == 500 and parked.details == ()
    assert len(events(rows)[1].details[-1]) > 8000


def test_history_does_not_say_that_a_signal_decides_nor_that_a_lease_was_lost_where_none_was() -> None:
    entries = [
        Asked("signal:go#0", "go", {}, kind="signal"),
        Settled("signal:go#0", "succeeded", by="click-1"),
        Asked("do#0", "do", {}),
        Late("do#0", 1),
    ]
    told = [event.text for event in events([(0, START, [encode(entry) for entry in entries])])]
    assert told[1] == "signal:go#0 succeeded (signal click-1)"
    assert told[3] == "do#0 attempt 1 took effect late, after it had been given up"


def test_history_says_which_step_an_item_and_a_call_with_a_key_of_its_own_are_of_and_what_a_page_maps() -> None:
    spec = {"do": {"e": "asked", "key": "", "task": "bank.store"}, "first": 500, "cursor": "x"}
    entries = [
        Asked("[3]", "bank.store", {"tx": 3}),
        Asked("charge-eu", "shop.charge", {}),
        Asked("0/shop.charge#0", "shop.charge", {}),
        Asked("orchestrator.map#1", "orchestrator.map", {"spec": spec}, kind="child"),
    ]
    rows = [(0, START, [encode(entry) for entry in entries])]
    assert [event.text for event in events(rows, 160)] == [
        "[3] (bank.store) asked with (tx=3)",
        "charge-eu (shop.charge) asked with ()",
        "0/shop.charge#0 asked with ()",
        "orchestrator.map#1 asked for bank.store with the items of a page, from number 500",
    ]
    assert '"cursor": "x"' in events(rows)[3].text
