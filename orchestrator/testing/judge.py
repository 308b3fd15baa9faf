"""Whether a run that was made to fail ended well: by the user's own measure, and by what the engine promises.

Owns that judgement.  Works on what the database holds; must never change anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from orchestrator.machine.journal import Asked, RollbackBegan, Settled, Undone
from orchestrator.machine.policy import Effect
from orchestrator.machine.states import TERMINAL
from orchestrator.testing.asking import call
from orchestrator.testing.handle import EnvironmentRun
from orchestrator.testing.stubs import name_of


class Judge:
    """Judges all runs of an environment after a schedule was played."""

    def __init__(self, invariant: Callable[..., Any] | None, may_leave: Sequence[Any]) -> None:
        self._invariant = invariant
        self._may_leave = {name_of(step) for step in may_leave}

    def problem(self, run: EnvironmentRun) -> str:
        """Return what is wrong, in words; nothing if all is well."""
        return next(self._problems(run), "")

    def _problems(self, run: EnvironmentRun) -> Iterator[str]:
        for each in run.environment.runs:
            yield from self._of_the_engine(each)
        yield from self._of_the_user(run)

    def _of_the_user(self, run: EnvironmentRun) -> Iterator[str]:
        if self._invariant is None:
            return
        name = getattr(self._invariant, "__name__", "<lambda>")
        name = "the invariant" if name == "<lambda>" else f"the invariant {name}"
        try:
            kept = call(self._invariant, run=run, environment=run.environment)
        except Exception as error:
            said = str(error).strip()
            yield f"{name} is broken: {type(error).__name__}{': ' if said else ''}{said}"
        else:
            if kept is not None and not kept:
                yield f"{name} is broken: it returned {kept!r}"

    def _of_the_engine(self, run: EnvironmentRun) -> Iterator[str]:
        """What is promised of every run, whatever its saga does."""
        outcome = run.outcome
        state = outcome.state
        parked: list[Any] = outcome.parked
        whole = [item["why"] for item in parked if not item["key"]]
        if whole and state == "parked":
            yield f"run {run.id} is parked, and no retry will help before its code is mended: {whole[0]}"
        elif state not in TERMINAL and state != "parked":
            yield f"run {run.id} is still {state}: it waits for something that nobody sends; send it with waiting="
        elif state in TERMINAL and state != "terminated":
            left: list[Any] = outcome.left
            yield from (
                f"run {run.id} ended {state} and left {item['key']} ({item['outcome']}), which has no undo; "
                "give it one, or list its step in may_leave="
                for item in left
                if item["task"] not in self._may_leave and not item.get("by")
            )
            if state != "completed":
                yield from self._not_undone(run, state)

    @staticmethod
    def _not_undone(run: EnvironmentRun, state: str) -> Iterator[str]:
        """Found again from the journal, apart from what the engine says that it left."""
        entries = run.entries
        if not any(isinstance(entry, RollbackBegan) for entry in entries):
            return
        asked = {entry.key: entry for entry in entries if isinstance(entry, Asked)}
        undone = {entry.key for entry in entries if isinstance(entry, Undone)}
        for entry in entries:
            if not isinstance(entry, Settled) or entry.outcome not in ("succeeded", "unknown"):
                continue
            request = asked[entry.key]
            if request.undo is not None and request.effect != Effect.NONE and entry.key not in undone:
                yield f"run {run.id} ended {state}, and {entry.key} ({entry.outcome}) was not undone"
