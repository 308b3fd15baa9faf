"""What a run remembers: entries (the journal), arrivals (the inbox) and work (what is due).

Owns their shape and their JSON form.  Must never decide anything; see `turn`.
Values inside are JSON already: encoding and decoding of arguments and results is the codec's.
An entry is stored without the fields that have their default, a request without the name that its key has, an outcome
without its begin if that was the instant of the row before, so that a journal row stays short.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import datetime
from typing import Any, ClassVar, Final

Json = Any
Error = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Undo:
    """A compensation as it is armed: with it alone, without any saga code, the step can be undone.

    `names` are parameters taken over from the arguments of the step, `args` are arguments of its own (``refund.s(7)``);
    `result` tells that it takes the result of the step.
    """

    task: str
    names: tuple[str, ...] = ()
    args: Json = None
    result: bool = False
    queue: str = ""
    timeout: float = 0.0
    retry: list[Any] | None = None
    limit: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """Saga code asked for something: the intent, committed before anything runs."""

    tag: ClassVar[str] = "asked"
    key: str
    task: str
    args: Json = field(default_factory=dict)
    kind: str = "step"  # step, once, child, signal, lock, scope
    version: int = 0  # of a child's saga
    effect: str = ""
    undo: Undo | None = None
    probe: str = ""
    on_unknown: str = "compensate"
    queue: str = ""
    local: bool = False
    transactional: bool = False
    retry: list[Any] | None = None
    timeout: float = 0.0
    heartbeat: float = 0.0
    priority: int = 0
    scope: str = ""  # the innermost block of partial rollback that it was asked in
    limit: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Attempted:
    """An attempt that ended without settling what it was for."""

    tag: ClassVar[str] = "attempted"
    key: str
    attempt: int
    error: Error
    role: str = "do"
    doubt: bool = True
    worker: str = ""
    began: str = ""
    quiet: str = ""  # until then an effect of it may still land
    details: Json = None


@dataclass(frozen=True, slots=True)
class Settled:
    """What came of a step; delivered to saga code in the order of the journal."""

    tag: ClassVar[str] = "settled"
    key: str
    outcome: str = "succeeded"
    attempt: int = 0
    result: Json = None
    error: Error | None = None
    worker: str = ""
    began: str = ""
    by: str = ""  # probe, undo, the operator's name, or the id of a signal


@dataclass(frozen=True, slots=True)
class ProbeAsked:
    """The provider is asked what became of a step in doubt."""

    tag: ClassVar[str] = "probing"
    key: str


@dataclass(frozen=True, slots=True)
class UndoAsked:
    """The undo of a step has begun: from here on no forward attempt of it can start."""

    tag: ClassVar[str] = "undoing"
    key: str
    late: int = 0  # the attempt whose late effect is undone
    result: Json = None


@dataclass(frozen=True, slots=True)
class Undone:
    """The undo of a step has ended."""

    tag: ClassVar[str] = "undone"
    key: str
    attempt: int = 0
    how: str = "done"  # done, skipped, resolved; partly: a person skipped something in a child
    worker: str = ""
    began: str = ""
    left: tuple[Json, ...] = ()  # of a child: what has no undo, or was skipped


@dataclass(frozen=True, slots=True)
class Late:
    """A success reported by an attempt that had lost its lease; it changed nothing, but its effect is there."""

    tag: ClassVar[str] = "late"
    key: str
    attempt: int
    result: Json = None
    worker: str = ""


@dataclass(frozen=True, slots=True)
class Abandoned:
    """Nobody waits for this step any more."""

    tag: ClassVar[str] = "abandoned"
    key: str


@dataclass(frozen=True, slots=True)
class Unasked:
    """A request is taken back: code that is tried again may make it again, or not."""

    tag: ClassVar[str] = "unasked"
    key: str


@dataclass(frozen=True, slots=True)
class Versioned:
    """A version gate answered with this number."""

    tag: ClassVar[str] = "version"
    key: str
    number: int


@dataclass(frozen=True, slots=True)
class Returned:
    """The saga function returned; the run completes when nothing of it is outstanding."""

    tag: ClassVar[str] = "returned"
    output: Json


@dataclass(frozen=True, slots=True)
class Raised:
    """The saga function raised."""

    tag: ClassVar[str] = "raised"
    error: Error


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """Somebody asked to stop and undo."""

    tag: ClassVar[str] = "cancel"
    by: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CancelRefused:
    """The point of no return was passed; or a child is done already, and undone only with its parent."""

    tag: ClassVar[str] = "cancel refused"
    cause: str = "cancel"  # cancel, deadline, reported


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The run's deadline has passed."""

    tag: ClassVar[str] = "deadline"


