"""A run's journal as events that people read: what was asked, what came of it, how it was undone.

Owns the wording of every journal entry, for ``history`` and ``diagram``.  Must never print.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from orchestrator.cli import words
from orchestrator.machine.journal import (
    Abandoned,
    Asked,
    Attempted,
    CancelAsked,
    CancelRefused,
    Carried,
    Cleared,
    CodeBegan,
    Concluded,
    Continued,
    DeadlinePassed,
    Ended,
    Entry,
    FamilyPivot,
    Late,
    Operated,
    Parked,
    ProbeAsked,
    Raised,
    Reported,
    Restored,
    Returned,
    Revoked,
    RollbackBegan,
    Settled,
    Signalled,
    Unasked,
    UndoAsked,
    Undone,
    Unlocked,
    Versioned,
    decode_entry,
    with_begin,
)
from orchestrator.machine.policy import Effect
from orchestrator.saga.mapping import run_page

History = Iterable[tuple[int, datetime, list[Any]]]


@dataclass(frozen=True, slots=True)
class Event:
    """One entry in words; `mark` is a sign of its kind, `details` are lines that belong to it."""

    seq: int
    at: datetime
    entry: Entry
    mark: str
    style: str
    text: str
    details: tuple[str, ...] = ()
    error: dict[str, Any] | None = None


@dataclass(slots=True)
class _Tale:
    """What has been told so far: the requests by key, and how much of a value is shown."""

    room: int
    asked: dict[str, Asked] = field(default_factory=dict)
    told: str = ""  # the last error, which the entries that follow from it repeat

    @property
    def error_room(self) -> int:
        return words.ERROR_ROOM if self.room else 0

    def value(self, value: Any) -> str:
        return words.value(value, self.room)

    def error(self, error: dict[str, Any] | None) -> str:
        """Return an error in words, once."""
        said = words.error(error, self.error_room) if error else ""
        new, self.told = said != self.told, said or self.told
        return said if new else ""

    def harmless(self, key: str) -> bool:
        return key in self.asked and (self.asked[key].effect == Effect.NONE or self.asked[key].kind == "once")

    def undo_of(self, key: str) -> str:
        undo = self.asked[key].undo if key in self.asked else None
        return words.short(undo.task) if undo else "its compensation"


def events(history: History, room: int = 0) -> list[Event]:
    """Return the events of a journal in their order; values are cut to `room` characters (0: whole)."""
    tale, found = _Tale(room), []
    before: datetime | None = None
    for seq, at, entries in history:
        for form in entries:
            entry = with_begin(decode_entry(form), before)
            mark, style, text, *details = _TELL[type(entry)](tale, entry, at) if type(entry) in _TELL else _other(entry)
            error = getattr(entry, "error", None)
            found.append(Event(seq, at, entry, mark, style, text, tuple(filter(None, details)), error))
        before = at
    return found


def took(entry: Any, at: datetime) -> timedelta | None:
    """Return how long an attempt took from its begin to the commit of its outcome."""
    began = getattr(entry, "began", "")
    return max(timedelta(0), at - datetime.fromisoformat(began)) if began else None


def _circumstances(entry: Any, at: datetime) -> str:
    """Say how long an attempt took and where."""
    length = took(entry, at)
    parts = [f"after {words.duration(length)}"] if length is not None else []
    worker = getattr(entry, "worker", "")
    return " ".join(parts + ([f"on {worker}"] if worker else []))


def _told(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _nth(attempt: int) -> str:
    return f"at attempt {attempt}" if attempt > 1 else ""


# -- one function an entry ---------------------------------------------------------------------------------------------
_ASKED_FOR = {
    "once": "{key} asked",
    "signal": "waits for signal {task}",
    "lock": "queues for lock {task}",
    "scope": "an exception leaves {key}: what was done inside is to be undone",
}


def _asked(tale: _Tale, entry: Asked, at: datetime) -> tuple[str, ...]:
    tale.asked[entry.key] = entry
    undo = f"undo ready: {entry.undo.task}" if entry.undo else ""
    if entry.kind in _ASKED_FOR:
        said = tale.error(entry.args.get("error")) if entry.kind == "scope" else ""
        return "→", "", _ASKED_FOR[entry.kind].format(key=entry.key, task=entry.task), said
    pivot = "the point of no return" if entry.effect == "pivot" else ""
    if entry.task == run_page.name and tale.room:
        return "→", "", f"{entry.key} asked for {_page(entry.args.get('spec'))}", undo
    of = "" if entry.task in entry.key else f" ({entry.task})"  # an item of a map, or a call with a key of its own
    return "→", "", f"{entry.key}{of} asked with ({words.arguments(entry.args, tale.room)})", undo, pivot


def _page(spec: Any) -> str:
    """Say which items of a map are in a page: what is recorded of it is the engine's own."""
    do, first = (spec.get("do") or {}, spec.get("first")) if isinstance(spec, dict) else ({}, None)
    return f"{do.get('task')} with the items of a page, from number {first}"


