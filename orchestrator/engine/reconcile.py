"""A reconciliation: every check page by page, each page in a short transaction that may only read.

Owns how checks are run and what becomes of one that fails: it is an error of that check, and the rest goes on.  Must
never mend anything; a break may start a run, if the check's author says so.  Who was interrupted goes on where it was;
two at once share a report.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Context, Decimal
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from orchestrator.engine.audits import AUDITS
from orchestrator.engine.patience import at_most
from orchestrator.engine.report_page import write
from orchestrator.errors import UsageError
from orchestrator.failpoints import failpoint
from orchestrator.reconcile import Check, Looked, Statement, checks, correction_id, hooks
from orchestrator.saga import Saga
from orchestrator.store import reports, runs
from orchestrator.store.connection import Connection, is_in_statement
from orchestrator.store.reports import Earlier, Progress

logger = logging.getLogger(__name__)
Prepare = Callable[[Saga[Any, Any], str, Looked], runs.Start]  # saga, run id, break

PAGE = 200  # things that are looked at in one transaction
PAGE_S = 600.0  # a page of a function of an application's own, and a hook
FILE_S = 3600.0  # all of a statement, with its file
EXAMPLES = 1000  # breaks of a check that are kept, and start runs; all are counted
_TIMEOUT = "SET LOCAL statement_timeout = '60s'"
_LONGEST = 500
_EXACTLY = Context(prec=1000)  # of decimal numbers, which are rounded to 28 digits by default


@dataclass(slots=True)
class Report:
    """What a reconciliation came to; `problems` are those of the report itself: files not written, hooks that raise."""

    id: int
    started_at: datetime
    checks: list[Progress]
    earlier: list[Earlier]
    files: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def breaks(self) -> int:
        """How many breaks were found."""
        return sum(each.breaks for each in self.checks)

    @property
    def exit_code(self) -> int:
        """0 if all is well, 1 if there are breaks, 2 if something could not be checked or reported."""
        if self.problems or any(each.error for each in self.checks):
            return 2
        return 1 if self.breaks else 0


def reconcile(
    connection: Connection,
    names: Sequence[str] = (),
    directory: Path | None = None,
    now: datetime | None = None,
    prepare: Prepare | None = None,
) -> Report:
    """Run these checks, or all; write the report into a directory, if one is given; call the hooks.

    Without `prepare` no break starts a run.  Commits; the connection must be in autocommit mode.
    Raises: UsageError for a check that there is not.
    """
    known: dict[str, Check | Statement] = {**AUDITS, **checks}
    if unknown := sorted(set(names) - known.keys()):
        there = ", ".join(map(repr, sorted(known)))
        raise UsageError(f"there is no check {', '.join(map(repr, unknown))}; there are {there}")
    wanted = sorted(set(names) or known)
    report_id, started_at = reports.open_report(connection, wanted, now)
    while todo := [each for each in reports.progress(connection, report_id) if not each.done]:
        for each in todo:
            _run(connection, report_id, known[each.name], each, prepare)
    report = Report(
        report_id, started_at, reports.progress(connection, report_id), reports.trend(connection, report_id)
    )
    failpoint("reconcile.write", connection)
    if directory is not None:
        write(report, reports.latest(connection, report_id), directory)
    _tell(report)
    failpoint("reconcile.finish", connection)
    reports.finish(connection, report_id, now)  # last: who dies before it is followed by one who writes and tells
    failpoint("reconcile.finished", connection)
    reports.forget(connection, now)
    failpoint("reconcile.after", connection)
    return report


def _tell(report: Report) -> None:
    """Call the hooks, if there is something to tell; what they raise stops nothing."""
    for hook in hooks if report.exit_code else ():
        try:
            with at_most(PAGE_S):
                hook(report)
        except Exception as error:
            name = getattr(hook, "__qualname__", repr(hook))
            logger.exception("reconcile: the hook %s raised", name)
            report.problems.append(_text(f"the hook {name} raised {type(error).__name__}: {error}"))


def _run(
    connection: Connection, report_id: int, check: Check | Statement, at: Progress, prepare: Prepare | None
) -> None:
    """Run a check to its end, or until somebody else who does has overtaken."""
    path = _Path(at.cursor)
    while not at.done:
        page = _Page(check, at, prepare)
        try:
            page.look(connection)
            path.goes_on_to(at.cursor, ended=at.done)
        except Exception as error:  # whatever a check does wrong, the others go on
            if connection.closed:  # a statement that takes too long is an OperationalError as well, and the check's own
                raise
            at.error, at.done = _text(_words(error)), True
        if not _written(connection, report_id, page):
            return
        at.pages += 1


def _written(connection: Connection, report_id: int, page: _Page) -> bool:
    """Write a page together with the runs that its breaks start; False if somebody else has written it.

    No doorbell is rung: the pump finds the runs.
    """
    failpoint("reconcile.page", connection)
    with connection.transaction():
        written = reports.advance(connection, report_id, page.at)
        for new in page.starts if written else ():
            runs.start(connection, new)  # of an id that is taken, nothing
        failpoint("reconcile.page.written", connection)
    failpoint("reconcile.page.after", connection)
    return written


@dataclass(slots=True)
class _Page:
    """A page of a check: what was looked at is counted, and breaks may ask for runs."""

    check: Check | Statement
    at: Progress
    prepare: Prepare | None
    starts: list[runs.Start] = field(default_factory=list)

    def look(self, connection: Connection) -> None:
        at = self.at
        if isinstance(self.check, Statement):
            with at_most(FILE_S, partial(is_in_statement, connection)):
                for looked in _compared(connection, self.check):
                    self._count(looked)
            at.done = True
            return
        found = _checked(_asked(connection, self.check, at.cursor), at.cursor)
        for looked in found:
            self._count(looked)
        at.done = len(found) < PAGE
        at.cursor = found[-1].key if found else at.cursor

    def _count(self, looked: Looked) -> None:
        at = self.at
        at.looked_at += 1
        if looked.amount is not None:
            currency = _text(looked.currency or "")
            at.sums[currency] = str(_EXACTLY.add(Decimal(at.sums.get(currency, "0")), looked.amount))
        if looked.problem is None:
            return
        at.breaks += 1
        if len(at.examples) < EXAMPLES:
            money = {} if looked.amount is None else {"amount": str(looked.amount), "currency": looked.currency}
            told = {"key": _text(looked.key), "problem": _text(looked.problem), **money}
            at.examples.append(told | self._corrected(looked))

    def _corrected(self, looked: Looked) -> dict[str, str]:
        """Ask for the run that corrects a break; that it cannot be started is an error, and hides no other break."""
        if self.check.corrected_by is None or self.prepare is None:
            return {}
        run_id = correction_id(self.check.name, looked.key)
        try:
            self.starts.append(self.prepare(self.check.corrected_by, run_id, looked))
        except Exception as error:
            name = self.check.corrected_by.name
            self.at.error = _text(f"no run of {name} could be started: {type(error).__name__}: {error}")
            return {}
        return {"run": run_id}


class _Path:
    """The way of a check from key to key, which must not be a circle; found as Brent does, with one key in memory."""

    def __init__(self, key: str) -> None:
        self._kept, self._steps, self._length = key, 0, 1

    def goes_on_to(self, key: str, *, ended: bool = False) -> None:
        """Note that a page ended with this key.  Raises: UsageError if one has before, and another page is to come."""
        if key == self._kept and not ended:
            raise UsageError(
                f"it does not page: it came to {key!r:.80} a second time; it must return keys beyond `after`"
            )
        self._steps += 1
        if self._steps == self._length:
            self._kept, self._steps, self._length = key, 0, 2 * self._length


def _asked(connection: Connection, check: Check, after: str) -> list[Looked]:
    with runs.snapshot(connection):
        connection.execute(_TIMEOUT)
        if check.function is not None:
            with at_most(PAGE_S, partial(is_in_statement, connection)):
                return list(islice(check.function(connection, after, PAGE), PAGE + 1))
        return _rows(connection, check.sql, after)


def _rows(connection: Connection, sql: str, after: str) -> list[Looked]:
    cursor = connection.execute(sql, {"after": after, "limit": PAGE})
    names = [column.name for column in cursor.description or ()]
    if not {"key"} <= set(names) <= {"key", "problem", "amount", "currency"}:
        raise UsageError(f"its SQL returns {', '.join(names)}; a check returns key, problem, amount, currency")
    return [_looked(dict(zip(names, row, strict=True))) for row in cursor.fetchmany(PAGE + 1)]


def _looked(row: dict[str, Any]) -> Looked:
    amount = row.get("amount")
    return Looked(**{**row, "amount": Decimal(amount) if type(amount) is int else amount})  # a column of cents


def _checked(found: Iterable[Any], after: str) -> list[Looked]:
    """Return what a check found.  Raises: UsageError if that is not what a check returns."""
    rows = list(found)
    for each in rows:
        if not _is_looked(each):
            raise UsageError(
                f"it returned {each!r:.200}; a check yields Looked: key and problem text, amount Decimal; a key holds "
                "neither NUL nor half of a surrogate pair"
            )
    keys = [each.key for each in rows]
    if len(rows) > PAGE or len(set(keys)) < len(keys) or after in keys:
        raise UsageError(f"it does not page: it must return at most `limit` keys, each once, beyond {after!r:.80}")
    return rows


def _is_looked(each: Any) -> bool:
    if not isinstance(each, Looked):
        return False
    key, problem, amount, currency = (getattr(each, name) for name in ("key", "problem", "amount", "currency"))
    texts = isinstance(key, str) and isinstance(problem, str | None) and isinstance(currency, str | None)
    return texts and _is_storable(key) and (amount is None or (isinstance(amount, Decimal) and amount.is_finite()))


def _is_storable(key: str) -> bool:
    """Tell whether a key can be written down as how far a check has come."""
    return bool(key) and "\0" not in key and key.encode(errors="replace").decode() == key


def _words(error: Exception) -> str:
    """Return what an error says to a person: our own are sentences, of others the kind is needed as well."""
    return str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"


def _text(given: str) -> str:
    """Return a text as it can be stored and shown."""
    return given.replace("\0", "").encode(errors="replace").decode()[:_LONGEST]


# -- against a file ----------------------------------------------------------------------------------------------------
_THEIRS = "CREATE TABLE theirs (key TEXT PRIMARY KEY, line INTEGER, amount TEXT, currency TEXT, met INTEGER DEFAULT 0)"
_LOAD = "INSERT OR IGNORE INTO theirs (key, line, amount, currency, met) VALUES (?, ?, ?, ?, ?)"
_UNMET = "SELECT key, line, amount, currency FROM theirs WHERE met = 0"
_UNREADABLE = 2


def _compared(connection: Connection, check: Statement) -> Iterator[Looked]:
    """Compare a file with ours, in both directions; what the file holds lies in a temporary one, not in memory."""
    with contextlib.closing(sqlite3.connect("")) as theirs:
        theirs.execute(_THEIRS)
        yield from _loaded(theirs, check)
        yield from _ours(connection, theirs, check)
        for key, line, amount, currency in theirs.execute(_UNMET):
            yield Looked(key, f"line {line} of the file has it, and we do not", amount and Decimal(amount), currency)


def _loaded(theirs: sqlite3.Connection, check: Statement) -> Iterator[Looked]:
    """Yield what is wrong with the file itself."""
    for line, each in check.lines():
        amount = None if each.amount is None else str(each.amount)
        row = (each.key, line, amount, each.currency, _UNREADABLE if each.problem else 0)
        new = theirs.execute(_LOAD, row).rowcount if each.key else 0
        if each.problem is not None:
            yield Looked(each.key or f"line {line}", f"line {line}: {each.problem}")
        elif not new:
            yield Looked(each.key, f"line {line} of the file has it a second time")


def _ours(connection: Connection, theirs: sqlite3.Connection, check: Statement) -> Iterator[Looked]:
    after, query = "", Check(check.name, check.sql)
    path = _Path(after)
    while page := _checked(_asked(connection, query, after), after):
        for mine in page:
            its = theirs.execute("SELECT amount, currency, met FROM theirs WHERE key = ?", (mine.key,)).fetchone()
            theirs.execute("UPDATE theirs SET met = 1 WHERE met = 0 AND key = ?", (mine.key,))
            yield Looked(mine.key, mine.problem or _difference(mine, its), mine.amount, mine.currency)
        after = page[-1].key
        path.goes_on_to(after)


def _difference(mine: Looked, its: tuple[str | None, str | None, int] | None) -> str | None:
    if its is None:
        return "the file does not have it"
    amount, currency, met = its
    if met == _UNREADABLE:  # which is told already
        return None
    if amount is not None and mine.amount is not None and Decimal(amount) != mine.amount:
        return f"the file says {amount}, we say {mine.amount}"
    if currency and mine.currency and currency != mine.currency:
        return f"the file says {currency}, we say {mine.currency}"
    return None