@dataclass(frozen=True, slots=True)
class RollbackBegan:
    """The decision to undo; saga code is not resumed any more."""

    tag: ClassVar[str] = "rollback"
    cause: str  # error, cancel, deadline, late
    error: Error | None = None
    undoes: str = ""  # in a correcting run: the idempotency key of the step that took effect late, in the run before


@dataclass(frozen=True, slots=True)
class Parked:
    """Something needs a person; an empty key means the run as a whole."""

    tag: ClassVar[str] = "parked"
    key: str
    role: str  # do, probe, undo, code, drift, pivot
    why: str
    error: Error | None = None


@dataclass(frozen=True, slots=True)
class Operated:
    """An operator decided, with name and reason on record."""

    tag: ClassVar[str] = "operator"
    action: str  # retry, skip, resolve, pause, resume, terminate
    key: str = ""
    by: str = ""
    reason: str = ""
    cause: str = ""  # of a pause or its end: "saga" if all its runs are told so, "saga NAME" if a parent's are


@dataclass(frozen=True, slots=True)
class Signalled:
    """A signal reached the run; early ones are kept."""

    tag: ClassVar[str] = "signal"
    name: str
    id: str
    payload: Json = None


@dataclass(frozen=True, slots=True)
class Unlocked:
    """A lock was given back, or the place in its queue."""

    tag: ClassVar[str] = "unlocked"
    key: str


@dataclass(frozen=True, slots=True)
class Reported:
    """A child told its parent that it is done; it stays revocable until its root ends."""

    tag: ClassVar[str] = "reported"


@dataclass(frozen=True, slots=True)
class Revoked:
    """The parent of a child is being undone, and the child with it."""

    tag: ClassVar[str] = "revoked"


@dataclass(frozen=True, slots=True)
class Concluded:
    """The root of a child has ended well: what the child did stays."""

    tag: ClassVar[str] = "concluded"


@dataclass(frozen=True, slots=True)
class FamilyPivot:
    """A pivot of a descendant, or of this child itself: it may begin once the root has granted it.

    `origin` names the pivot by run and key, `child` is the key of the child through which it came; empty for this
    run's own.
    """

    tag: ClassVar[str] = "family pivot"
    origin: str
    phase: str  # asked, granted, refused, succeeded, failed
    child: str = ""


@dataclass(frozen=True, slots=True)
class Restored:
    """The database was set back to a moment in the past: what the run did after that is done and forgotten."""

    tag: ClassVar[str] = "restored"
    by: str = ""


@dataclass(frozen=True, slots=True)
class Cleared:
    """The probe says that nothing of a step was done in the time that was forgotten: it begins as if it were new."""

    tag: ClassVar[str] = "cleared"
    key: str


@dataclass(frozen=True, slots=True)
class Continued:
    """The run goes on with a fresh journal under the same id, and ends here as a link of it."""

    tag: ClassVar[str] = "continue"
    input: Json
    version: int = 0


@dataclass(frozen=True, slots=True)
class Carried:
    """What a link takes over from the one before: rows of locks by their name, and signals come with it.

    `heard` are name and id of those that came last and do not: one that is sent again is known.  `alarmed` says that
    the deadline has passed and changed nothing: it does not come again.
    """

    tag: ClassVar[str] = "carried"
    locks: dict[str, str]
    heard: tuple[Json, ...] = ()
    alarmed: bool = False


