"""Circles of runs that wait for each other, and who of them is to be told.

Owns what follows from who waits for whom.  Must never guess: a run that waits for anything besides locks and children
may be moved by that, and is in no circle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.machine.fold import Fold
from orchestrator.machine.journal import Error
from orchestrator.machine.states import Backward

Node = str | int  # a run by its id, or a place in the queue of a lock by its number
Waits = Mapping[Node, Iterable[frozenset[Node]]]


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the queue of a lock; whoever `holds` it waits no more."""

    number: int  # first come, first served
    run_id: str
    key: str
    name: str
    holds: bool


def lines(places: Iterable[Place]) -> dict[Node, list[frozenset[Node]]]:
    """Return what each place that still waits waits for: the place before it, and the run in that place.

    `places` are in the order of their numbers.
    """
    before: dict[str, frozenset[Node]] = {}
    waits: dict[Node, list[frozenset[Node]]] = {}
    for place in places:
        if not place.holds and place.name in before:
            waits[place.number] = [before[place.name]]
        ahead = before.get(place.name, frozenset()) if place.holds else frozenset[Node]()
        before[place.name] = ahead | {place.run_id} | (frozenset() if place.holds else {place.number})
    return waits


def standing(waits: Waits) -> dict[Node, list[frozenset[Node]]]:
    """Return who can never move: each of the things it waits for has to wait for another one that cannot."""
    left = {node: list(things) for node, things in waits.items()}
    moved = True
    while moved:
        moved = False
        for node, things in list(left.items()):
            if not things or any(left.keys().isdisjoint(thing) for thing in things):
                del left[node]
                moved = True
    return left


def awaited_by(fold: Fold, places: Mapping[str, int]) -> list[frozenset[Node]]:
    """Return what a run waits for, by the places of its locks; nothing if it may move by itself.

    That it is running, none of its timers is set and nothing for it unread is for the caller to know.
    """
    waits: list[frozenset[Node]] = []
    if fold.stop is not None:
        return []
    for step in fold.steps.values():
        if step.settled and step.backward is not Backward.ASKED:
            continue
        if step.abandoned or step.settled:
            return []
        if step.asked.kind == "child":
            waits.append(frozenset({fold.info.child(step.key)}))
        elif step.asked.kind == "lock" and step.key in places:
            waits.append(frozenset({places[step.key]}))
        else:
            return []
    return waits


def refusals(waits: Waits, places: Mapping[int, Place]) -> list[tuple[Place, Error]]:
    """Return who is to be told that it will never be let in, one of each circle: who came last."""
    left = standing(waits)
    found: list[tuple[Place, Error]] = []
    while True:
        youngest = (places[node] for node in sorted(node for node in left if isinstance(node, int))[::-1])
        place, way = next(((place, way) for place in youngest if (way := _way_back(left, place))), (None, []))
        if place is None:
            return found
        found.append((place, _error(place, _told(way, places))))
        left = standing({node: things for node, things in left.items() if node not in (place.number, place.run_id)})


def _way_back(left: Waits, place: Place) -> list[tuple[Node, Node]]:
    """Return the shortest way from a place to the run that waits in it, as (from, to); empty if there is none."""
    came: dict[Node, Node] = {}
    ahead = deque[Node]([place.number])
    while ahead and place.run_id not in came:
        here = ahead.popleft()
        for other in sorted(frozenset[Node]().union(*left[here]) & left.keys(), key=str):
            if other not in came:
                came[other] = here
                ahead.append(other)
    way: list[tuple[Node, Node]] = []
    node: Node = place.run_id
    while node in came and node != place.number:
        way.append((came[node], node))
        node = came[node]
    return way[::-1]


def _told(way: list[tuple[Node, Node]], places: Mapping[int, Place]) -> str:
    """Return a way in words: the runs, and for what each waits behind the next."""
    words = []
    for waiting, run_id in way:
        if isinstance(run_id, int):
            continue  # a run that goes to its place in a queue, or a place behind another one
        if isinstance(waiting, int):
            words.append(f"waits behind {run_id} ({places[waiting].name})")
        else:
            words.append(f"awaits its child {run_id}")
    return ", which ".join(words)


def _error(place: Place, way: str) -> Error:
    return {"type": "DeadlockError", "message": f"lock {place.name} would never be free: run {place.run_id} {way}"}
