"""How durations, instants and values read on a terminal.

Owns formatting alone.  Must never print, and never look at a clock.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from orchestrator.codec import without_envelopes
from orchestrator.errors import message_of

ERROR_ROOM = 500  # of an error's text where it is one thing among others: 8 KiB of it are recorded

_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"))


def duration(length: timedelta) -> str:
    """Return a duration with at most two units: ``8 ms``, ``1.2 s``, ``2 min 5 s``, ``3 d 4 h``."""
    seconds = abs(length.total_seconds())
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    left = round(seconds)
    parts: list[str] = []
    for size, unit in (*_UNITS, (1, "s")):
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count} {unit}" if count else "")
    return " ".join(part for part in parts[:2] if part)


def moment(at: datetime) -> str:
    """Return an instant in the local time zone, to the second."""
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S}"


def clock(at: datetime, now: datetime) -> str:
    """Return the time of day of an instant, with the date if that is another day than `now`'s."""
    local = at.astimezone()
    return f"{local:%H:%M:%S}" if local.date() == now.astimezone().date() else moment(at)


def ago(at: datetime, now: datetime) -> str:
    """Return how far an instant is from now: ``12 s ago``, ``in 3 h``."""
    away = duration(timedelta(seconds=max(1, round(abs((at - now).total_seconds())))))
    return f"in {away}" if at > now else f"{away} ago"


def value(json_value: Any, room: int = 0) -> str:
    """Return a JSON value as compact text without Celery's envelopes, cut to `room` characters (0: whole)."""
    return cut(json.dumps(without_envelopes(json_value), ensure_ascii=False, separators=(", ", ": ")), room)


def cut(text: str, room: int) -> str:
    """Return a text cut to `room` characters (0: whole)."""
    return text if not room or len(text) <= room else text[: max(1, room - 1)] + "…"


def arguments(call: Any, room: int = 0) -> str:
    """Return the encoded arguments of a call as they would be written: ``order=7, lines=[]``."""
    if not isinstance(call, dict):
        return value(call, room)
    parts = []
    for name, item in call.items():
        if name.startswith("**") and isinstance(item, dict):
            parts += [f"{key}={value(inner)}" for key, inner in item.items()]
        elif name.startswith("*") and isinstance(item, list):
            parts += [value(inner) for inner in item]
        else:
            parts.append(f"{name}={value(item)}")
    return cut(", ".join(parts), room)


def error(described: dict[str, Any] | None, room: int = 0) -> str:
    """Return the first line of a described exception: ``ValueError: no such address``; cut to `room` (0: whole)."""
    if not described:
        return "no error was recorded"
    lines = message_of(described).strip().splitlines()
    kind = str(described.get("type") or "Error")
    return cut(f"{kind}: {lines[0]}" if lines else kind, room)


def says(text: str, described: dict[str, Any] | None) -> bool:
    """Tell whether a text says all that there is to say of an exception."""
    return bool(described) and (error(described) in text or text in error(described))


def many(number: int, one: str, more: str) -> str:
    """Return a number with the words that go with it: ``1 run is``, ``2 runs are``."""
    return f"{number} {one if number == 1 else more}"


def short(name: str) -> str:
    """Return the last part of a dotted name."""
    return name.rpartition(".")[2]


def plain(item: Any) -> Any:
    """Return what ``json.dumps`` cannot write by itself: instants in UTC, ISO 8601."""
    if isinstance(item, datetime):
        return item.astimezone(UTC).isoformat()
    raise TypeError(f"{type(item).__name__} has no JSON form")
