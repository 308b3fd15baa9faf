"""Drives an `Execution` by hand: the test decides what a worker reports, and when."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from orchestrator.machine.fold import RunInfo
from orchestrator.machine.journal import Arrival, AttemptEnded, Entry, Parked, Withdrawn, Work, decode_entry, encode
from orchestrator.machine.turn import Execution, Turn
from orchestrator.saga import Saga

T0 = datetime(2026, 1, 1, tzinfo=UTC)


class Stage:
    """A run in memory; steps are named by their key, or by the last part of their task's name."""

    def __init__(
        self, saga: Saga[Any, Any], *args: Any, deadline_s: float | None = None, run_id: str = "run-1"
    ) -> None:
        deadline = None if deadline_s is None else T0 + timedelta(seconds=deadline_s)
        encoded = saga.codec.encode_call(args, {})
        self.saga = saga
        self.info = RunInfo(run_id, saga.name, saga.options.version, encoded, T0, "", deadline)
        self.execution = Execution(self.info, saga.script())
        self.rows: list[tuple[datetime, list[dict[str, Any]]]] = []
        self.work: dict[str, Work] = {}
        self.begun: set[str] = set()
        self.told_to_stop: list[str] = []
        self.corrections: list[Any] = []
        self.seed: list[Entry] = []
        self.now = T0

    # -- time and turns -----------------------------------------------------------------------------------------
    def turn(self, *arrivals: Arrival, at_s: float | None = None, park: Parked | None = None) -> Turn:
        """Take a turn; what was withdrawn and had not begun is reported in a further one."""
        if at_s is not None:
            self.now = T0 + timedelta(seconds=at_s)
        turn = self.execution.turn(arrivals, self.now, park)
        self.rows.append((turn.at, json.loads(json.dumps([encode(entry) for entry in turn.entries]))))
        self.work.update({work.key: work for work in turn.work})
        self.corrections += turn.corrections
        self.seed = turn.seed
        unborn = [key for key in turn.withdraw if key not in self.begun and self.work.pop(key, None)]
        self.told_to_stop += [key for key in turn.withdraw if key not in unborn]
        return self.turn(*map(Withdrawn, unborn)) if unborn else turn

    def begin(self, step: str) -> Work:
        """Commit a begin: from now on the step cannot be withdrawn."""
        work = self.work[self.key(step)]
        self.begun.add(work.key)
        return work

    def end(self, step: str, verdict: str, result: Any = None, **fields: Any) -> AttemptEnded:
        """Return the report of the outstanding attempt of a step, probe or undo."""
        work = self.work.pop(self.key(step))
        self.begun.discard(work.key)
        error = None if verdict == "succeeded" else {"type": "Trouble", "message": verdict}
        return AttemptEnded(work.key, work.role, work.attempt + 1, verdict, result, error, **fields)

    def succeed(self, step: str, result: Any = None) -> Turn:
        return self.turn(self.end(step, "succeeded", result))

    def reject(self, step: str) -> Turn:
        return self.turn(self.end(step, "rejected"))

    def doubt(self, step: str, **fields: Any) -> Turn:
        return self.turn(self.end(step, "doubt", **fields))

    def doubt_until_given_up(self, step: str) -> None:
        key = self.key(step)
        role = self.work[key].role
        while key in self.work and self.work[key].role == role:
            self.doubt(key)

    # -- looking ----------------------------------------------------------------------------------------------------
    def key(self, step: str) -> str:
        """Return the one outstanding key that `step` names."""
        if step in self.work:
            return step
        named = [w.key for w in self.work.values() if w.task.rsplit(".", 1)[-1] == step]
        assert len(named) == 1, f"{step!r} names {named} of {sorted(self.work)}"
        return named[0]

    @property
    def due(self) -> list[tuple[str, str]]:
        """What is outstanding: task name without its module, and role."""
        return [(work.task.rsplit(".", 1)[-1], work.role) for work in self.work.values()]

    @property
    def state(self) -> str:
        return str(self.execution.fold.state)

    @property
    def left(self) -> list[tuple[str, str]]:
        ended = self.execution.fold.ended
        assert ended is not None
        return [(item["key"].rsplit(".", 1)[-1], item["outcome"]) for item in ended.left]

    def tags(self) -> list[str]:
        return [form["e"] for _, forms in self.rows for form in forms]

    def reload(self, saga: Saga[Any, Any] | None = None) -> None:
        """Go on in another process, perhaps with other code."""
        self.execution.discard()
        self.execution = self.loaded(saga)

    def go_on(self) -> None:
        """Begin the next link of a run that was continued as new."""
        continued = self.execution.fold.continued
        assert continued is not None
        self.info = replace(self.info, link=self.info.link + 1, input=continued.input, started=self.now)
        self.rows = [(self.now, [encode(entry) for entry in self.seed])] if self.seed else []
        self.reload()

    def loaded(self, saga: Saga[Any, Any] | None = None) -> Execution:
        execution = Execution(self.info, (saga or self.saga).script())
        execution.catch_up((at, [decode_entry(form) for form in forms]) for at, forms in self.rows)
        return execution
