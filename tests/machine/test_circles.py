"""Who waits for whom: a circle is found if nothing in it can move, and only then; one run of it is told."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.machine.circles import Node, Place, lines, refusals, standing

Waits = dict[Node, list[frozenset[Node]]]


def queue(name: str, *runs: str, first: int) -> list[Place]:
    """Return a queue: who holds the lock, then who waits."""
    return [Place(first + n, run, f"lock:{name}#0", name, holds=n == 0) for n, run in enumerate(runs)]


def told(places: list[Place], awaits: dict[str, list[list[str]]]) -> list[tuple[str, str]]:
    """Return who is refused what, if each of `awaits` waits for all of these locks (by name) and children."""
    waits: Waits = {**lines(sorted(places, key=lambda place: place.number))}
    numbers = {(place.run_id, place.name): place.number for place in places}
    for run, things in awaits.items():
        waits[run] = [frozenset({numbers.get((run, thing), thing)}) for one in things for thing in one]
    by_number = {place.number: place for place in places}
    return [(place.run_id, place.name) for place, _ in refusals(waits, by_number)]


def test_two_runs_that_wait_for_each_other() -> None:
    places = queue("x", "a", "b", first=1) + queue("y", "b", "a", first=5)
    assert told(places, {"a": [["y"]], "b": [["x"]]}) == [("a", "y")]


def test_a_circle_through_two_children_is_told_in_words() -> None:
    places = {place.number: place for place in queue("x", "a", "b/c", first=1) + queue("y", "b", "a/c", first=5)}
    waits: Waits = {**lines(places.values())}
    waits |= {"a": [frozenset({"a/c"})], "b": [frozenset({"b/c"})], "a/c": [frozenset({6})], "b/c": [frozenset({2})]}
    ((place, error),) = refusals(waits, places)
    assert place.run_id == "a/c"
    assert error["message"] == (
        "lock y would never be free: run a/c waits behind b (y), which awaits its child b/c, which waits behind a (x), "
        "which awaits its child a/c"
    )


def test_who_waits_for_anything_else_as_well_may_move() -> None:
    places = queue("x", "a", "b", first=1) + queue("y", "b", "a", first=5)
    assert told(places, {"a": [["y"], ["a/child"]], "b": [["x"]]}) == []
    assert told(places, {"a": [], "b": [["x"]]}) == []


def test_who_stands_behind_a_circle_is_not_told_and_of_two_circles_each_is() -> None:
    places = [
        *queue("x", "a", "b", "c", "d", first=1), *queue("y", "b", "a", first=11), *queue("u", "e", "f", first=21),
        *queue("v", "f", "e", first=31),
    ]  # fmt: skip
    awaits = {"a": [["y"]], "b": [["x"]], "c": [["x"]], "d": [["x"]], "e": [["v"]], "f": [["u"]]}
    assert told(places, awaits) == [("e", "v"), ("a", "y")]


def test_a_queue_moves_if_all_before_do() -> None:
    places = queue("x", "a", "b", "c", first=1)
    waits: Waits = {**lines(places), "b": [frozenset({2})], "c": [frozenset({3})]}
    assert standing(waits) == {}
    assert set(standing({**waits, "b": [frozenset({2}), frozenset({"b"})]})) == set(), "the lock may move it"
    assert set(standing({**waits, "b": [frozenset({"b"})]})) == {"b", 3, "c"}, "it never leaves the queue"


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.integers(0, 7), st.lists(st.frozensets(st.integers(0, 7), min_size=1), max_size=3)))
def test_who_stands_cannot_move_and_who_does_not_can(graph: dict[int, list[frozenset[int]]]) -> None:
    """Played out: whoever may move moves and is gone, until nobody may."""
    waits: Waits = {node: [frozenset[Node](thing) for thing in things] for node, things in graph.items()}
    left = set(waits)
    while movable := {n for n in left if not waits[n] or any(not thing & left for thing in waits[n])}:
        left -= {min(movable, key=str)}
    assert set(standing(waits)) == left


@settings(max_examples=300, deadline=None)
@given(st.lists(st.permutations("abcde").map(lambda runs: runs[:3]), min_size=1, max_size=4))
def test_when_all_are_told_nobody_stands_any_more(queues: list[list[str]]) -> None:
    """Each run waits for all of its places; whoever is told gives its place up, and goes on."""
    places = [place for n, runs in enumerate(queues) for place in queue(f"lock {n}", *runs, first=10 * n)]
    waits: Waits = {**lines(places)}
    for run in "abcde":
        waits[run] = [frozenset[Node]({p.number}) for p in places if p.run_id == run and not p.holds]
    found = refusals(waits, {place.number: place for place in places})
    gone = {node for place, _ in found for node in (place.number, place.run_id)}
    assert standing({node: things for node, things in waits.items() if node not in gone}) == {}
    assert all(later.number != earlier.number for (later, _), (earlier, _) in pairwise(found))