def _attempted(tale: _Tale, entry: Attempted, at: datetime) -> tuple[str, ...]:
    what = {"undo": "undo of ", "probe": "probe of "}.get(entry.role, "")
    in_doubt = entry.doubt and entry.role == "do" and not tale.harmless(entry.key)
    doubt = ", may have taken effect" if in_doubt else ""
    where = _circumstances(entry, at)
    tale.told = ""
    said = tale.error(entry.error)
    return "✗", "yellow", _told(f"{what}{entry.key} attempt {entry.attempt} failed", where) + doubt, said


_ENDINGS = {
    "rejected": ("was rejected", ": it had no effect"),
    "failed": ("failed for good", ""),
    "unknown": ("ended unknown", ": it may have taken effect"),
}


def _settled(tale: _Tale, entry: Settled, at: datetime) -> tuple[str, ...]:
    decided = "signal" if entry.key in tale.asked and tale.asked[entry.key].kind == "signal" else "decided by"
    by = {"": "", "probe": "(its probe found out)", "undo": "(and is undone)"}.get(entry.by, f"({decided} {entry.by})")
    where = _circumstances(entry, at)
    if entry.outcome == "succeeded":
        result = f"result {tale.value(entry.result)}" if entry.result is not None else ""
        return "✓", "green", _told(entry.key, "succeeded", _nth(entry.attempt), where, by), result
    if entry.outcome == "withdrawn":
        return "-", "dim", f"{entry.key} withdrawn before it began"
    ended, so = _ENDINGS.get(entry.outcome, (entry.outcome, ""))
    return "✗", "red", _told(entry.key, ended, _nth(entry.attempt), where, by) + so, tale.error(entry.error)


def _probing(tale: _Tale, entry: ProbeAsked, at: datetime) -> tuple[str, ...]:
    probe = tale.asked[entry.key].probe if entry.key in tale.asked else ""
    return "?", "yellow", f"{entry.key} is in doubt; asking what became of it with {words.short(probe)}"


def _undoing(tale: _Tale, entry: UndoAsked, at: datetime) -> tuple[str, ...]:
    late = f"again, because its attempt {entry.late} took effect late" if entry.late else ""
    return "↩", "magenta", _told(f"undo of {entry.key} asked: {tale.undo_of(entry.key)}", late)


def _undone(tale: _Tale, entry: Undone, at: datetime) -> tuple[str, ...]:
    if entry.how == "skipped":
        return "↩", "red", f"undo of {entry.key} skipped: its effect is left"
    how = {"resolved": "done by hand", "partly": "done, but for what a person skipped"}.get(entry.how, "done")
    where = _circumstances(entry, at)
    return "↩", "magenta", _told(f"undo of {entry.key} {how}", _nth(entry.attempt), where)


def _late(tale: _Tale, entry: Late, at: datetime) -> tuple[str, ...]:
    return "!", "yellow", f"{entry.key} attempt {entry.attempt} took effect late, after it had been given up"


def _abandoned(tale: _Tale, entry: Abandoned, at: datetime) -> tuple[str, ...]:
    return "-", "dim", f"{entry.key} is not wanted any more"


def _unasked(tale: _Tale, entry: Unasked, at: datetime) -> tuple[str, ...]:
    return "-", "dim", f"{entry.key} is taken back: code that is tried again need not ask for it"


def _versioned(tale: _Tale, entry: Versioned, at: datetime) -> tuple[str, ...]:
    return "·", "dim", f"version gate {entry.key} answered {entry.number}"


def _returned(tale: _Tale, entry: Returned, at: datetime) -> tuple[str, ...]:
    return "·", "", f"the saga returned {tale.value(entry.output)}"


def _raised(tale: _Tale, entry: Raised, at: datetime) -> tuple[str, ...]:
    return "✗", "red", f"the saga raised {words.error(entry.error, tale.error_room)}"


def _cancel(tale: _Tale, entry: CancelAsked, at: datetime) -> tuple[str, ...]:
    return "!", "yellow", _told("cancel asked", f"by {entry.by}" if entry.by else "", _quoted(entry.reason))


def _cancel_refused(tale: _Tale, entry: CancelRefused, at: datetime) -> tuple[str, ...]:
    if entry.cause == "reported":
        return "!", "yellow", "cancel refused: a child that is done is undone only with its parent"
    what = "cancel refused" if entry.cause == "cancel" else "the deadline changes nothing"
    return "!", "yellow", f"{what}: the point of no return was passed"


def _deadline(tale: _Tale, entry: DeadlinePassed, at: datetime) -> tuple[str, ...]:
    return "!", "yellow", "the deadline passed"


