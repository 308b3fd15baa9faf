"""Names for the requests of a run that do not depend on timing.

Owns the form of a key: ``branch/name#n``.  The branch is the path of task indices below the main coroutine (empty for
the main coroutine itself), n counts the same name within its branch.  Must never look at anything but program order.
"""

from __future__ import annotations


class Branch:
    """One task of a saga: its path, and how many children and requests of each name it has had."""

    __slots__ = ("_children", "_counts", "path")

    def __init__(self, path: str = "") -> None:
        self.path = path
        self._children = 0
        self._counts: dict[str, int] = {}

    def child(self) -> Branch:
        """Return the next child branch, in the order of creation."""
        index = self._children
        self._children += 1
        return Branch(f"{self.path}.{index}" if self.path else str(index))

    def key(self, name: str) -> str:
        """Return the next key for `name` in this branch."""
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        return f"{self.path}/{name}#{count}" if self.path else f"{name}#{count}"
