"""Checks of an application: what must be true between its runs, its own rows, and what others say.

    reconcile.check("every completed transfer has two entries", sql="SELECT ... AS key, ... AS problem ...")

    @reconcile.check
    def every_charge_is_known(connection, after, limit): ...

    @reconcile.on_breaks
    def page_somebody(report): ...

Owns what a check is, which there are, and who is told of breaks.  Must never read a database: the engine does, page by
page.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload

from orchestrator.codec import dumps, is_name
from orchestrator.errors import DefinitionError, UsageError

if TYPE_CHECKING:
    from orchestrator.engine.reconcile import Report
    from orchestrator.saga import Saga

__all__ = ["Check", "Looked", "Statement", "check", "checks", "correction_id", "hooks", "on_breaks", "statement"]


@dataclass(frozen=True, slots=True)
class Looked:
    """One thing that was looked at: its key, what is wrong with it if anything, and the money it is about."""

    key: str
    problem: str | None = None
    amount: Decimal | None = None
    currency: str | None = None


Page = Callable[[Any, str, int], Iterable[Looked]]
Correction: TypeAlias = "Saga[[Looked], Any] | None"


@dataclass(frozen=True, slots=True)
class Check:
    """A check: SQL text, or a function of a connection, the last key that was looked at, and how many to look at."""

    name: str
    sql: str = ""
    function: Page | None = None
    corrected_by: Correction = None


@dataclass(frozen=True, slots=True)
class Statement:
    """A file of somebody else, one line for each thing, against rows of ours."""

    name: str
    sql: str
    file: Callable[[], Path]
    columns: Mapping[str, str]
    delimiter: str = ","
    corrected_by: Correction = None

    def lines(self) -> Iterator[tuple[int, Looked]]:
        """Yield line number and content; what cannot be read is a problem.  Raises: UsageError, OSError, csv.Error."""
        path = Path(self.file())
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=self.delimiter)
            try:
                self._refuse_other_columns(path, reader.fieldnames or ())
                for row in reader:
                    yield reader.line_num, self._line(row)
            except UnicodeDecodeError:
                raise UsageError(f"{path.name} is not UTF-8 after line {reader.line_num}; convert it first") from None

    def _refuse_other_columns(self, path: Path, found: Sequence[str]) -> None:
        if missing := sorted(set(self.columns.values()) - set(found)):
            there = ", ".join(found) or "none"
            raise UsageError(f"{path.name} has no column {', '.join(map(repr, missing))}; it has {there}")

    def _line(self, row: Mapping[str, str | None]) -> Looked:
        key = (row[self.columns["key"]] or "").strip()
        given = {name: (row[column] or "").strip() for name, column in self.columns.items()}
        try:
            amount = Decimal(given["amount"]) if "amount" in given else None
        except InvalidOperation:
            return Looked(key, f"its amount in the file is {given['amount']!r:.80}")
        if not key or (amount is not None and not amount.is_finite()):
            return Looked(key, "its line in the file has no key, or no amount")
        return Looked(key, None, amount, given.get("currency"))


checks: dict[str, Check | Statement] = {}


def _register(new: Check | Statement) -> None:
    if not is_name(new.name) or new.name.startswith("engine:"):
        raise DefinitionError(f"a check needs a name that does not begin with 'engine:', not {new.name!r:.80}")
    known = checks.get(new.name)
    if known is not None and known != new and not _again(known, new):
        raise DefinitionError(f"there are two checks named {new.name!r}")
    checks[new.name] = new


def _again(known: Check | Statement, new: Check | Statement) -> bool:
    """Tell whether a module was imported twice, under one name or two."""
    mine, its = getattr(known, "function", None), getattr(new, "function", None)
    return mine is not None and its is not None and mine.__code__.co_filename == its.__code__.co_filename


def correction_id(check_name: str, key: str) -> str:
    """Return the id of the run that corrects a break: the same every night, so that it is started once."""
    return f"reconcile/{hashlib.sha256(dumps([check_name, key]).encode()).hexdigest()[:32]}"


@overload
def check(name: Page, /) -> Page: ...
@overload
def check(name: str, /, *, sql: str, corrected_by: Correction = None) -> Check: ...
@overload
def check(name: str, /, *, corrected_by: Correction = None) -> Callable[[Page], Page]: ...
def check(name: Any, /, *, sql: str = "", corrected_by: Correction = None) -> Any:
    """Register a check: as a decorator of a function, with or without a name, or with SQL.

    SQL gets ``%(after)s`` and ``%(limit)s`` and returns columns ``key`` and ``problem`` (null if all is well), perhaps
    ``amount`` and ``currency``, ordered by key, all of them beyond `after`, at most `limit`.  A function gets a
    connection that may only read, `after` and `limit`, and yields `Looked` in the same manner.  With `corrected_by`, a
    saga of one `Looked`, each break that is kept starts a run of it, once for each key, for ever.
    Raises: DefinitionError.
    """
    if callable(name):
        _register(Check(name.__name__.replace("_", " "), function=name))
        return name
    if sql:
        made = Check(name, sql, corrected_by=corrected_by)
        _register(made)
        return made

    def register(function: Page) -> Page:
        _register(Check(name, function=function, corrected_by=corrected_by))
        return function

    return register


def statement(
    name: str,
    *,
    file: Callable[[], Path] | Path | str,
    columns: Mapping[str, str],
    sql: str,
    delimiter: str = ",",
    corrected_by: Correction = None,
) -> Statement:
    """Register a check of a CSV file against rows of ours, in both directions; `columns` says which is which.

    `columns` maps ``key`` and perhaps ``amount`` and ``currency`` to the file's own headings.  `sql` returns ours, as
    that of `check` does; ``problem`` stays null; `corrected_by` is as there.  Raises: DefinitionError.
    """
    if "key" not in columns or set(columns) - {"key", "amount", "currency"}:
        raise DefinitionError(f"check {name!r}: columns= maps key, and perhaps amount and currency, to headings")
    where = file if callable(file) else lambda: Path(file)
    made = Statement(name, sql, where, dict(columns), delimiter, corrected_by)
    _register(made)
    return made


Hook = Callable[["Report"], object]
H = TypeVar("H", bound=Hook)
hooks: list[Hook] = []


def on_breaks(hook: H) -> H:
    """Have a function called with every report that has breaks, or that could not look at something; a decorator.

    It is called in the process that reconciles, when all is written; after a crash or by two at once perhaps twice for
    the same ``report.id``.  What it raises is noted, and stops nothing.
    """
    if hook not in hooks:
        hooks.append(hook)
    return hook
