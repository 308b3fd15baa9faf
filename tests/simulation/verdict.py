"""What is said about a seed, and the laws that the checker does not have: what is there, and why; who is kept.

Owns the comparison of the provider with the journals, and of the journals of a family with each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg

from orchestrator.machine.fold import Fold, RunInfo
from orchestrator.machine.journal import decode_entry
from orchestrator.machine.states import Backward, Forward
from tests.simulation import steps
from tests.simulation.provider import Provider


@dataclass(slots=True)
class Verdict:
    """What was broken by a seed, what happened to it, and how its runs ended."""

    seed: int
    broken: list[str]
    happened: Counter[str]
    states: Counter[str]
    schedule: str  # a digest of every move, in order


@dataclass(slots=True)
class _Told:
    """A run as its row and its journal tell it; a link that has ended still has the id that it had then."""

    shown: str
    state: str
    left: set[str]
    fold: Fold


_RUNS = """
SELECT id, state, left_effects, CASE WHEN state = 'continued' THEN parent_id ELSE id END AS was, saga, version, input,
    started_at, queue, CASE WHEN root_id <> id THEN parent_id END, link, since
FROM orchestrator.runs WHERE NOT id LIKE '%/late/%' ORDER BY id
"""
_JOURNAL = "SELECT at, entries FROM orchestrator.journal WHERE run_id = %s ORDER BY seq"


def disagreements(database_url: str, provider: Provider) -> Iterator[str]:
    """Yield what is there and on no record, and what is on record and not there; what the runs of a family disagree on.

    Of each run that was not terminated: a success that was not undone is there; what is there succeeded, or is listed
    as left; a child is kept or undone with it.  A signal is heard once by all links of a run together.
    """
    with psycopg.connect(database_url) as connection:
        runs = [_told(connection, *row) for row in connection.execute(_RUNS).fetchall()]
    states = {told.shown: told.state for told in runs}
    yield from _heard_twice(runs)
    for told in runs:
        if told.state != "terminated":
            yield from _compare(told, provider)
            yield from _children(told, states)


def _told(connection: psycopg.Connection, shown: str, state: str, left: list[dict[str, str]], *about: Any) -> _Told:
    *known, parent, link, since = about
    fold = Fold(RunInfo(*known, parent=parent or "", link=link, since=since))
    for at, entries in connection.execute(_JOURNAL, [shown]):
        fold.apply_row(at, [decode_entry(entry) for entry in entries])
    return _Told(shown, state, {item["key"] for item in left}, fold)


def _compare(told: _Told, provider: Provider) -> Iterator[str]:
    for key, step in told.fold.steps.items():
        if step.asked.task not in steps.AT_THE_PROVIDER:
            continue
        there = int(step.asked.args["n"]) in provider.present
        undone = step.backward is not Backward.NONE
        if there and key not in told.left and (undone or step.forward is not Forward.SUCCEEDED):
            yield f"{told.shown} {key}: its effect is there, and it is {step.forward}, undo {step.backward}"
        if not there and step.forward is Forward.SUCCEEDED and not undone:
            yield f"{told.shown} {key}: it succeeded and was not undone, and its effect is not there"


def _children(told: _Told, states: dict[str, str]) -> Iterator[str]:
    kept_by = told.state in ("completed", "continued")
    for step in told.fold.children:
        state = states.get(told.fold.info.child(step.key), "")
        kept = kept_by and step.forward is Forward.SUCCEEDED and step.backward is Backward.NONE
        if state == "completed" and not (kept or step.was_skipped):
            yield f"{told.shown} {step.key}: it is {step.forward}, undo {step.backward}, and the child is completed"
        if kept and state not in ("completed", "terminated"):
            yield f"{told.shown} {step.key}: it succeeded and is kept, and the child is {state or 'not there'}"


def _heard_twice(runs: list[_Told]) -> Iterator[str]:
    heard: Counter[tuple[str, str]] = Counter()
    for told in runs:
        awaited = (step for step in told.fold.steps.values() if step.asked.kind == "signal" and not step.abandoned)
        heard.update((told.fold.info.id, step.signal_id) for step in awaited if step.forward is Forward.SUCCEEDED)
    for (run_id, signal), times in heard.items():
        if times > 1:
            yield f"{run_id}: signal {signal!r} was heard {times} times"
