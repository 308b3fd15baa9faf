"""How much is measured: rounds, and runs of which everything else is a multiple."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """A thousand runs are full size; other counts shrink with them."""

    rounds: int = 3
    runs: int = 1000

    def of(self, per_thousand: int) -> int:
        """Return a count that is `per_thousand` at full size, and at least 1."""
        return max(1, per_thousand * self.runs // 1000)

    def each_round(self) -> Iterator[int]:
        yield from range(self.rounds)
