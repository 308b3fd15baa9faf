"""What is said about a seed, and the one law that the checker does not have: what is there, and why.

Owns the comparison of the provider with the journals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

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


def left_at_the_provider(database_url: str, provider: Provider) -> Iterator[str]:
    """Yield what is there and on no record, and what is on record and not there.

    Of each run that was not terminated: a success that was not undone is there; what is there succeeded, or is listed
    as left.
    """
    with psycopg.connect(database_url) as connection:
        rows = connection.execute(
            "SELECT id, saga, version, input, started_at, queue, left_effects, state FROM orchestrator.runs"
        ).fetchall()
        for run_id, saga, version, given, started, queue, left, state in rows:
            fold = Fold(RunInfo(run_id, saga, version, given, started, queue))
            journal = connection.execute(
                "SELECT at, entries FROM orchestrator.journal WHERE run_id = %s ORDER BY seq", [run_id]
            )
            for at, entries in journal:
                fold.apply_row(at, [decode_entry(entry) for entry in entries])
            if state != "terminated" and "/late/" not in run_id:
                yield from _compare(fold, {item["key"] for item in left}, provider)


def _compare(fold: Fold, left: set[str], provider: Provider) -> Iterator[str]:
    for key, step in fold.steps.items():
        if step.asked.task not in steps.AT_THE_PROVIDER:
            continue
        there = int(step.asked.args["n"]) in provider.present
        undone = step.backward is not Backward.NONE
        if there and key not in left and (undone or step.forward is not Forward.SUCCEEDED):
            yield f"{fold.info.id} {key}: its effect is there, and it is {step.forward}, undo {step.backward}"
        if not there and step.forward is Forward.SUCCEEDED and not undone:
            yield f"{fold.info.id} {key}: it succeeded and was not undone, and its effect is not there"
