"""Full tables, many timers that fall due together, a map over very many items."""

from __future__ import annotations

import time
from statistics import quantiles
from typing import Any

import psycopg
from psycopg import sql

from benchmarks.cases.throughput import rate, warm
from benchmarks.report import Row
from benchmarks.scale import Scale
from benchmarks.stack import Side, Stack, memory_mb, until

_SLEEPING = "SELECT count(*) FROM orchestrator.work WHERE run_id = ANY(%s) AND due_at > now()"
_OPEN = "SELECT count(*) FROM orchestrator.runs WHERE id = ANY(%s) AND finished_at IS NULL"
_FINISHED = "SELECT id, extract(epoch FROM finished_at)::float FROM orchestrator.runs WHERE id = ANY(%s)"
_PAGE_ENDS = """
SELECT extract(epoch FROM h.at)::float FROM orchestrator.history h JOIN orchestrator.runs r ON r.id = h.run_id
WHERE r.saga LIKE '%.mapping' AND h.kind = 'settled' ORDER BY 1
"""
_HISTORY = "SELECT count(*) FROM orchestrator.journal WHERE run_id = ANY(%s)"


def full(stack: Stack, scale: Scale) -> list[Row]:
    """Runs of three steps with many finished and sleeping ones in the tables, next to empty tables."""
    finished, sleeping = scale.of(1_000_000), scale.of(100_000)
    ours, empties = [], []
    with stack.engine() as engine, stack.engine() as empty:
        _fill(engine, finished, sleeping)
        for side in (engine, empty):
            warm(side, "three", scale)
        for _ in scale.each_round():
            ours.append(rate(engine, "three", scale.runs))
            empties.append(rate(empty, "three", scale.runs))
    case = f"{finished:,} runs ended, {sleeping:,} asleep"
    return [Row(case, "runs/s", ours, "empty tables", empties, least=0.9)]


def _fill(side: Side, finished: int, sleeping: int) -> None:
    """Copy one run that has ended and one that sleeps, as often as is asked for."""
    side.client.ask("three", runs=1)
    with psycopg.connect(side.database_url, autocommit=True) as connection:
        ended = _one(connection, "SELECT id FROM orchestrator.runs")
        asleep = side.client.ask("nap", runs=1, begin=time.time() + 30 * 24 * 3600)["runs"][0]
        until(lambda: _one(connection, _SLEEPING, [asleep]), "the run sleeps")
        for run, first, count in ((ended, 1, finished), (asleep, finished + 1, sleeping)):
            for table, column in (("runs", "id"), ("journal", "run_id"), ("work", "run_id")):
                _copy(connection, table, column, run, first, count)
        connection.execute("VACUUM (ANALYZE)")
        connection.execute("CHECKPOINT")


def _copy(connection: psycopg.Connection[Any], table: str, column: str, run: str, first: int, count: int) -> None:
    """Copies have ids of the same shape, older than all that come."""
    names = [row[0] for row in connection.execute(
        "SELECT column_name FROM information_schema.columns "
        "WHERE table_schema = 'orchestrator' AND table_name = %s AND is_generated = 'NEVER'",
        [table],
    )]  # fmt: skip
    new_id = sql.SQL("lpad(to_hex(number), 8, '0') || substr({}, 9)").format(sql.Identifier(column))
    values = [new_id if name in (column, "root_id") else sql.Identifier(name) for name in names]
    statement = sql.SQL(
        "INSERT INTO orchestrator.{table} ({names}) SELECT {values} FROM orchestrator.{table}, "
        "generate_series(%s::int, %s::int) AS number WHERE {column} = %s"
    ).format(
        table=sql.Identifier(table), column=sql.Identifier(column),
        names=sql.SQL(", ").join(map(sql.Identifier, names)), values=sql.SQL(", ").join(values),
    )  # fmt: skip
    connection.execute(statement, [first, first + count - 1, run])


def timers(stack: Stack, scale: Scale) -> list[Row]:
    """Runs that wait on timers which fall due in one second: how late they end. One round: it takes its time."""
    count = scale.of(10_000)
    with stack.engine() as engine:
        warm(engine, "three", scale)
        with psycopg.connect(engine.database_url, autocommit=True) as connection:
            begin = time.time() + 5 + count / 200
            runs = engine.client.ask("nap", runs=count, begin=begin)["runs"]
            until(lambda: _one(connection, _SLEEPING, runs) == count, "all runs sleep", begin - time.time())
            # Who asks takes time from those that are measured: of 10,000 runs it is a core, if asked all the time.
            time.sleep(max(0.0, begin - time.time() + 1.0))
            until(lambda: not _one(connection, _OPEN, runs), "all timers have fired", 120, every=0.5)
            ends: dict[str, float] = dict(connection.execute(_FINISHED, [runs]).fetchall())
    late = [ends[run] - begin - number / count for number, run in enumerate(runs)]
    cuts = quantiles(late, n=100, method="inclusive") if count > 1 else late * 99
    case = f"{count:,} timers in one second"
    return [Row(case, "s late, p50", [cuts[49]]), Row(case, "s late, p99", [cuts[98]], most=1.0)]


def mapped(stack: Stack, scale: Scale) -> list[Row]:
    """One run that maps a step over very many items: its rate, its history, the memory of the worker.  One round."""
    items = scale.of(20_000)
    few = -(-items // 5000)  # pages of 500, of which a tenth
    with stack.engine() as engine, psycopg.connect(engine.database_url, autocommit=True) as connection:
        warm(engine, "three", scale)
        engine.client.send("mapped", items=items)
        until(lambda: len(_page_ends(connection)) > few, "a tenth has ended", 60 + items / 100, every=0.5)
        early = memory_mb(engine.workers[0].pid)
        answer = engine.client.receive(60 + items / 50)
        late = memory_mb(engine.workers[0].pid)
        history = _one(connection, _HISTORY, answer["run"])
        ends = _page_ends(connection)
    first, last = ends[few] - ends[0], ends[-1] - ends[-1 - few]
    case = f"a map of {items:,} items"
    return [
        Row(case, "items/s", [items / answer["seconds"]]),
        Row(case, "s, last tenth", [last], "first tenth", [first], most=1.2),
        Row(case, "MB, worker", [late], "after a tenth", [early]),
        Row(case, "journal rows of the run", [history]),
    ]


def _page_ends(connection: psycopg.Connection[Any]) -> list[float]:
    return [end for (end,) in connection.execute(_PAGE_ENDS)]


def _one(connection: psycopg.Connection[Any], statement: str, *values: Any) -> Any:
    row = connection.execute(statement, [[value] if isinstance(value, str) else value for value in values]).fetchone()
    return row[0] if row else None