@dataclass(frozen=True, slots=True)
class CodeBegan:
    """Saga code begins with this row: those before it only held what somebody told the run."""

    tag: ClassVar[str] = "code began"


@dataclass(frozen=True, slots=True)
class Ended:
    """The run reached a terminal state."""

    tag: ClassVar[str] = "ended"
    state: str
    left: tuple[Json, ...] = ()


Entry = (
    Asked | Attempted | Settled | ProbeAsked | UndoAsked | Undone | Late | Abandoned | Unasked | Versioned | Returned
    | Raised | CancelAsked | CancelRefused | DeadlinePassed | RollbackBegan | Parked | Operated | Signalled | Unlocked
    | Reported | Revoked | Concluded | FamilyPivot | Restored | Cleared | Continued | Carried | CodeBegan | Ended
)  # fmt: skip


# -- arrivals --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """A worker, or the pump for a worker that is gone, reports an attempt.

    `verdict` is succeeded, rejected, failed (it may be tried again and certainly had no effect) or doubt; `quiet` is
    the instant (ISO 8601, UTC) until which an effect may still land because the attempt's process is not known dead;
    `pause` overrides the policy's pause, in seconds; `child` is the id of a child that reports for itself: a later link
    of its parent may have another one of the same key.
    """

    tag: ClassVar[str] = "outcome"
    key: str
    role: str
    attempt: int
    verdict: str
    result: Json = None
    error: Error | None = None
    worker: str = ""
    began: str = ""
    quiet: str = ""
    pause: float | None = None
    details: Json = None
    child: str = ""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The work of a key was taken back before any begin of it was committed, or between two attempts."""

    tag: ClassVar[str] = "withdrawn"
    key: str


