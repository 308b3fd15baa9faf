"""An application's checks: paged, resumed, shared, and each error its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from orchestrator import DefinitionError, UsageError, reconcile
from orchestrator.client import Client
from orchestrator.engine.reconcile import Report
from orchestrator.engine.reconcile import reconcile as run
from orchestrator.reconcile import Looked
from orchestrator.settings import Settings
from orchestrator.store.connection import Connection, open_connection

NUMBERS = """
SELECT id AS key, amount, currency, CASE WHEN bad THEN 'is bad' END AS problem
FROM things WHERE id > %(after)s ORDER BY id LIMIT %(limit)s
"""


@pytest.fixture(autouse=True)
def things(connection: Connection) -> None:
    connection.execute("CREATE TABLE things (id text PRIMARY KEY, amount numeric, currency text, bad boolean)")
    connection.execute(
        "INSERT INTO things SELECT 't' || lpad(n::text, 4, '0'), 0.5, CASE WHEN n % 2 = 0 THEN 'EUR' ELSE 'USD' END, "
        "n % 100 = 0 FROM generate_series(1, 1000) n"
    )


def test_a_check_is_paged_and_its_breaks_are_told_once_with_sums(connection: Connection, tmp_path: Path) -> None:
    reconcile.check("things", sql=NUMBERS)
    report = run(connection, ["things"], tmp_path)
    (check,) = report.checks
    assert (check.looked_at, check.breaks, check.error, check.pages) == (1000, 10, None, 6)
    assert check.sums == {"EUR": "250.0", "USD": "250.0"}
    assert [each["key"] for each in check.examples] == [f"t{n:04}" for n in range(100, 1001, 100)]
    assert report.exit_code == 1
    told = json.loads((tmp_path / f"reconciliation-{report.id}.json").read_text())
    assert told["breaks"] == 10 and told["checks"][0]["examples"][0]["problem"] == "is bad"


def test_sums_are_exact(connection: Connection) -> None:
    """Decimals are rounded to 28 digits by default; an amount of tokens has 18 of them after the point."""
    connection.execute("DELETE FROM things WHERE id > 't0002'")
    connection.execute("UPDATE things SET currency = 'ETH', amount = 12345678901.000000000000000001")
    reconcile.check("things", sql=NUMBERS)
    (check,) = run(connection, ["things"]).checks
    assert check.sums == {"ETH": "24691357802.000000000000000002"}


def test_the_page_stands_alone_shows_the_trend_and_escapes_what_it_shows(
    connection: Connection, tmp_path: Path
) -> None:
    reconcile.check("things", sql=NUMBERS)
    first = run(connection, ["things"])
    connection.execute("INSERT INTO things VALUES ('u<script>alert(1)</script>', 1, '<b>', true)")
    report = run(connection, ["things"], tmp_path)
    assert [(each.id, each.breaks) for each in report.earlier] == [(first.id, 10)]
    html = (tmp_path / f"reconciliation-{report.id}.html").read_text()
    assert "u&lt;script&gt;alert(1)" in html and "<script" not in html and "http" not in html
    assert "11 breaks" in html and "Earlier" in html


def test_one_that_was_interrupted_goes_on_where_it_was(connection: Connection) -> None:
    asked: list[str] = []

    @reconcile.check("dies once")
    def dies_once(connection: Any, after: str, limit: int) -> Iterator[Looked]:
        asked.append(after)
        if len(asked) == 3:
            raise KeyboardInterrupt  # as a process that is killed: nothing is noted
        for (key,) in connection.execute("SELECT id FROM things WHERE id > %s ORDER BY id LIMIT %s", (after, limit)):
            yield Looked(key, "is there")

    with pytest.raises(KeyboardInterrupt):
        run(connection, ["dies once"])
    report = run(connection, ["dies once"])
    assert asked == ["", "t0200", "t0400", "t0400", "t0600", "t0800", "t1000"]
    assert (report.checks[0].looked_at, report.checks[0].breaks) == (1000, 1000)


def test_the_next_night_begins_anew_also_if_it_begins_a_little_earlier_or_has_an_hour_less(
    connection: Connection,
) -> None:
    """Checks that the night before had done would not be looked at this night."""
    begun = datetime(2026, 3, 28, 2, 30, tzinfo=UTC)
    reconcile.check("things", sql=NUMBERS)
    ends = ["dies"]

    @reconcile.check("yet to come")
    def yet_to_come(connection: Any, after: str, limit: int) -> list[Looked]:
        if ends:
            raise KeyboardInterrupt(ends.pop())
        return []

    with pytest.raises(KeyboardInterrupt):
        run(connection, ["things", "yet to come"], now=begun)
    connection.execute("UPDATE things SET bad = true")
    assert run(connection, ["things", "yet to come"], now=begun + timedelta(hours=23)).breaks == 1000


def test_two_at_once_share_a_report_and_count_nothing_twice(connection: Connection, database_url: str) -> None:
    together = threading.Barrier(2, timeout=60)
    reports: list[Report] = []

    @reconcile.check("slow")
    def slow(connection: Any, after: str, limit: int) -> Iterator[Looked]:
        if not after:
            together.wait()
        for (key,) in connection.execute("SELECT id FROM things WHERE id > %s ORDER BY id LIMIT %s", (after, limit)):
            yield Looked(key, "is there")

    def work() -> None:
        with open_connection(database_url, name="test") as mine:
            reports.append(run(mine, ["slow"]))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({report.id for report in reports}) == 1 and len(reports) == 2
    assert [(each.checks[0].looked_at, each.checks[0].breaks) for each in reports] == [(1000, 1000)] * 2


def test_a_check_or_a_hook_that_does_not_come_back_is_interrupted_and_the_others_go_on(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    never = threading.Event()
    handler = signal.signal(signal.SIGALRM, signal.SIG_IGN)

    @reconcile.check
    def asks_a_dead_server(connection: Any, after: str, limit: int) -> Iterator[Looked]:
        connection.execute("SELECT pg_sleep(1)")  # a statement has a limit of its own, and is not torn
        with contextlib.suppress(TimeoutError):
            never.wait(30)
        never.wait(30)  # and again
        yield Looked("a")

    @reconcile.on_breaks
    def pages_a_dead_server(report: Report) -> None:
        never.wait(30)

    def file() -> Path:
        never.wait(30)
        return tmp_path

    reconcile.statement("its file does not come", file=file, columns={"key": "k"}, sql=NUMBERS)
    reconcile.check("a good one", sql=NUMBERS)
    monkeypatch.setattr("orchestrator.engine.reconcile.PAGE_S", 0.5)
    monkeypatch.setattr("orchestrator.engine.reconcile.FILE_S", 0.5)
    monkeypatch.setattr("orchestrator.engine.patience._INSIST_S", 0.5)
    report = run(connection, ["asks a dead server", "its file does not come", "a good one"])
    good, bad, file_check = report.checks
    assert (good.looked_at, good.error) == (1000, None)
    for each in (bad, file_check):
        assert each.error == "TimeoutError: it did not come back within 0.5 s, and was interrupted"
    assert "did not come back within 0.5 s" in report.problems[0]
    assert signal.signal(signal.SIGALRM, handler) is signal.SIG_IGN
    reconcile.hooks.remove(pages_a_dead_server)


@pytest.mark.timeout(60)
def test_a_check_that_goes_in_a_circle_ends(connection: Connection, tmp_path: Path) -> None:
    """`<>` for `>`: the last key of the page before is not in the next one, and it never ends."""
    wrong = NUMBERS.replace("id > %(after)s", "id <> %(after)s")
    (tmp_path / "file.csv").write_text("k\n")
    reconcile.check("a circle", sql=wrong)
    reconcile.statement("a circle too", file=tmp_path / "file.csv", columns={"key": "k"}, sql=wrong)
    reconcile.check("a good one", sql=NUMBERS)
    report = run(connection, ["a circle", "a circle too", "a good one"])
    good, *bad = sorted(report.checks, key=lambda each: each.name == "a good one", reverse=True)
    assert (good.looked_at, good.error) == (1000, None)
    for each in bad:
        assert each.error and "it does not page: it came to 't0200' a second time" in each.error


def test_a_check_that_fails_is_an_error_and_the_others_go_on(connection: Connection, tmp_path: Path) -> None:
    reconcile.check("a good one", sql=NUMBERS)
    reconcile.check("no table", sql="SELECT id AS key FROM nowhere WHERE id > %(after)s LIMIT %(limit)s")
    reconcile.check("other columns", sql="SELECT 1 AS one, %(after)s::text, %(limit)s::int")
    reconcile.check("one page", sql="SELECT 'a' AS key, NULL AS problem WHERE %(after)s = '' LIMIT %(limit)s")
    reconcile.check("a number as key", sql="SELECT 1 AS key, NULL AS problem WHERE %(after)s = '' LIMIT %(limit)s")
    reconcile.check(
        "writes", sql="DELETE FROM things WHERE id > %(after)s RETURNING id AS key, %(limit)s::text AS problem"
    )

    @reconcile.check
    def it_raises(connection: Any, after: str, limit: int) -> Iterator[Looked]:
        raise ValueError("no \0 idea \ud800")
        yield

    @reconcile.check
    def garbage(connection: Any, after: str, limit: int) -> Any:
        return 7 if after else ["a", {"b": 1}]

    @reconcile.check
    def no_money(connection: Any, after: str, limit: int) -> Iterator[Looked]:
        yield Looked("a", None, Decimal("NaN"), "EUR")

    @reconcile.check
    def never_ends(connection: Any, after: str, limit: int) -> Iterator[Looked]:
        while True:
            yield Looked("a")

    @reconcile.check
    def a_key_with_nul(connection: Any, after: str, limit: int) -> Iterator[Looked]:
        yield Looked("a\0b", "is bad")

    @reconcile.check
    def half_a_key(connection: Any, after: str, limit: int) -> Iterator[Looked]:
        yield Looked("a\ud800", "is bad")

    report = run(connection, list(reconcile.checks), tmp_path)
    errors = {each.name: each.error for each in report.checks}
    assert errors.pop("a good one") is None
    words = {
        "no table": "nowhere", "other columns": "a check returns key",
        "a number as key": "key and problem text",
        "writes": "read-only", "it raises": "ValueError: no", "garbage": "a check yields Looked",
        "no money": "amount Decimal", "never ends": "does not page",
        "a key with nul": "neither NUL", "half a key": "surrogate",
    }  # fmt: skip
    assert errors.pop("one page") is None  # a page that is not full is the last
    assert {name: word for name, word in words.items() if word not in (errors[name] or "")} == {}
    assert report.exit_code == 2 and len(report.files) == 3
    assert next(each.breaks for each in report.checks if each.name == "a good one") == 10


def test_there_may_be_very_many_checks(connection: Connection) -> None:
    names = [f"{hashlib.sha256(str(n).encode()).hexdigest()} is as it must be" for n in range(100)]
    for name in names:
        reconcile.check(name, sql=NUMBERS)
    first = run(connection, names)
    assert (len(first.checks), first.breaks, first.exit_code) == (100, 1000, 1)
    second = run(connection, names)
    assert [each.id for each in second.earlier] == [first.id]


def test_a_statement_that_takes_too_long_is_an_error_and_the_others_go_on(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.engine.reconcile._TIMEOUT", "SET LOCAL statement_timeout = '50ms'")
    reconcile.check("a slow one", sql="SELECT pg_sleep(60)::text AS key WHERE %(after)s = '' LIMIT %(limit)s")
    reconcile.check("things", sql=NUMBERS)

    @reconcile.check
    def another_database(connection: Any, after: str, limit: int) -> Iterator[Looked]:
        raise psycopg.OperationalError("the provider's database is away")
        yield

    report = run(connection, list(reconcile.checks))
    errors = {each.name: each.error or "" for each in report.checks}
    assert "statement timeout" in errors.pop("a slow one") and "is away" in errors.pop("another database")
    assert errors == {"things": ""}


def test_a_connection_that_is_lost_is_no_error_of_a_check(connection: Connection) -> None:
    @reconcile.check
    def cuts(connection: Any, after: str, limit: int) -> Iterator[Looked]:
        connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        yield

    with pytest.raises(psycopg.OperationalError):
        run(connection, ["cuts"])


def test_a_directory_that_cannot_be_written_is_said_and_the_report_is_there(
    connection: Connection, tmp_path: Path
) -> None:
    reconcile.check("things", sql=NUMBERS)
    (tmp_path / "file").touch()
    report = run(connection, ["things"], tmp_path / "file")
    assert report.exit_code == 2 and "could not be written" in report.problems[0]
    assert connection.execute("SELECT count(*) FROM orchestrator.reports WHERE finished_at IS NOT NULL").fetchone() == (
        1,
    )


def test_declarations_that_are_wrong_are_refused() -> None:
    reconcile.check("one", sql="SELECT 1")
    with pytest.raises(DefinitionError, match="two checks"):
        reconcile.check("one", sql="SELECT 2")
    with pytest.raises(DefinitionError, match="engine:"):
        reconcile.check("engine: mine", sql="SELECT 1")
    with pytest.raises(DefinitionError, match="columns="):
        reconcile.statement("file", file="f.csv", columns={"amount": "Amount"}, sql="SELECT 1")


def test_one_check_is_named_by_its_name(database_url: str) -> None:
    client = Client(Settings.from_environment({}, database_url=database_url), lambda *_: None, lambda: "celery")
    assert [each.name for each in client.reconcile("engine: locks").checks] == ["engine: locks"]
    client.pool.close()


def test_a_check_that_there_is_not_is_named(connection: Connection) -> None:
    with pytest.raises(UsageError, match="there is no check 'thing'"):
        run(connection, ["thing"])


@pytest.mark.parametrize("kind", ["integer", "bigint", "numeric"])
def test_an_amount_of_sql_may_be_a_whole_number_such_as_cents(connection: Connection, kind: str) -> None:
    reconcile.check("cents", sql=NUMBERS.replace("amount,", f"(amount * 100)::{kind} AS amount,"))
    (check,) = run(connection, ["cents"]).checks
    assert (check.error, check.looked_at) == (None, 1000)
    assert {currency: Decimal(total) for currency, total in check.sums.items()} == {"EUR": 25000, "USD": 25000}


# -- against a file ----------------------------------------------------------------------------------------------------
OURS = "SELECT id AS key, amount, currency FROM things WHERE id > %(after)s ORDER BY id LIMIT %(limit)s"


def statement(file: Path, **columns: str) -> None:
    wanted = columns or {"key": "Reference", "amount": "Amount", "currency": "Ccy"}
    reconcile.statement("bank", file=file, columns=wanted, sql=OURS)


@pytest.fixture
def lines(connection: Connection) -> list[str]:
    """A file that agrees with ours."""
    found = connection.execute("SELECT id, amount, currency FROM things ORDER BY id DESC").fetchall()
    return ["Date,Reference,Amount,Ccy", *(f"2026-01-01,{key},{amount},{currency}" for key, amount, currency in found)]


def test_a_file_that_agrees_has_no_breaks(connection: Connection, lines: list[str], tmp_path: Path) -> None:
    statement(tmp_path / "bank.csv")
    (tmp_path / "bank.csv").write_text("\ufeff" + "\r\n".join(lines))
    (check,) = run(connection, ["bank"]).checks
    assert (check.error, check.examples, check.looked_at) == (None, [], 1000)
    assert check.sums == {"EUR": "250.0", "USD": "250.0"}


def test_each_difference_to_a_file_is_found_once(connection: Connection, lines: list[str], tmp_path: Path) -> None:
    lines = [line for line in lines if ",t0003," not in line]
    for old, new in (("t0005,0.5", "t0005,0.7"), ("t0007,0.5,USD", "t0007,0.5,EUR"), ("t0009,0.5", "t0009,half")):
        lines = [line.replace(old, new) for line in lines]
    lines += ["d,t0011,0.5,USD", "d,unknown,9,EUR", "d,,1,EUR"]
    (tmp_path / "bank.csv").write_text("\n".join(lines))
    statement(tmp_path / "bank.csv")
    (check,) = run(connection, ["bank"]).checks
    assert check.error is None
    found = sorted((each["key"], each["problem"]) for each in check.examples)
    assert found == [
        ("line 1003", "line 1003: its line in the file has no key, or no amount"),
        ("t0003", "the file does not have it"),
        ("t0005", "the file says 0.7, we say 0.5"),
        ("t0007", "the file says EUR, we say USD"),
        ("t0009", "line 993: its amount in the file is 'half'"),
        ("t0011", "line 1001 of the file has it a second time"),
        ("unknown", "line 1002 of the file has it, and we do not"),
    ]


def test_a_file_with_other_columns_or_none_is_an_error(connection: Connection, tmp_path: Path) -> None:
    (tmp_path / "bank.csv").write_text("a,b\n1,2\n")
    statement(tmp_path / "bank.csv")
    reconcile.statement("gone", file=tmp_path / "gone.csv", columns={"key": "a"}, sql=OURS)
    bank, gone = run(connection, ["bank", "gone"]).checks
    assert "no column 'Amount', 'Ccy', 'Reference'; it has a, b" in str(bank.error)
    assert str(bank.error).startswith("bank.csv has"), "a sentence, without the name of a class"
    assert "No such file" in str(gone.error)


def test_a_file_in_another_encoding_is_an_error_that_names_it(connection: Connection, tmp_path: Path) -> None:
    (tmp_path / "bank.csv").write_bytes(
        "Date,Reference,Amount,Ccy\nd,t0001,0.5,USD\nd,Müller,1,EUR\n".encode("latin-1")
    )
    statement(tmp_path / "bank.csv")
    assert "bank.csv is not UTF-8" in str(run(connection, ["bank"]).checks[0].error)


def test_a_check_sees_one_moment_and_may_not_write(connection: Connection, database_url: str) -> None:
    seen: list[Any] = []

    @reconcile.check
    def looks_twice(mine: Any, after: str, limit: int) -> Iterator[Looked]:
        count = "SELECT count(*) FROM things"
        seen.append(mine.execute(count).fetchone())
        with psycopg.connect(database_url, autocommit=True) as other:
            other.execute("DELETE FROM things WHERE id = 't0001'")
        seen.append(mine.execute(count).fetchone())
        return iter(())

    run(connection, ["looks twice"])
    assert seen == [(1000,), (1000,)]
