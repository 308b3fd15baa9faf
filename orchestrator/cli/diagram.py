"""``diagram``: Mermaid of a run as it happened, and of the state machines from their transition tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

import click

from orchestrator.cli import words
from orchestrator.cli.command import Command, as_json, print_json, reading, run_of
from orchestrator.cli.timeline import Event, events
from orchestrator.machine.journal import (
    Asked,
    Attempted,
    CancelAsked,
    DeadlinePassed,
    Ended,
    Late,
    Operated,
    Parked,
    ProbeAsked,
    Raised,
    Restored,
    Returned,
    RollbackBegan,
    Settled,
    UndoAsked,
    Undone,
)
from orchestrator.machine.states import (
    BACKWARD_TRANSITIONS,
    FORWARD_TRANSITIONS,
    RUN_TRANSITIONS,
    Backward,
    Forward,
    RunState,
)
from orchestrator.store import runs

_ROOM, _NOTE = 60, 100  # characters of a value, of a note
_MACHINES: dict[str, tuple[Mapping[Any, Mapping[str, Any]], StrEnum]] = {
    "run": (RUN_TRANSITIONS, RunState.PENDING),
    "step": (FORWARD_TRANSITIONS, Forward.ASKED),
    "undo": (BACKWARD_TRANSITIONS, Backward.NONE),
}


@click.command(cls=Command)
@click.argument("run_id", metavar="[RUN]", required=False)
@click.option("--states", type=click.Choice(list(_MACHINES)), is_flag=False, flag_value="run",
              help="Draw the states of a run (or of a step, or of its undo) instead.")  # fmt: skip
@as_json
@click.pass_context
def diagram(ctx: click.Context, run_id: str | None, states: str | None, json_: bool) -> None:
    """Draw RUN as it happened, as a Mermaid sequence diagram.

    Paste it into Markdown between ```mermaid and ```. With --states, the state machine that all runs obey.
    """
    if (run_id is None) == (states is None):
        raise click.UsageError("name a RUN, or say --states")
    if states is not None:
        drawing = state_diagram(*_MACHINES[states])
    else:
        with reading(ctx) as connection:
            run = run_of(connection, str(run_id))
            drawing = sequence_diagram(run["saga"], events(runs.history(connection, str(run_id)), _ROOM))
    if json_:
        print_json({"mermaid": drawing})
    else:
        click.echo(drawing)


# -- states ------------------------------------------------------------------------------------------------------------
def state_diagram(transitions: Mapping[Any, Mapping[str, Any]], first: StrEnum) -> str:
    """Return a Mermaid state diagram of a transition table."""
    lines = ["stateDiagram-v2", f"    [*] --> {first}"]
    for state, moves in transitions.items():
        lines += [f"    {state} --> {target}: {event}" for event, target in moves.items()]
        if not moves:
            lines.append(f"    {state} --> [*]")
    return "\n".join(lines)


# -- a run -------------------------------------------------------------------------------------------------------------
def sequence_diagram(saga: str, found: Iterable[Event]) -> str:
    """Return a Mermaid sequence diagram of a run: the saga on the left, a column for each task."""
    drawing = _Drawing()
    for event in found:
        drawing.add(event)
    columns = [f"    participant {id_} as {_safe(words.short(task))}" for task, id_ in drawing.columns.items()]
    return "\n".join(
        ["sequenceDiagram", f"    participant saga as {_safe(words.short(saga))}", *columns, *drawing.lines]
    )


class _Drawing:
    """The lines drawn so far, and the columns that they need."""

    def __init__(self) -> None:
        self.columns: dict[str, str] = {}
        self.lines: list[str] = []
        self._asked: dict[str, Asked] = {}

    def add(self, event: Event) -> None:
        """Draw an event, if it belongs into a drawing."""
        entry = event.entry
        match entry:
            case Asked():
                self._asked[entry.key] = entry
                self._call(entry.task, f"{self._short(entry.key)}({words.arguments(entry.args, _ROOM)})")
            case Attempted():
                self._answer(
                    "--x", self._task(entry.key, entry.role), f"attempt {entry.attempt}: {words.error(entry.error)}"
                )
            case Settled() if entry.by == "" and entry.outcome in ("succeeded", "rejected"):
                said = words.value(entry.result, _ROOM) if entry.outcome == "succeeded" else words.error(entry.error)
                arrow = "-->>" if entry.outcome == "succeeded" else "--x"
                self._answer(
                    arrow, self._task(entry.key), said if entry.outcome == "succeeded" else f"rejected: {said}"
                )
            case Settled():
                self._note(event.text)
            case ProbeAsked():
                self._call(self._task(entry.key, "probe"), f"what became of {self._short(entry.key)}?")
            case UndoAsked():
                self._call(self._task(entry.key, "undo"), f"undo {self._short(entry.key)}")
            case Undone() if entry.how == "done":
                self._answer("-->>", self._task(entry.key, "undo"), "undone")
            case (
                Undone() | Late() | Parked() | Operated() | Returned() | Raised() | CancelAsked() | DeadlinePassed()
                | RollbackBegan() | Restored() | Ended()
            ):  # fmt: skip
                self._note(event.text)

    def _task(self, key: str, role: str = "do") -> str:
        asked = self._asked[key]
        undo = asked.undo.task if asked.undo else asked.task
        return {"undo": undo, "probe": asked.probe}.get(role, asked.task)

    def _short(self, key: str) -> str:
        """Return a key without the module of its task."""
        task = self._asked[key].task
        return key.replace(task, words.short(task))

    def _column(self, task: str) -> str:
        return self.columns.setdefault(task, f"t{len(self.columns) + 1}")

    def _call(self, task: str, text: str) -> None:
        self.lines.append(f"    saga->>{self._column(task)}: {_safe(text)}")

    def _answer(self, arrow: str, task: str, text: str) -> None:
        self.lines.append(f"    {self._column(task)}{arrow}saga: {_safe(text)}")

    def _note(self, text: str) -> None:
        self.lines.append(f"    Note over saga: {_safe(text if len(text) <= _NOTE else text[: _NOTE - 1] + '…')}")


_ENTITIES = str.maketrans({"#": "#35;", ";": "#59;", "<": "#60;", ">": "#62;", "\n": " ", "\r": " "})


def _safe(text: str) -> str:
    """Return text in which Mermaid finds no syntax."""
    return text.translate(_ENTITIES) or " "
