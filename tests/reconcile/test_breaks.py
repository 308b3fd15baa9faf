"""What follows a break: hooks are called, numbers are there for a scraper, a run may start, once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator import reconcile, saga, step
from orchestrator.client import Client
from orchestrator.engine.reconcile import Report
from orchestrator.reconcile import Looked, correction_id
from orchestrator.settings import Settings
from orchestrator.store.connection import Connection
from tests.engine.stage import Child

BREAKS = """
SELECT id AS key, 2.5 AS amount, 'EUR' AS currency, problem FROM things
WHERE id > %(after)s ORDER BY id LIMIT %(limit)s
"""
mended: list[Looked] = []


@step
def forget(found: Looked) -> None: ...


@step(compensate=forget)
def mend(found: Looked) -> str:
    mended.append(found)
    return found.key


@saga.define(name="breaks.correct")
async def correct(found: Looked) -> str:
    return await saga.step(mend, found)


@saga.define(name="breaks.numbers")
async def numbers(found: int) -> int:
    return found


@pytest.fixture
def client(connection: Connection, database_url: str) -> Iterator[Client]:
    connection.execute("CREATE TABLE things (id text PRIMARY KEY, problem text)")
    connection.execute("INSERT INTO things VALUES ('a', 'is bad'), ('b', NULL), ('c', 'is bad')")
    settings = Settings.from_environment({}, database_url=database_url)
    client = Client(settings, lambda queue, times: None, lambda: "celery")
    yield client
    client.pool.close()


def runs(connection: Connection) -> list[tuple[str, str]]:
    return connection.execute("SELECT id, state FROM orchestrator.runs ORDER BY id").fetchall()


# -- hooks -------------------------------------------------------------------------------------------------------------
def test_a_hook_is_told_of_breaks_and_of_errors_and_of_nothing_else(client: Client, connection: Connection) -> None:
    told: list[Report] = []
    reconcile.on_breaks(told.append)
    reconcile.check("things", sql=BREAKS)
    assert [client.reconcile(["things"]).id] == [each.id for each in told]
    assert [each["key"] for each in told[0].checks[0].examples] == ["a", "c"]
    reconcile.check("broken", sql="SELECT")
    client.reconcile(["broken"])
    assert len(told) == 2
    connection.execute("UPDATE things SET problem = NULL")
    assert client.reconcile(["things"]).exit_code == 0
    assert len(told) == 2


def test_a_hook_that_raises_is_a_problem_of_the_report_and_the_others_are_called(
    client: Client, connection: Connection, tmp_path: Path
) -> None:
    told: list[int] = []

    @reconcile.on_breaks
    def it_raises(report: Report) -> None:
        raise ValueError("no \0 idea")

    reconcile.on_breaks(lambda report: told.append(report.breaks))
    reconcile.check("things", sql=BREAKS)
    report = client.reconcile(["things"], directory=tmp_path)
    assert told == [2] and report.exit_code == 2 and len(report.files) == 3
    assert "it_raises raised ValueError: no  idea" in report.problems[0]
    assert connection.execute("SELECT finished_at IS NOT NULL FROM orchestrator.reports").fetchall() == [(True,)]


# -- numbers -----------------------------------------------------------------------------------------------------------
def scraped(folder: Path) -> dict[tuple[str, ...], float]:
    """What Prometheus makes of the file, by name and labels."""
    families = text_string_to_metric_families((folder / "reconciliation.prom").read_text())
    return {
        (sample.name.removeprefix("orchestrator_reconcile_"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_prometheus_reads_the_numbers_of_each_check_as_it_was_last(
    client: Client, connection: Connection, tmp_path: Path
) -> None:
    reconcile.check('things "of\\ours"', sql=BREAKS)
    reconcile.check("broken", sql="SELECT")
    client.reconcile(['things "of\\ours"'], directory=tmp_path)
    connection.execute("DELETE FROM things WHERE id = 'a'")
    client.reconcile(["broken", 'things "of\\ours"'], directory=tmp_path)
    report = client.reconcile(["engine: runs"], directory=tmp_path)
    found = scraped(tmp_path)
    at = found.pop(("started_timestamp_seconds", "engine: runs"))
    assert abs(at - report.started_at.timestamp()) <= 1
    assert {labels: value for labels, value in found.items() if "timestamp" not in labels[0]} == {
        ("breaks", "broken"): 0, ("looked_at", "broken"): 0, ("failed", "broken"): 1,
        ("breaks", 'things "of\\ours"'): 1, ("looked_at", 'things "of\\ours"'): 2, ("failed", 'things "of\\ours"'): 0,
        ("sum", 'things "of\\ours"', "EUR"): 5,
        ("breaks", "engine: runs"): 0, ("looked_at", "engine: runs"): 0, ("failed", "engine: runs"): 0,
    }  # fmt: skip


# -- runs that correct -------------------------------------------------------------------------------------------------
def test_a_break_starts_one_run_for_ever_and_the_report_names_it(
    client: Client, connection: Connection, child: Child, tmp_path: Path
) -> None:
    reconcile.check("things", sql=BREAKS, corrected_by=correct)
    wanted = [correction_id("things", key) for key in ("a", "c")]
    for _ in range(2):
        report = client.reconcile(["things"], directory=tmp_path)
        assert [each["run"] for each in report.checks[0].examples] == wanted
    assert runs(connection) == [(each, "pending") for each in sorted(wanted)]
    mended.clear()
    child.drain()
    assert sorted((each.key, each.problem, str(each.amount)) for each in mended) == [
        ("a", "is bad", "2.5"), ("c", "is bad", "2.5"),
    ]  # fmt: skip
    connection.execute("UPDATE things SET problem = 'is worse'")  # it has ended and did not help: a person's turn
    assert client.reconcile(["things"]).breaks == 3
    assert [state for _, state in runs(connection)].count("completed") == 2 and len(runs(connection)) == 3
    assert wanted[0] in (tmp_path / f"reconciliation-{report.id}.html").read_text()
    assert json.loads((tmp_path / f"reconciliation-{report.id}.json").read_text())["checks"][0]["examples"][0]["run"]


def test_a_python_check_and_a_file_start_runs_as_well(client: Client, connection: Connection, tmp_path: Path) -> None:
    @reconcile.check("in python", corrected_by=correct)
    def in_python(connection: Any, after: str, limit: int) -> Iterator[Looked]:
        yield from [] if after else [Looked("x", "is odd")]

    (tmp_path / "theirs.csv").write_text("id\na\nb\nz\n")
    ours = "SELECT id AS key FROM things WHERE id > %(after)s ORDER BY id LIMIT %(limit)s"
    theirs = tmp_path / "theirs.csv"
    reconcile.statement("file", file=theirs, columns={"key": "id"}, sql=ours, corrected_by=correct)
    client.reconcile(["in python", "file"])
    wanted = {correction_id("in python", "x"), correction_id("file", "c"), correction_id("file", "z")}
    assert {run_id for run_id, _ in runs(connection)} == wanted


def test_a_saga_that_cannot_take_a_break_is_an_error_and_hides_no_break(client: Client, connection: Connection) -> None:
    reconcile.check("things", sql=BREAKS, corrected_by=numbers)  # type: ignore[arg-type]
    report = client.reconcile(["things"])
    assert (report.breaks, report.exit_code, runs(connection)) == (2, 2, [])
    assert "no run of breaks.numbers could be started: PayloadError" in (report.checks[0].error or "")


def test_who_is_overtaken_starts_nothing(client: Client, connection: Connection) -> None:
    """The page is refused, and what it would have started with it."""

    @reconcile.check("overtaken", corrected_by=correct)
    def overtaken(own: Any, after: str, limit: int) -> Iterator[Looked]:
        connection.execute("UPDATE orchestrator.report_checks SET pages = pages + 1, done = true")
        yield Looked("x", "is odd")

    assert client.reconcile(["overtaken"]).breaks == 0
    assert runs(connection) == []


def test_old_reports_go_a_hundred_at_a_time(client: Client, connection: psycopg.Connection) -> None:
    reconcile.check("things", sql=BREAKS)
    client.reconcile(["things"])
    connection.execute("UPDATE orchestrator.reports SET started_at = started_at - interval '401 days'")
    report = client.reconcile(["things"])
    assert connection.execute("SELECT id FROM orchestrator.reports").fetchall() == [(report.id,)]
    assert connection.execute("SELECT DISTINCT report_id FROM orchestrator.report_checks").fetchall() == [(report.id,)]