def _rollback(tale: _Tale, entry: RollbackBegan, at: datetime) -> tuple[str, ...]:
    why = {"error": "the saga failed", "cancel": "it was cancelled", "deadline": "its deadline passed",
           "late": "an effect landed late"}.get(entry.cause, entry.cause)  # fmt: skip
    return "↩", "magenta", f"rollback begins: {why}"


def _parked(tale: _Tale, entry: Parked, at: datetime) -> tuple[str, ...]:
    what = f"{'undo of ' if entry.role == 'undo' else ''}{entry.key}" if entry.key else "the run"
    said = "" if words.says(entry.why, entry.error) else tale.error(entry.error)
    room = 0 if entry.role == "drift" else tale.error_room  # whose end says what to do
    return "‖", "bold red", f"{what} parked: {words.cut(entry.why, room)}", said


def _operated(tale: _Tale, entry: Operated, at: datetime) -> tuple[str, ...]:
    of = f"of {entry.key}" if entry.key else ""
    return (
        "!",
        "yellow",
        _told(f"operator: {entry.action}", of, f"by {entry.by}" if entry.by else "", _quoted(entry.reason)),
    )


def _signalled(tale: _Tale, entry: Signalled, at: datetime) -> tuple[str, ...]:
    return "→", "", f"signal {entry.name}: {tale.value(entry.payload)}"


def _unlocked(tale: _Tale, entry: Unlocked, at: datetime) -> tuple[str, ...]:
    return "→", "", f"{entry.key} given back"


def _reported(tale: _Tale, entry: Reported, at: datetime) -> tuple[str, ...]:
    return "→", "", "told its parent that it is done; it stays revocable until the root ends"


def _revoked(tale: _Tale, entry: Revoked, at: datetime) -> tuple[str, ...]:
    return "!", "yellow", "its parent is being undone, and orders its undo"


def _concluded(tale: _Tale, entry: Concluded, at: datetime) -> tuple[str, ...]:
    return "→", "", "its root ended well: what it did stays"


def _family_pivot(tale: _Tale, entry: FamilyPivot, at: datetime) -> tuple[str, ...]:
    whose = f"the pivot {entry.origin}" if entry.child else "its pivot"
    return "→", "", f"{whose}: {entry.phase}{' by the root' if entry.phase in ('granted', 'refused') else ''}"


def _restored(tale: _Tale, entry: Restored, at: datetime) -> tuple[str, ...]:
    by = f", {entry.by} says" if entry.by else ""
    return "!", "yellow", f"the database was restored to an earlier moment{by}: steps may have been done already"


def _cleared(tale: _Tale, entry: Cleared, at: datetime) -> tuple[str, ...]:
    return "?", "", f"{entry.key} was not done in the time that is forgotten: it begins"


def _carried(tale: _Tale, entry: Carried, at: datetime) -> tuple[str, ...]:
    taken = [*(f"lock {name}" for name in entry.locks), *(["the ids of signals"] if entry.heard else [])]
    taken += ["a deadline that has passed"] if entry.alarmed else []
    return "→", "", f"took over from the link before: {', '.join(taken or ['what nobody has heard'])}"


def _code_began(tale: _Tale, entry: CodeBegan, at: datetime) -> tuple[str, ...]:
    return "→", "", "the saga function begins"


def _continued(tale: _Tale, entry: Continued, at: datetime) -> tuple[str, ...]:
    return "→", "", f"continues with a fresh journal: {tale.value(entry.input)}"


def _ended(tale: _Tale, entry: Ended, at: datetime) -> tuple[str, ...]:
    left = [f"left: {item['key']} ({item['outcome']})" for item in entry.left if isinstance(item, dict)]
    return "■", "bold", entry.state, *left


def _other(entry: Entry) -> tuple[str, ...]:
    return "·", "dim", entry.tag


def _quoted(reason: str) -> str:
    return f"“{reason}”" if reason else ""


_TELL: dict[type, Callable[[_Tale, Any, datetime], tuple[str, ...]]] = {
    Asked: _asked,
    Attempted: _attempted,
    Settled: _settled,
    ProbeAsked: _probing,
    UndoAsked: _undoing,
    Undone: _undone,
    Late: _late,
    Abandoned: _abandoned,
    Unasked: _unasked,
    Versioned: _versioned,
    Returned: _returned,
    Raised: _raised,
    CancelAsked: _cancel,
    CancelRefused: _cancel_refused,
    DeadlinePassed: _deadline,
    RollbackBegan: _rollback,
    Parked: _parked,
    Operated: _operated,
    Signalled: _signalled,
    Unlocked: _unlocked,
    Reported: _reported,
    Revoked: _revoked,
    Concluded: _concluded,
    FamilyPivot: _family_pivot,
    Restored: _restored,
    Cleared: _cleared,
    Carried: _carried,
    CodeBegan: _code_began,
    Continued: _continued,
    Ended: _ended,
}
