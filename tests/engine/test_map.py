"""A step for each of many items, page by page, on a real database."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from orchestrator import MapFailed, Rejected, RetryPolicy, SagaFailed, saga, step
from orchestrator.client import Client
from orchestrator.codec import text
from orchestrator.saga.mapping import run_page
from orchestrator.store.connection import Connection
from tests.engine.stage import Child, entries, kinds, run, state, until

AT_ONCE = RetryPolicy(timedelta(0), 1.0, timedelta(0), 2)
DONE: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_done() -> None:
    DONE.clear()


@step(retry=AT_ONCE)
def restore(n: int, by: int, result: int | None) -> None:
    DONE.append(("undo", n, result))


@step(compensate=restore, retry=AT_ONCE)
def double(n: int, by: int = 2) -> int:
    if n < 0:
        raise Rejected(f"{n} is negative")
    DONE.append(n)
    return n * by


@step(retry=AT_ONCE)
def pages(cursor: int | None) -> tuple[list[int], int | None]:
    first = cursor or 0
    return list(range(first, first + 4)), first + 4 if first < 8 else None


@saga.define
async def mapping(items: list[Any], tolerate: float = 0, collect: bool = False, page: int = 5) -> dict[str, Any]:
    summary = await saga.map(double, items, concurrency=3, tolerate=tolerate, collect=collect, page=page)
    return {
        "total": summary.total, "failed": summary.failed, "failures": [f["index"] for f in summary.failures],
        "results": list(summary.results),
    }  # fmt: skip


@saga.define
async def paging() -> list[int]:
    summary = await saga.map(double, pages, collect=True)
    return list(summary.results)


@step(compensate=restore, retry=AT_ONCE)
def spell(n: int, by: int = 2) -> str:
    DONE.append(n)
    return "x" * 3000


@saga.define
async def spelling(items: list[int]) -> int:
    return len((await saga.map(spell, items, collect=True)).results)


@saga.define
async def catching(items: list[Any]) -> str:
    try:
        await saga.map(double, items)
    except MapFailed as error:
        return f"{error.summary.failed} of {error.summary.total}: {error.summary.failures[0]['message']}"
    return "all well"


@saga.define
async def unstorable() -> str:
    summary = await saga.map(double, (n if n != 7 else object() for n in range(10)), tolerate=1, page=3)
    return f"{summary.failures[0]['index']} {summary.failures[0]['type']}"


@saga.define
async def rated(rate: str) -> int:
    return (await saga.map(double, range(6), rate=rate)).succeeded


@step(retry=AT_ONCE, concurrency=1, key="n")
def put_back(n: int) -> None:
    DONE.append(("put back", n))


@step(compensate=put_back, retry=AT_ONCE)
def pick(n: int) -> None:
    DONE.append(n)


@step(retry=AT_ONCE)
def numbers(cursor: int | None, first: int, many: int) -> tuple[list[int], int | None]:
    n = first if cursor is None else cursor
    return list(range(n, min(n + 2, first + many))), n + 2 if n + 2 < first + many else None


@saga.define
async def picked(then: str) -> None:
    await saga.map(pick, [1, 2])
    if then == "fail":
        raise ValueError("no")


@saga.define
async def between(first: int, many: int) -> list[int]:
    return list((await saga.map(double, numbers, args=(first, many), collect=True)).results)


@saga.define
async def misread(what: str) -> None:
    args = () if what == "text" else (1,)
    await saga.map(double, {"iterable": [1], "too few": numbers, "text": "abc"}[what], args=args)


def test_every_item_is_done_once_and_results_come_in_order(child: Child, client: Client) -> None:
    result = run(client, child, mapping, list(range(12)), 0, True)
    found = result.get(timeout=60)
    assert (found["total"], found["failed"], found["results"]) == (12, 0, [2 * n for n in range(12)])
    assert sorted(DONE) == list(range(12))


def test_the_history_of_the_run_grows_by_pages_not_items(child: Child, client: Client, connection: Connection) -> None:
    run(client, child, mapping, list(range(12))).get(timeout=60)
    assert kinds(connection).count("asked") == 3


def test_no_items_are_a_map_as_well(child: Child, client: Client) -> None:
    assert run(client, child, mapping, []).get(timeout=60)["total"] == 0


def test_failures_are_told_by_their_index_and_tolerated(child: Child, client: Client) -> None:
    found = run(client, child, mapping, [1, -1, 2, 3, 4, 5, -2, 6], 0.5, True).get(timeout=60)
    assert (found["failed"], found["failures"]) == (2, [1, 6])
    assert found["results"] == [2, None, 4, 6, 8, 10, None, 12]


def test_results_are_collected_beside_more_failures_than_are_told(child: Child, client: Client) -> None:
    found = run(client, child, mapping, [*[-1] * 120, 4], 0.999, True, 200).get(timeout=60)
    assert (found["failed"], len(found["failures"]), found["results"]) == (120, 100, [*[None] * 120, 8])


def test_results_that_are_too_large_together_park_their_page_and_undo_nothing(
    child: Child, client: Client, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(client, child, spelling, list(range(100)))
    page = f"run/{run_page.name}#0"
    assert "raise the limit in all workers" in str(client.outcome(page).parked)
    monkeypatch.setattr(text, "_limit_bytes", 400_000)
    client.operate(page, "retry")
    child.drain()
    assert (result.get(timeout=60), sorted(DONE)) == (100, list(range(100)))


def test_too_many_failures_undo_every_item_that_was_done(child: Child, client: Client, connection: Connection) -> None:
    result = run(client, child, mapping, [1, 2, 3, 4, 5, 6, -1])
    with pytest.raises(SagaFailed, match=r"MapFailed: 1 of 7 items .*item 6: Rejected: -1 is negative"):
        result.get(timeout=60)
    undone = {what[1:] for what in DONE if isinstance(what, tuple)}
    assert undone == {(n, 2 * n) for n in range(1, 7)}
    assert state(connection) == "compensated"


def test_a_saga_may_catch_it(child: Child, client: Client) -> None:
    assert run(client, child, catching, [1, -1]).get(timeout=60) == "1 of 2: -1 is negative"


def test_an_item_that_cannot_be_stored_is_a_failure_of_its_own(child: Child, client: Client) -> None:
    assert run(client, child, unstorable).get(timeout=60).startswith("7 ")


def test_a_paging_step_is_asked_until_it_has_no_cursor(child: Child, client: Client, connection: Connection) -> None:
    assert run(client, child, paging).get(timeout=60) == [2 * n for n in range(12)]
    assert kinds(connection).count("asked") == 3


def test_a_rate_spreads_the_items(child: Child, client: Client) -> None:
    result = client.start(rated, ("1000/s",), {}, {})
    until(child, result.ready)
    assert result.get(timeout=60) == 6


@pytest.mark.parametrize("rate", ["-1/s", "0/s", "many"])
def test_a_rate_that_is_none_parks_the_run_with_the_reason(
    child: Child, client: Client, connection: Connection, rate: str
) -> None:
    run(client, child, rated, rate)
    assert state(connection) == "parked"
    assert "a rate is a positive number" in str(client.outcome("run").parked)


def test_the_undo_of_an_item_has_the_limits_of_its_own_declaration(
    child: Child, client: Client, connection: Connection
) -> None:
    result = run(client, child, picked, "fail")
    until(child, result.ready)
    assert DONE == [1, 2, ("put back", 2), ("put back", 1)]
    asked = [entry for entry in entries(connection, f"run/{run_page.name}#0") if entry["e"] == "asked"]
    assert [entry["undo"]["limit"] for entry in asked] == [{"gate": f"{put_back.name}:{n}", "most": 1} for n in (1, 2)]


def test_a_paging_step_takes_arguments_of_its_own_after_the_cursor(child: Child, client: Client) -> None:
    assert run(client, child, between, 10, 5).get(timeout=60) == [20, 22, 24, 26, 28]


@pytest.mark.parametrize(
    ("what", "why"),
    [("iterable", "args= are for a paging step"), ("too few", "missing"), ("text", "text is one item, not many")],
)
def test_what_makes_no_map_parks_the_run_with_the_reason(
    child: Child, client: Client, connection: Connection, what: str, why: str
) -> None:
    run(client, child, misread, what)
    assert state(connection) == "parked"
    assert why in str(client.outcome("run").parked)
