"""Old runs go: in bounded transactions, whole families at a time, written to a file first if that is wanted.

Owns what goes together and in which order.  Must never free an id: what was pruned cannot be started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.errors import UsageError
from orchestrator.failpoints import failpoint
from orchestrator.machine.states import TERMINAL
from orchestrator.store import pruning
from orchestrator.store.connection import Connection
from orchestrator.store.pruning import Member
from orchestrator.store.recorded import head, several
from orchestrator.store.runs import snapshot

_PAGE = 300  # runs that are looked at, or go, in one transaction
_ROWS = 10_000  # journal rows that go in one transaction; a single run may have more
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which runs go: those that nobody called, `limit` of them, the oldest; `states` are terminal ones, none is all."""

    older_than: timedelta
    states: Sequence[str] = ()
    saga: str = ""
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.older_than < timedelta(0):
            raise UsageError("prune: older_than is an age, such as timedelta(days=90)")
        if isinstance(self.states, str):
            raise UsageError(f"prune: states is a list of states, such as [{self.states!r:.80}]")
        if wrong := sorted(set(self.states) - TERMINAL):
            raise UsageError(f"prune: only runs that have ended can go, not those that are {', '.join(wrong)}")
        if self.limit is not None and self.limit < 1:
            raise UsageError("prune: limit is a number of runs, at least 1")


@dataclass(slots=True)
class Pruned:
    """What has gone (with `dry_run`: what would), by saga and state; what was kept although it was old enough."""

    gone: Counter[tuple[str, str]] = field(default_factory=Counter)
    kept: int = 0
    archive: str | None = None

    @property
    def total(self) -> int:
        """How many runs, with those that belong to others."""
        return self.gone.total()

    def as_json(self) -> dict[str, Any]:
        """Return it in a form for programs."""
        found = [{"saga": saga, "state": state, "runs": many} for (saga, state), many in sorted(self.gone.items())]
        return {"total": self.total, "kept": self.kept, "archive": self.archive, "gone": found}


def age(text: str) -> timedelta:
    """Return the age that a text such as ``90d``, ``12h`` or ``2w`` names.  Raises: UsageError."""
    found = re.fullmatch(r"(\d{1,9})([smhdw])", text.strip())
    try:
        assert found is not None
        return timedelta(**{_UNITS[found[2]]: int(found[1])})
    except (AssertionError, OverflowError):
        raise UsageError(f"{text!r:.80} is no age; write for example 90d, 12h or 2w") from None


def prune(
    connection: Connection,
    chosen: Chosen,
    *,
    dry_run: bool = False,
    archive: str | os.PathLike[str] | None = None,
    now: datetime | None = None,
) -> Pruned:
    """Let old runs go, page by page.  Commits; the connection must be in autocommit mode.

    Raises: UsageError if nothing can be written to the archive; what has gone before was written there.
    """
    told = Pruned()
    before = _before(pruning.clock(connection, now), chosen.older_than)
    with contextlib.ExitStack() as stack:
        file: BinaryIO | None = None
        stay: set[str] = set()  # heads: of a large family that has lost a part, and then moved, the rest stays
        for batch in _batches(connection, chosen, before, told):
            if archive is not None and not dry_run:
                file = file or stack.enter_context(_opened(archive, told))
                _write(file, connection, batch)
            heads = {each.head for each in batch}
            if heads & stay or not (dry_run or _deleted(connection, batch, now)):
                stay |= heads
                told.kept += len(batch)
            else:
                told.gone.update((each.saga, each.state) for each in batch)
    return told


def _before(now: datetime, older_than: timedelta) -> datetime:
    try:
        return now - older_than
    except OverflowError:
        return datetime.min.replace(year=1000, tzinfo=UTC)


