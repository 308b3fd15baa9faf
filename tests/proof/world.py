"""Everything that the rules look at: the engine's tables in one snapshot, and what was told by others.

Owns reading.  Must never judge, nor lean on the engine's own readers: only on the schema and the form of entries.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from orchestrator.machine.states import TERMINAL
from tests.proof import effects
from tests.proof.effects import Effect

Row = dict[str, Any]
Attempt = tuple[str, str, int]
"""A run, a key, the number of an attempt to do it."""


@dataclass
class Run:
    """A run's row, its journal, and what is outstanding of it."""

    row: Row
    journal: list[tuple[int, datetime, list[Row]]] = field(default_factory=list)
    work: list[Row] = field(default_factory=list)
    arrivals: list[Row] = field(default_factory=list)

    @property
    def id(self) -> str:
        return str(self.row["id"])

    @property
    def state(self) -> str:
        return str(self.row["state"])

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL

    @cached_property
    def has_gap(self) -> bool:
        """Whether journal rows are missing; then nothing else that the journal says can be relied on."""
        return [seq for seq, _, _ in self.journal] != list(range(self.row["since"], self.row["position"]))

    @cached_property
    def entries(self) -> list[Row]:
        """The journal, entry by entry, as it is stored: without most fields that have their default."""
        return [_told(entry) for _, _, entries in self.journal for entry in entries]

    def of(self, *kinds: str) -> list[Row]:
        """Return the entries of these kinds."""
        return [entry for entry in self.entries if entry["e"] in kinds]

    @cached_property
    def asked(self) -> dict[str, Row]:
        """What was asked for, by key, in the order of the requests."""
        return {entry["key"]: entry for entry in self.of("asked")}

    @cached_property
    def rolled_back_at(self) -> int | None:
        """The index of the entry that decided to roll back."""
        return next((n for n, entry in enumerate(self.entries) if entry["e"] == "rollback"), None)


def _told(entry: Row) -> Row:
    """Return an entry with what goes without saying: a request is named by its key, a step succeeds."""
    if entry["e"] == "asked":
        return {"task": entry["key"].partition("#")[0].rpartition("/")[2], "args": {}, **entry}
    return {"outcome": "succeeded", **entry} if entry["e"] == "settled" else entry


@dataclass(slots=True)
class World:
    """What is judged."""

    runs: dict[str, Run]
    effects: list[Effect]
    now: datetime  # by the database's clock, after all else was read there
    has_log: bool = True  # without one nothing can be said about effects
    transactional: list[Effect] | None = None  # None: the application has no such table
    strays: list[tuple[str, str]] = field(default_factory=list)
    locks: list[tuple[str, str]] = field(default_factory=list)  # run and name of the lock
    acknowledged: list[str] = field(default_factory=list)
    may_park: Container[str] = ()
    refused: list[Attempt] = field(default_factory=list)
    unlogged: Container[str] = ()
    conserved: list[tuple[str, Any, Any]] = field(default_factory=list)
    places: Mapping[str, bytes] = field(default_factory=dict)
    canaries: list[str] = field(default_factory=list)
    before: Mapping[str, str] = field(default_factory=dict)
    while_running: bool = False

    @property
    def readable(self) -> Iterable[Run]:
        """The runs whose journal has no gap."""
        return [run for run in self.runs.values() if not run.has_gap]


def look(database_url: str, effect_log: Path | None, totals: Mapping[str, str]) -> tuple[World, dict[str, Any]]:
    """Read everything; the effects last, since what is recorded must have happened before it was recorded."""
    with psycopg.connect(database_url, row_factory=dict_row) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        runs = _runs(connection)
        strays = [(row["place"], row["run_id"]) for row in connection.execute(_STRAYS)]
        transactional = _transactional(connection)
        found = {name: _single(connection, sql) for name, sql in totals.items()}
        rows = connection.execute("SELECT run_id, name FROM orchestrator.locks ORDER BY id").fetchall()
        locks = [(row["run_id"], row["name"]) for row in rows]
        now = _single(connection, "SELECT orchestrator.now()")
    told = effects.read(effect_log) if effect_log else []
    told, transactional = _of_links(runs, told), transactional and _of_links(runs, transactional)
    return World(runs, told, now, effect_log is not None, transactional, strays, locks), found


def _of_links(runs: Mapping[str, Run], told: list[Effect]) -> list[Effect]:
    """Name effects after the row of their link: of a run that was continued as new, steps know how often it was."""
    names = {}
    for run in runs.values():
        owner = run.row["parent_id"] if run.state == "continued" else run.id
        names[f"{owner}~{run.row['link']}" if run.row["link"] else owner] = run.id
    return [replace(effect, run=names.get(effect.run, effect.run)) for effect in told]


_STRAYS = """
SELECT place, run_id FROM (
    SELECT 'journal' AS place, run_id FROM orchestrator.journal
    UNION SELECT 'work', run_id FROM orchestrator.work
    UNION SELECT 'arrivals', run_id FROM orchestrator.arrivals
) AS rows WHERE NOT EXISTS (SELECT FROM orchestrator.runs WHERE id = run_id)
"""


def _runs(connection: psycopg.Connection[Row]) -> dict[str, Run]:
    runs = {
        row["id"]: Run(row) for row in connection.execute("SELECT * FROM orchestrator.runs ORDER BY started_at, id")
    }
    for row in connection.execute("SELECT run_id, seq, at, entries FROM orchestrator.journal ORDER BY run_id, seq"):
        if row["run_id"] in runs:
            runs[row["run_id"]].journal.append((row["seq"], row["at"], row["entries"]))
    for row in connection.execute("SELECT * FROM orchestrator.work ORDER BY run_id, key"):
        if row["run_id"] in runs:
            runs[row["run_id"]].work.append(row)
    for row in connection.execute("SELECT * FROM orchestrator.arrivals ORDER BY id"):
        if row["run_id"] in runs:
            runs[row["run_id"]].arrivals.append(row)
    return runs


def _transactional(connection: psycopg.Connection[Row]) -> list[Effect] | None:
    if _single(connection, "SELECT to_regclass('transactional_effects')") is None:
        return None
    rows = connection.execute("SELECT run_id, key, attempt, direction FROM transactional_effects").fetchall()
    return [Effect(row["run_id"], row["key"], row["attempt"], row["direction"]) for row in rows]


def _single(connection: psycopg.Connection[Row], sql: str) -> Any:
    row = connection.execute(sql).fetchone()
    return None if row is None else next(iter(row.values()))