@dataclass(frozen=True, slots=True)
class LateSuccess:
    """A success that the fence refused."""

    tag: ClassVar[str] = "late"
    key: str
    role: str
    attempt: int
    result: Json = None
    worker: str = ""
    link: int = 0


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop and compensate."""

    tag: ClassVar[str] = "cancel"
    by: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Terminate:
    """Stop and undo nothing."""

    tag: ClassVar[str] = "terminate"
    by: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Operate:
    """Retry, skip or resolve a parked key, pause or resume the run; `value` is what an operator vouches for."""

    tag: ClassVar[str] = "operate"
    action: str
    key: str = ""
    by: str = ""
    reason: str = ""
    value: Json = None
    no_effect: bool = False
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Signal:
    """Somebody tells the run something; one with an id that the run knows already is dropped."""

    tag: ClassVar[str] = "signal"
    name: str
    id: str
    payload: Json = None


@dataclass(frozen=True, slots=True)
class Revoke:
    """The parent orders the undo of its child."""

    tag: ClassVar[str] = "revoke"


@dataclass(frozen=True, slots=True)
class Conclude:
    """The parent has ended well."""

    tag: ClassVar[str] = "conclude"


@dataclass(frozen=True, slots=True)
class PivotNews:
    """What became of a pivot in the family: from a child (named by its key), or from the parent."""

    tag: ClassVar[str] = "pivot"
    origin: str
    phase: str
    child: str = ""


@dataclass(frozen=True, slots=True)
class Restore:
    """The database was set back; whoever leaves this has taken all work of the run away, but its turn."""

    tag: ClassVar[str] = "restore"
    by: str = ""


Arrival = (
    AttemptEnded | Withdrawn | LateSuccess | Cancel | Terminate | Operate | Signal | Revoke | Conclude | PivotNews
    | Restore
)  # fmt: skip


# -- work ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Work:
    """One thing that is due: an attempt of `key` in the role do, once, probe or undo.

    `attempt` counts the attempts before this one.  `call` is all that a worker needs beyond its registered code:
    ``a`` arguments, ``t`` timeout and ``h`` heartbeat timeout in seconds, ``x`` names of non-retryable errors,
    ``d`` heartbeat details of the attempt before, ``n`` that a lost attempt certainly had no effect (its transaction is
    gone with it), ``l`` the attempt whose late effect is undone, ``g`` the gate it has to pass, with its limits, ``k``
    the link of a run that was continued as new, ``u`` the idempotency key of what is undone if another run did it,
    ``w`` that the attempt before was lost with its worker, so that this one is begun with no other.
    """

    key: str
    role: str
    task: str
    queue: str
    call: Json
    due: datetime | None = None
    attempt: int = 0
    local: bool = False
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Post:
    """An arrival for another run, left with the turn that decided it; `anyone` says that taking it needs no code."""

    run_id: str
    arrival: Arrival
    anyone: bool = False


@dataclass(frozen=True, slots=True)
class NewChild:
    """A run to be started as the child of this one; `deadline` in seconds, 0 for none."""

    key: str
    id: str
    saga: str
    version: int
    input: Json
    queue: str
    priority: int = 0
    deadline: float = 0.0


_ENTRIES: Final[dict[str, type]] = {cls.tag: cls for cls in Entry.__args__}
_ARRIVALS: Final[dict[str, type]] = {cls.tag: cls for cls in Arrival.__args__}
_SHAPES: dict[type, list[tuple[str, Any]]] = {
    cls: [(f.name, f.default if f.default_factory is MISSING else f.default_factory()) for f in fields(cls)]
    for cls in (*_ENTRIES.values(), *_ARRIVALS.values(), Undo)
}


def encode(value: Entry | Arrival) -> dict[str, Json]:
    """Return the JSON form, without fields that have their default."""
    form: dict[str, Json] = {"e": value.tag}
    for name, default in _SHAPES[type(value)]:
        held = getattr(value, name)
        if default is MISSING or held != default:
            form[name] = _encode_undo(held) if type(held) is Undo else held
    if type(value) is Asked and value.task == _name_in(value.key):
        del form["task"]
    return form


def encode_row(entries: Iterable[Entry], before: datetime) -> list[dict[str, Json]]:
    """Return the JSON forms of a row that follows one of the instant `before`.

    The attempt of a step in a row began with the row before: then that is left out, see `with_begin`.
    """
    forms, then = [encode(entry) for entry in entries], before.isoformat()
    for form in forms:
        if form.get("began") == then:
            del form["began"]
    return forms


def with_begin(entry: Entry, before: datetime | None) -> Entry:
    """Return an entry of a row that follows one of the instant `before` with the begin of its attempt."""
    if before and isinstance(entry, (Attempted, Settled, Undone)) and entry.worker and not entry.began:
        return replace(entry, began=before.isoformat())
    return entry


def _name_in(key: str) -> str:
    """Return what a key is most often named after, see `keys`: the task of the step."""
    return key[key.find("/") + 1 : key.rfind("#")]


def _encode_undo(undo: Undo) -> dict[str, Json]:
    return {
        name: getattr(undo, name)
        for name, default in _SHAPES[Undo]
        if default is MISSING or getattr(undo, name) != default
    }


def decode_entry(form: dict[str, Json]) -> Entry:
    """Return the entry of a JSON form.  Raises: KeyError for a kind that this release does not know."""
    known = dict(form)
    cls = _ENTRIES[known.pop("e")]
    if cls is Asked:
        known.setdefault("task", _name_in(known["key"]))
        if (undo := known.get("undo")) is not None:
            known["undo"] = Undo(**{**undo, "names": tuple(undo.get("names", ()))})
    if cls in (Ended, Undone):
        known["left"] = tuple(known.get("left", ()))
    return cls(**known)  # type: ignore[no-any-return]


def decode_arrival(form: dict[str, Json]) -> Arrival:
    """Return the arrival of a JSON form.  Raises: KeyError for a kind that this release does not know."""
    known = dict(form)
    return _ARRIVALS[known.pop("e")](**known)  # type: ignore[no-any-return]
