"""Owns what is seen while the runs go on: their counts, live on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from sqlalchemy import Engine, text

ENDED = ("completed", "compensated", "failed", "cancelled", "terminated")
COLUMNS = {
    "completed": ("completed",),
    "compensated": ("compensated",),
    "failed": ("failed",),
    "parked": ("parked",),
    "under way": ("pending", "running", "compensating", "paused"),
}
COLOURS = {
    "completed": "green",
    "compensated": "cyan",
    "failed": "yellow",
    "parked": "magenta",
    "under way": "dim",
}
PLAIN_EVERY_SECONDS = 1.0
COUNT = "select r.saga, r.state, count(*) from orchestrator.runs r join demo.jobs j on j.id = r.id group by 1, 2"


@dataclass(frozen=True, slots=True)
class Tally:
    """Count runs by saga and state at one moment."""

    counts: Counter[tuple[str, str]]

    @classmethod
    def read(cls, engine: Engine) -> Tally:
        """Count now."""
        with engine.connect() as conn:
            rows = conn.execute(text(COUNT))
            return cls(Counter({(saga.rpartition(".")[2], state): count for saga, state, count in rows}))

    @property
    def ended(self) -> int:
        """Count the runs in a terminal state."""
        return self.of(*ENDED)

    @property
    def parked(self) -> int:
        """Count the runs that wait for a person."""
        return self.of("parked")

    @property
    def under_way(self) -> int:
        """Count all others."""
        return self.counts.total() - self.ended - self.parked

    def of(self, *states: str, saga: str | None = None) -> int:
        """Count the runs in these states, of one saga or of all."""
        return sum(n for (name, state), n in self.counts.items() if state in states and saga in (None, name))


class Watch:
    """Show the tally while it changes; use it as a context manager and call ``until``.

    ``look_after`` is called again and again, and raises if waiting on has become pointless.
    """

    def __init__(
        self, console: Console, engine: Engine, sagas: Sequence[str], total: int, look_after: Callable[[], None]
    ) -> None:
        self._console, self._engine, self._sagas, self._total = console, engine, sagas, total
        self._look_after = look_after
        self._began = time.monotonic()
        self._plain_at = 0.0
        self._live = Live(console=console, refresh_per_second=12, auto_refresh=False, transient=True)
        self.tally = Tally(Counter())

    def __enter__(self) -> Watch:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()
        self._console.print(self._table())

    @property
    def elapsed_seconds(self) -> float:
        """Return the seconds since the watch began."""
        return time.monotonic() - self._began

    def say(self, mark: str, sentence: str) -> None:
        """Print one event with its time, above the live display."""
        self._console.print(f"  [dim]{self.elapsed_seconds:5.1f} s[/]  {mark}  {sentence}")

    def until(self, reached: Callable[[Tally], bool], timeout_seconds: float) -> bool:
        """Watch until ``reached`` holds; return False if it does not in time."""
        give_up_at = time.monotonic() + timeout_seconds
        while time.monotonic() < give_up_at:
            self._look_after()
            self.tally = Tally.read(self._engine)
            self._show()
            if reached(self.tally):
                return True
            time.sleep(0.1)
        return False

    def _show(self) -> None:
        if self._console.is_terminal:
            self._live.update(Group(self._bar(), self._table()), refresh=True)
        elif self.elapsed_seconds >= self._plain_at:
            self._plain_at = self.elapsed_seconds + PLAIN_EVERY_SECONDS
            self.say(" ", f"{self._done()} of {self._total} ended, {self.tally.under_way} under way")

    def _done(self) -> int:
        return self.tally.ended + self.tally.parked

    def _bar(self) -> RenderableType:
        line = Table.grid(padding=(0, 2))
        line.add_row(
            Text(f"  {self.elapsed_seconds:5.1f} s", style="dim"),
            ProgressBar(total=self._total, completed=self._done(), width=40),
            Text(f"{self._done()} of {self._total}"),
            Text(f"{self._done() / max(self.elapsed_seconds, 0.1):.0f} runs/s", style="dim"),
        )
        return Group(Text(), line)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 1), pad_edge=True)
        table.add_column("saga", justify="left", style="bold", min_width=14)
        for column in COLUMNS:
            table.add_column(column, justify="right", style=COLOURS[column], min_width=11)
        for saga in self._sagas:
            table.add_row(saga, *(f"{self.tally.of(*states, saga=saga) or '·'}" for states in COLUMNS.values()))
        return table
