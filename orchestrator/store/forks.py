"""Which sockets this process has from its parent: over one of them both would speak, and read each other's answers.

Owns the memory of these.  Must never use or close one; where nobody can say which they are, none is refused.
"""

from __future__ import annotations

import contextlib
import os
import stat

from orchestrator.errors import UsageError

_inherited: frozenset[int] = frozenset()  # by inode, which no socket has that is opened later


def refuse_inherited(descriptor: int) -> None:
    """Refuse a connection that was opened before this process was forked.  Raises: UsageError."""
    if _inherited and os.fstat(descriptor).st_ino in _inherited:
        raise UsageError(
            "transaction= got a connection that was opened before this process was forked: its parent speaks over the "
            "same socket, and each would read the other's answers. Open connections after the fork; a SQLAlchemy "
            "engine forgets its own with engine.dispose(close=False) in the child"
        )


def _remember() -> None:
    global _inherited
    with contextlib.suppress(OSError):  # not on Linux
        _inherited = frozenset(filter(None, map(_socket, os.listdir("/proc/self/fd"))))


def _socket(descriptor: str) -> int:
    with contextlib.suppress(OSError):  # the one that the listing itself used
        found = os.fstat(int(descriptor))
        return found.st_ino if stat.S_ISSOCK(found.st_mode) else 0
    return 0


os.register_at_fork(after_in_child=_remember)
