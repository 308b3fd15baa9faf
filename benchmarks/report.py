"""What was measured, as rows of one table: the engine, what it is compared with, and what is to be reached."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any

import psutil
import psycopg
from rich.table import Table

from benchmarks import floor
from benchmarks.stack import Stack


@dataclass(frozen=True, slots=True)
class Row:
    """A measure of each round: ours and, if there is one, theirs. Limits are for the ratio if there is a theirs."""

    case: str
    unit: str
    ours: list[float]
    against: str = ""
    theirs: list[float] = field(default_factory=list)
    least: float | None = None
    most: float | None = None
    of_value: bool = False

    @property
    def ratio(self) -> float | None:
        """Ours by theirs, the median of the rounds: both sides of a round had the same weather."""
        if not self.theirs or min(*self.ours, *self.theirs) <= 0:
            return None
        return median(ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True))

    @property
    def met(self) -> bool | None:
        """Whether the limit is kept; None if there is none."""
        if self.least is None and self.most is None:
            return None
        ratio = self.ratio
        measured = median(self.ours) if self.of_value or ratio is None else ratio
        return (self.least is None or measured >= self.least) and (self.most is None or measured <= self.most)

    @property
    def limit(self) -> str:
        parts = [
            f"≥ {self.least:g}" if self.least is not None else "",
            f"≤ {self.most:g}" if self.most is not None else "",
        ]
        what = "" if self.of_value or not self.theirs else " x"
        return " ".join(part + what for part in parts if part)


def facts(stack: Stack, rounds: int, runs: int) -> dict[str, Any]:
    """Say on what was measured, and when."""
    url = stack.servers.database_url
    with psycopg.connect(url) as connection:
        server = connection.execute("SHOW server_version").fetchone()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
        "postgres": server[0] if server else "",
        "fdatasync_ms": round(floor.fdatasync_ms(str(stack.servers.data_dir)), 3),
        "commit_ms": round(floor.commit_ms(url), 3),
        "rounds": rounds,
        "runs": runs,
    }


def table(rows: list[Row], known: dict[str, Any]) -> Table:
    """Draw the table."""
    caption = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in known.items())
    drawn = Table(title="Benchmarks (median, in brackets least and most)", caption=caption)
    for name in ("case", "unit", "engine", "against", "theirs", "ratio", "to reach", ""):
        drawn.add_column(name, justify="right" if name in ("engine", "theirs", "ratio", "to reach") else "left")
    before = ""
    for row in rows:
        verdict = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[row.met]
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        name, before = ("" if row.case == before else row.case), row.case
        drawn.add_row(name, row.unit, _spread(row.ours), row.against, _spread(row.theirs), ratio, row.limit, verdict)
    return drawn


def as_json(rows: list[Row], known: dict[str, Any]) -> dict[str, Any]:
    """Return what the table shows, with each round's numbers."""
    return {"facts": known, "rows": [{**asdict(row), "ratio": row.ratio, "met": row.met} for row in rows]}


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return _short(values[0])
    return f"{_short(median(values))} \\[{_short(min(values))} - {_short(max(values))}]"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
