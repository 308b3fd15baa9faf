"""reconcile and prune killed at every boundary and at any moment, resumed, and two at once: nothing lost or doubled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import failpoints
from orchestrator.failpoints import EXIT_CODE
from orchestrator.reconcile import correction_id
from orchestrator.store.connection import Connection
from tests.acceptance.running import ROOT, until
from tests.crash.points import NIGHTLY

BAD = [f"t{n:04}" for n in range(100, 1001, 100)]
RUNS = """
INSERT INTO orchestrator.runs (id, saga, version, state, input, root_id, parent_id, queue, position, started_at,
    finished_at)
SELECT id, 's', 1, state, '{}', split_part(id, '/', 1), parent, 'q', 1, now() - interval '1 day',
    CASE WHEN state = 'failed' THEN now() - interval '1 day' END
FROM (
    SELECT 'r' || n AS id, 'failed' AS state, NULL AS parent FROM generate_series(1, 900) n
    UNION ALL SELECT 'r1/' || n, 'failed', 'r1' FROM generate_series(1, 700) n
    UNION ALL SELECT 'live' || n, 'running', NULL FROM generate_series(1, 50) n
    UNION ALL SELECT 'live1/' || n, 'failed', 'live1' FROM generate_series(1, 50) n
) AS made;
INSERT INTO orchestrator.journal SELECT id, 0, now(), '[]' FROM orchestrator.runs;
"""
OLD, KEPT = 1600, 100


@pytest.fixture
def night(connection: Connection, database_url: str, tmp_path: Path) -> Iterator[Night]:
    connection.execute("CREATE TABLE things (id text PRIMARY KEY, bad boolean)")
    connection.execute(
        "INSERT INTO things SELECT 't' || lpad(n::text, 4, '0'), n % 100 = 0 FROM generate_series(1, 1000) n"
    )
    made = Night(database_url, tmp_path, connection)
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


class Night:
    """Starts processes that reconcile or prune one database."""

    def __init__(self, url: str, folder: Path, connection: Connection) -> None:
        self.url, self.folder, self.connection = url, folder, connection
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, order: str, points: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.reconcile.night", self.url, order, str(self.folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), failpoints.VARIABLE: points}
        self.processes.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True)
        )  # fmt: skip
        return self.processes[-1]

    def run(self, order: str, points: str = "") -> tuple[int, str]:
        """Wait for its end; returns exit code and output."""
        process = self.start(order, points)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def one(self, statement: str) -> int:
        row = self.connection.execute(statement).fetchone()  # type: ignore[call-overload]
        assert row
        return int(row[0])

    def judge_report(self) -> None:
        """One report, in which each thing was looked at once and each break has started one run."""
        found = self.connection.execute(
            "SELECT looked_at, breaks, pages, done, error FROM orchestrator.report_checks c "
            "JOIN orchestrator.reports r ON r.id = c.report_id WHERE name = 'numbers' AND finished_at IS NOT NULL "
            "ORDER BY r.id"
        ).fetchall()
        assert found == [(1000, 10, 6, True, None)] * len(found) and found
        started = self.connection.execute("SELECT id FROM orchestrator.runs ORDER BY id").fetchall()
        assert started == sorted((correction_id("numbers", key),) for key in BAD)
        (told, *_) = sorted(self.folder.glob("reconciliation-*.json"))
        checks = {each["name"]: each for each in json.loads(told.read_text())["checks"]}
        assert [each["key"] for each in checks["numbers"]["examples"]] == BAD

    def judge_pruned(self) -> None:
        """All that is old is gone, taken and archived; nothing else is gone or taken."""
        self.judge_part()
        assert self.one("SELECT count(*) FROM orchestrator.runs") == KEPT
        assert self.one("SELECT count(*) FROM orchestrator.pruned") == OLD

    def judge_part(self) -> None:
        """Whatever is gone is taken and archived, with its journal; a family that is not whole has its head."""
        assert self.one("SELECT count(*) FROM orchestrator.runs WHERE id LIKE 'live%'") == KEPT
        assert self.one("SELECT count(*) FROM orchestrator.pruned WHERE id LIKE 'live%'") == 0
        assert self.one("SELECT count(*) FROM orchestrator.journal j LEFT JOIN orchestrator.runs r ON r.id = j.run_id "
                        "WHERE r.id IS NULL") == 0  # fmt: skip
        assert self.one("SELECT count(*) FROM orchestrator.runs") == self.one(
            "SELECT count(*) FROM orchestrator.journal"
        )
        orphans = "SELECT count(*) FROM orchestrator.runs c WHERE parent_id IS NOT NULL AND NOT EXISTS (SELECT FROM "
        assert self.one(f"{orphans} orchestrator.runs p WHERE p.id = c.parent_id)") == 0
        left = {each for (each,) in self.connection.execute("SELECT id FROM orchestrator.runs").fetchall()}
        taken = {each for (each,) in self.connection.execute("SELECT id FROM orchestrator.pruned").fetchall()}
        archived = {
            json.loads(line)["id"]
            for path in self.folder.glob("pruned-*.jsonl")
            for line in path.read_text().splitlines()
            if line.endswith("}")
        }
        assert {f"r{n}" for n in range(1, 901)} - left <= taken & archived
        assert {f"r1/{n}" for n in range(1, 701)} - left <= taken & archived


RECONCILE = (
    "open.before", "open.gave_up", "open.made", "open.after", "page", "page.written", "page.after", "write", "finish",
    "finished", "after",
)  # fmt: skip
PRUNE = ("bury", "buried", "deleted", "after")


def test_no_boundary_is_left_out() -> None:
    assert {f"reconcile.{name}" for name in RECONCILE} | {f"prune.{name}" for name in PRUNE} == NIGHTLY


@pytest.mark.parametrize("action", ["exit", "raise"])
def test_a_reconciliation_that_dies_at_every_boundary_in_turn_is_finished_by_the_next(
    night: Night, action: str
) -> None:
    told = 0
    for name in RECONCILE:
        code, output = night.run("reconcile", f"reconcile.{name}={action}@{3 if name.startswith('page') else 1}")
        assert code == (EXIT_CODE if action == "exit" else 1), f"{name}: {output}"
        told += output.count("told of 10")
    code, output = night.run("reconcile")
    assert (code, told + output.count("told of 10") >= 1) == (0, True), output
    night.judge_report()


@pytest.mark.parametrize("action", ["exit", "raise"])
def test_a_prune_that_dies_at_every_boundary_in_turn_is_finished_by_the_next(night: Night, action: str) -> None:
    for statement in RUNS.split(";\n")[:-1]:
        night.connection.execute(statement)  # type: ignore[call-overload]
    for name in PRUNE:
        code, output = night.run("prune", f"prune.{name}={action}")
        assert code == (EXIT_CODE if action == "exit" else 1), f"{name}: {output}"
        night.judge_part()
    assert night.run("prune")[0] == 0
    night.judge_pruned()


def test_reconciliations_that_are_killed_at_any_moment_and_two_at_once_count_nothing_twice(night: Night) -> None:
    pages = "SELECT coalesce(max(pages), 0) FROM orchestrator.report_checks WHERE name = 'numbers' AND NOT done"
    for after in (1, 3):
        two = [night.start("reconcile") for _ in range(2)]
        until(lambda after=after: night.one(pages) >= after, "they have come some way", 100)  # type: ignore[misc]
        for process in two:
            process.send_signal(signal.SIGKILL)
            process.wait()
    for process in [night.start("reconcile") for _ in range(2)]:
        assert process.wait(120) == 0, process.stdout and process.stdout.read()
    night.judge_report()


def test_prunes_that_are_killed_at_any_moment_and_two_at_once_lose_nothing_that_should_stay(night: Night) -> None:
    for statement in RUNS.split(";\n")[:-1]:
        night.connection.execute(statement)  # type: ignore[call-overload]
    for number in range(2):
        two = [night.start("prune") for _ in range(2)]
        left = OLD + KEPT - 1 - 600 * number
        until(lambda left=left: night.one("SELECT count(*) FROM orchestrator.runs") <= left, "some are gone", 100)  # type: ignore[misc]
        for process in two:
            process.send_signal(signal.SIGKILL)
            process.wait()
        night.judge_part()
    for process in [night.start("prune") for _ in range(2)]:
        assert process.wait(120) == 0, process.stdout and process.stdout.read()
    night.judge_pruned()
