"""What steps really did, told by the steps themselves: a file outside Postgres, and a table for transactional steps.

Owns the format of both.  The file is only ever appended to, with one write for each line, so that it survives SIGKILL,
a Postgres that loses its head, and every fault of the engine.  Must never read the engine's tables: its worth is that
it knows nothing of them.

One JSON object a line: ``run``, ``key``, ``attempt``, ``direction`` (do or undo), ``at`` (ISO 8601, UTC), ``pid``, and
``event``: *effect* when the effect took place, *returned* right before the step's function returned normally.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator import step

VARIABLE = "ORCHESTRATOR_EFFECT_LOG"

# Deliberately without any constraint that would hide a second effect.
TABLE = """
CREATE TABLE transactional_effects (
    run_id text NOT NULL, key text NOT NULL, attempt integer NOT NULL, direction text NOT NULL, pid integer NOT NULL
)
"""
INSERT = "INSERT INTO transactional_effects VALUES (:run_id, :key, :attempt, :direction, :pid)"


@dataclass(frozen=True, slots=True)
class Effect:
    """One effect of one attempt."""

    run: str
    key: str
    attempt: int
    direction: str
    at: str = ""
    pid: int = 0
    event: str = "effect"


class EffectLog:
    """Appends to the file of effects."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of_environment(cls) -> EffectLog:
        """Return the log that this process was told to write to."""
        return cls(Path(os.environ[VARIABLE]))

    def append(self, run: str, key: str, attempt: int, direction: str = "do", event: str = "effect") -> None:
        """Write one line with one system call."""
        effect = Effect(run, key, attempt, direction, datetime.now(UTC).isoformat(), os.getpid(), event)
        line = json.dumps(asdict(effect)).encode() + b"\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            assert os.write(file, line) == len(line)
        finally:
            os.close(file)

    def effect(self) -> None:
        """Tell of an effect of the step that runs."""
        self.append(**_current(), event="effect")

    def returned(self) -> None:
        """Tell that the step that runs is about to return normally."""
        self.append(**_current(), event="returned")

    @contextmanager
    def around(self) -> Iterator[None]:
        """Tell of an effect after the block, and that the step returns: for steps that do nothing after it."""
        yield
        self.effect()
        self.returned()


def _current() -> dict[str, Any]:
    context = step.current()
    return {
        # Which tells the links of a run apart that is continued as new, and an undo of a correcting run from its own.
        "run": context.idempotency_key.rpartition(f":{context.key}")[0],
        "key": context.key,
        "attempt": context.attempt,
        "direction": "undo" if context.undoes else "do",
    }


def transactional_row() -> dict[str, Any]:
    """Return the values of `INSERT` for the transactional step that runs."""
    current = _current()
    return {"run_id": current.pop("run"), **current, "pid": os.getpid()}


def read(path: Path, *, growing: bool = False) -> list[Effect]:
    """Return all lines in the order in which they were written; of a log that is growing, those that are whole.

    Raises: ValueError for one that is damaged.
    """
    text = path.read_text()
    written = text.rpartition("\n")[0] if growing else text
    return [Effect(**json.loads(line)) for line in written.splitlines()]
