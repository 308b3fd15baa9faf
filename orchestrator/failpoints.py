"""Named points at the boundaries of this package, at which a test may end the process or cut its connection.

Owns the points that are armed in this process.  They are armed by the environment alone, when this module is imported:
``ORCHESTRATOR_FAILPOINTS="commit.before=exit;commit.after=raise@3"`` ends the process as SIGKILL does right before a
turn is committed, and breaks the connection right after the third commit: it happened, and who asked is told that it
failed.  A point acts once, at its first hit or at the one that is given.  With ``ORCHESTRATOR_FAILPOINTS_FIRED`` naming
a folder, it acts once for all processes that share the folder, so that a process that is started again goes on; what
acted is recorded there.  Not armed, a point costs less than 0.1 µs.  Must never import anything of this package.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

__all__ = ["EXIT_CODE", "FIRED", "VARIABLE", "arm", "failpoint"]

VARIABLE: Final = "ORCHESTRATOR_FAILPOINTS"
FIRED: Final = "ORCHESTRATOR_FAILPOINTS_FIRED"
EXIT_CODE: Final = 137  # what a shell reports of a process that SIGKILL has ended


@dataclass(slots=True)
class _Order:
    """What a point is to do, at which of its hits."""

    action: str
    at: int
    hits: Iterator[int] = field(default_factory=lambda: itertools.count(1))


_orders: dict[str, _Order] = {}
_folder: Path | None = None


def failpoint(name: str, connection: Any = None) -> None:
    """Mark a boundary; `connection` is the one that breaks if the point was armed to raise.

    Names are literals, each in one place, so that a test can list them.
    """
    if _orders:
        _reach(name, connection)


def arm(environment: Mapping[str, str]) -> None:
    """Arm the points that an environment names, and no others.  Raises: ValueError for what cannot be read."""
    global _orders, _folder
    named = filter(None, (part.strip() for part in environment.get(VARIABLE, "").split(";")))
    _orders = dict(map(_order, named))
    _folder = Path(environment[FIRED]) if environment.get(FIRED) else None


def _order(text: str) -> tuple[str, _Order]:
    name, _, rest = text.partition("=")
    action, _, at = rest.partition("@")
    if not name or action not in _ACTIONS or not (at or "1").isdecimal() or at == "0":
        raise ValueError(f"{VARIABLE}: {text!r} is not name=exit or name=raise, with @n for the n-th hit")
    return name, _Order(action, int(at or 1))


def _reach(name: str, connection: Any) -> None:
    order = _orders.get(name)
    if order is not None and next(order.hits) == order.at and _is_first(name, order.action):
        _ACTIONS[order.action](name, connection)


def _is_first(name: str, action: str) -> bool:
    """Record that a point acts; False if it has acted in this or another process."""
    if _folder is None:
        return True
    try:
        file = os.open(_folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    os.write(file, f"{action} {os.getpid()}\n".encode())
    os.close(file)
    return True


def _exit(name: str, connection: Any) -> NoReturn:
    os._exit(EXIT_CODE)


def _raise(name: str, connection: Any) -> None:
    """Break the connection as a network does, and let its own driver raise what it raises then."""
    if connection is None:
        raise ConnectionError(f"cut at failpoint {name}")
    # SQLAlchemy's connection wraps the driver's.
    driver = getattr(getattr(connection, "connection", connection), "driver_connection", connection)
    driver.close()
    execute: Callable[[str], Any] = getattr(connection, "exec_driver_sql", connection.execute)
    execute("SELECT 1")


_ACTIONS: Final[Mapping[str, Callable[[str, Any], None]]] = {"exit": _exit, "raise": _raise}

arm(os.environ)