def _batches(connection: Connection, chosen: Chosen, before: datetime, told: Pruned) -> Iterator[list[Member]]:
    """Yield what goes in one transaction: whole families, or a part of a large one, its head last."""
    left, after = chosen.limit, None
    while seen := pruning.page(connection, before, after, states=chosen.states, saga=chosen.saga, limit=_PAGE):
        after = seen[-1]
        heads = [each.id for each in seen if each.fits]
        for batch in _packed(_free(connection, heads, told)):
            if left is not None:
                batch = _at_most(batch, left)
                left -= sum(each.id == each.head for each in batch)
            if batch:
                yield batch
        if left == 0:
            return


def _free(connection: Connection, heads: Sequence[str], told: Pruned) -> Iterator[list[Member]]:
    """Yield the families of which all have ended; the others stay whole."""
    for _, group in groupby(pruning.families(connection, heads), key=lambda each: each.head):
        family = list(group)
        if all(each.free for each in family):
            yield family
        else:
            told.kept += len(family)


def _packed(families: Iterator[list[Member]]) -> Iterator[list[Member]]:
    """Yield families together as long as they fit; one that is larger goes in parts, its head with the last."""
    batch: list[Member] = []
    for family in families:
        if batch and (len(batch) + len(family) > _PAGE or sum(each.rows for each in (*batch, *family)) > _ROWS):
            yield batch
            batch = []
        batch += family
        while len(batch) > _PAGE:
            yield batch[:_PAGE]
            batch = batch[_PAGE:]
    if batch:
        yield batch


def _at_most(batch: list[Member], heads: int) -> list[Member]:
    """Return as much of a batch as belongs to its first so many heads."""
    names = list(dict.fromkeys(each.head for each in batch))[:heads]
    return [each for each in batch if each.head in names]


def _deleted(connection: Connection, batch: Sequence[Member], now: datetime | None) -> bool:
    """Delete all of a batch, or nothing if a late effect has been noted for one of them meanwhile."""
    failpoint("prune.bury", connection)
    pruning.bury(connection, [each.id for each in batch], now)
    failpoint("prune.buried", connection)
    gone = False
    with contextlib.suppress(_Moved), connection.transaction():
        if not pruning.delete(connection, batch):
            raise _Moved
        failpoint("prune.deleted", connection)
        gone = True
    failpoint("prune.after", connection)
    return gone


class _Moved(Exception):
    """Rolls a batch back."""


# -- the archive -------------------------------------------------------------------------------------------------------
def _opened(folder: str | os.PathLike[str], told: Pruned) -> BinaryIO:
    """Create a file of its own for what goes now.  Raises: UsageError."""
    path = Path(folder) / f"pruned-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{os.getpid()}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("xb")
        _sync_folder(path.parent)
    except OSError as error:
        raise UsageError(f"prune: cannot write to the archive {folder}: {error.strerror}; nothing has gone") from None
    told.archive = str(path)
    return file


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(file: BinaryIO, connection: Connection, batch: Sequence[Member]) -> None:
    """Write runs, one a line, and wait until they are on the disk; one that another prune took is not there any more.

    Raises: UsageError.
    """
    try:
        with snapshot(connection):
            for row, journal in several(connection, [each.id for each in batch]):
                for part in _line(row, journal):
                    file.write(part.encode())
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):  # it tries again to write what it holds
            file.close()
        raise UsageError(f"prune: cannot write to the archive: {error.strerror}; what it was to hold stays") from None


def _line(row: dict[str, Any], journal: Iterator[tuple[datetime, str]]) -> Iterator[str]:
    """Yield a run as JSON on one line, piece by piece; entries are copied as they are stored."""
    yield f'{json.dumps(head(row))[:-1]}, "journal": ['
    comma = ""
    for at, entries in journal:
        yield f'{comma}["{at.isoformat()}", {entries.replace(chr(10), " ")}]'
        comma = ", "
    yield f'], "row": {json.dumps(row, default=_plain)}}}\n'


def _plain(value: Any) -> str:
    assert isinstance(value, (datetime, date))
    return value.isoformat()
