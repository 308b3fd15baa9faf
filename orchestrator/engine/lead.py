"""Which of a worker's children takes all that comes, while that is little, so that its waves are large.

Owns the promise of that child to look again within moments, in memory that the children share.  Must never be relied
on: a promise that nobody keeps is over by itself, and then each child looks for itself.
"""

from __future__ import annotations

import struct
import time
from typing import Any

_PROMISE = struct.Struct("=qd")  # by which child, until when by the monotonic clock, which is one for all processes
_LONGEST_S = 0.1
SIZE = _PROMISE.size


class Lead:
    """One child's sight of the promise that its worker's children share, in a writable buffer of `SIZE` bytes."""

    def __init__(self, shared: Any, child: int) -> None:
        self._shared, self._child = shared, child

    def promise(self, seconds: float) -> None:
        """Say that this child looks again within so many seconds, and can do all that comes until then."""
        _PROMISE.pack_into(self._shared, 0, self._child, time.monotonic() + seconds)

    def release(self) -> None:
        """Take back the promise, if it is this child's."""
        if _PROMISE.unpack_from(self._shared)[0] == self._child:
            _PROMISE.pack_into(self._shared, 0, 0, 0.0)

    def others_s(self) -> float:
        """Return for how long another child has promised to look; 0 if none has."""
        child, until = _PROMISE.unpack_from(self._shared)
        seconds: float = until - time.monotonic()
        # What is read while another process writes may be anything.
        return seconds if child not in (0, self._child) and 0.0 < seconds <= _LONGEST_S else 0.0
