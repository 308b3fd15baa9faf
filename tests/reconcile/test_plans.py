"""The statements of audits, reports and prune keep their indexes when there are many rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from orchestrator.store import audits, pruning, reports
from orchestrator.store.connection import Connection
from orchestrator.store.missing import unknown_run
from orchestrator.store.pruning import Member

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MANY = """
INSERT INTO orchestrator.runs (id, saga, version, state, input, root_id, parent_id, queue, position, started_at,
    finished_at)
SELECT 'r' || n, 's', 1, 'failed', '{}', 'r' || n, CASE WHEN n % 10 = 0 THEN 'r' || n - 1 END, 'q', 3,
    '2025-01-01'::timestamptz + n * interval '1 min', '2025-01-01'::timestamptz + n * interval '1 min'
FROM generate_series(1, 20000) n;
INSERT INTO orchestrator.journal
SELECT 'r' || n, s, now(), '[]' FROM generate_series(1, 20000) n, generate_series(0, 2) s;
INSERT INTO orchestrator.work (run_id, key, role, target, queue, due_at)
SELECT 'r' || n, '', 'turn', 's@1', 'q', now() FROM generate_series(1, 20000) n;
INSERT INTO orchestrator.arrivals (run_id, arrival) SELECT 'r' || n, '{}' FROM generate_series(1, 20000) n;
INSERT INTO orchestrator.locks (name, run_id, handle, key, asked_at)
SELECT 'n', 'r' || n, 'h', 'k', now() FROM generate_series(1, 20000) n;
INSERT INTO orchestrator.pruned SELECT 'p' || n, 's', 'failed', now() FROM generate_series(1, 20000) n;
INSERT INTO orchestrator.reports (wanted, started_at, finished_at)
SELECT '["c1"]', '2025-01-01'::timestamptz + n * interval '1 min', now() FROM generate_series(1, 5000) n;
INSERT INTO orchestrator.report_checks (report_id, name)
SELECT r, 'c' || c FROM generate_series(1, 5000) r, generate_series(1, 4) c;
ANALYZE;
"""
MEMBERS = [Member("r1", "r1", "s", "failed", 3, 3, True), Member("r2", "r2", "s", "failed", 3, 3, True)]
STATEMENTS: dict[str, tuple[Callable[[Connection], Any], set[str]]] = {
    "runs": (
        lambda c: [list(each.journal) for each in audits.runs(c, "r5", 200)],
        {"runs_pkey", "journal_pkey", "work_pkey", "arrivals_by_run", "locks_run_id_handle_key"},
    ),
    "still_open": (lambda c: audits.still_open(c, ["r1", "r2"]), {"runs_pkey"}),
    "known": (lambda c: audits.known(c, ["r1", "p2"]), {"runs_pkey", "pruned_pkey"}),
    "owners of arrivals": (lambda c: audits.owners(c, "arrivals", "r5", 200), {"arrivals_by_run", "runs_pkey"}),
    "owners of journal": (lambda c: audits.owners(c, "journal", "r5", 200), {"journal_pkey", "runs_pkey"}),
    "owners of locks": (lambda c: audits.owners(c, "locks", "r5", 200), {"locks_run_id_handle_key", "runs_pkey"}),
    "owners of work": (lambda c: audits.owners(c, "work", "r5", 200), {"work_pkey", "runs_pkey"}),
    "page": (lambda c: pruning.page(c, NOW, None, states=[], saga="", limit=300), {"runs_by_start"}),
    "families": (
        lambda c: pruning.families(c, [f"r{n}" for n in range(1, 300)]),
        {"runs_by_parent", "runs_pkey", "work_pkey", "arrivals_by_run", "locks_run_id_handle_key"},
    ),
    "bury": (lambda c: pruning.bury(c, ["r1", "r2"]), {"runs_pkey"}),
    "delete": (lambda c: pruning.delete(c, MEMBERS), {"runs_pkey", "journal_pkey"}),
    "missing": (lambda c: unknown_run("p7", c), {"pruned_pkey"}),
    "open_report": (lambda c: reports.open_report(c, ["c1"]), {"reports_open"}),
    "progress": (lambda c: reports.progress(c, 4000), {"report_checks_pkey"}),
    "advance": (
        lambda c: reports.advance(c, 4000, reports.Progress("c1", 0, "", 1, 0, {}, [], None, False)),
        {"report_checks_pkey"},
    ),
    "finish": (lambda c: reports.finish(c, 4000), set()),
    "forget": (lambda c: reports.forget(c, NOW + timedelta(days=1)), {"reports_pkey", "report_checks_pkey"}),
    "latest": (lambda c: reports.latest(c, 4000), {"reports_pkey", "report_checks_pkey"}),
    "trend": (lambda c: reports.trend(c, 4000), {"reports_pkey", "report_checks_pkey"}),
}


@pytest.fixture
def plans(connection: Connection) -> Iterator[list[str]]:
    """The plan of every statement that the connection runs from now on, on tables with many rows."""
    connection.execute(MANY)  # type: ignore[call-overload]
    yield _explained(connection)


def _explained(connection: Connection) -> list[str]:
    """Return the list to which the plans of all statements are added from now on."""
    seen: list[str] = []
    connection.add_notice_handler(lambda notice: seen.append(notice.message_primary or ""))
    connection.execute("LOAD 'auto_explain'")
    for setting in ("log_min_duration = 0", "log_level = notice"):
        connection.execute(f"SET auto_explain.{setting}")  # type: ignore[call-overload]
    seen.clear()
    return seen


_SCAN = re.compile(r"((?<!CTE |rse )(?:Index|Only|Heap|Seq) Scan (?:using \w+ )?on .*)\n *(.*)")


@pytest.mark.parametrize(
    "name",
    ["runs", "families", "owners of arrivals", "owners of journal", "owners of locks", "owners of work", "delete"],
)
def test_a_plan_that_was_made_on_empty_tables_reads_none_of_them_whole_when_they_are_full(
    connection: Connection, name: str
) -> None:
    """It is kept for a session, and looks best as a join of whole tables: each must be read by a condition."""
    seen = _explained(connection)
    with connection.transaction():
        STATEMENTS[name][0](connection)
    text = "\n".join(seen)
    scans = _SCAN.findall(text)
    assert scans and [scan for scan, below in scans if not re.search("Cond: .* [=>] ", below)] == [], text


def test_every_statement_keeps_its_index(connection: Connection, plans: list[str]) -> None:
    for name, (call, indexes) in STATEMENTS.items():
        plans.clear()
        with connection.transaction():
            call(connection)
        text = "\n".join(plans)
        assert plans, f"{name}: auto_explain shows the plans"
        assert not re.search(r"Seq Scan on (?!first)", text), f"{name}: {text}"
        assert {index for index in indexes if index not in text} == set(), f"{name}: {text}"
