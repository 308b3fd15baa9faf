"""What saga code may know that is the same on every replay: version gates, identifiers, chance, its own run.

Owns the derivation from run and key, without a row.
"""

from __future__ import annotations

import hashlib
import uuid as _uuid
from dataclasses import dataclass
from datetime import datetime

from orchestrator.codec import is_name
from orchestrator.errors import UsageError
from orchestrator.saga.inside import code_of


def uuid4() -> _uuid.UUID:
    """Return a UUID that is the same on every replay."""
    return _uuid.UUID(bytes=_digest("uuid4")[:16], version=4)


def random() -> float:
    """Return a number in [0, 1) that is the same on every replay."""
    return int.from_bytes(_digest("random")[:7]) / 2.0**56


def _digest(call: str) -> bytes:
    code = code_of(call)
    info = code.fold.info
    run = f"{info.id}~{info.link}" if info.link else info.id
    return hashlib.sha256(f"{run}\0{code.branch.key(call)}".encode()).digest()


def version(change: str, minimum: int, maximum: int) -> int:
    """Answer `maximum` to a run that comes here for the first time, and what it was told then to every replay.

    A run that passed this point before the gate was deployed gets `minimum`.  Raises: UsageError.
    """
    code = code_of("version")
    if not (type(minimum) is type(maximum) is int and minimum <= maximum):
        raise UsageError(
            f"saga.version({change!r:.80}, {minimum!r:.20}, {maximum!r:.20}): the minimum and the maximum are whole "
            "numbers, and the minimum comes first"
        )
    if not is_name(change):
        raise UsageError("saga.version: the name of a change must be text of 1 to 500 printable bytes")
    return code.version(change, minimum, maximum)


@dataclass(frozen=True, slots=True)
class Info:
    """What a saga may know about its run; `deadline` is an aware UTC instant."""

    run_id: str
    name: str
    version: int
    deadline: datetime | None
    attempt: int = 1


def info() -> Info:
    """Return the running saga's own description."""
    run = code_of("info").fold.info
    return Info(run.id, run.saga, run.version, run.deadline)
