"""Recorded runs as JSON, and whether today's code still asks for what they asked for.

Owns the form of a recorded run, replaying it, and showing what differs.  Must never write anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from orchestrator.codec import dumps
from orchestrator.errors import DriftError, UnknownSagaError
from orchestrator.machine.code import SagaCode
from orchestrator.machine.fold import RunInfo
from orchestrator.machine.journal import Asked, Entry, decode_entry, encode
from orchestrator.machine.turn import CodeError, Execution
from orchestrator.saga import Saga, registry

History = Mapping[str, Any]
Rows = Sequence[tuple[datetime, list[Entry]]]
_SHOWN: Final = 3  # lines of each kind in a difference
_WIDTH: Final = 300
_PREFIXES: Final = 200  # of a longer journal so many prefixes are replayed, spread evenly


def replay(history: History | Saga[Any, Any], saga: Saga[Any, Any] | History | None = None) -> None:
    """Replay a recorded run with today's code; returns if every prefix of its journal fits.

    `history` is what ``TestRun.history`` gave, or ``saga replay --save``; `saga` is the one to replay it with (default:
    the one of its name and version).  The two may change places.
    Raises: DriftError if the code asks for something else than it did when the run was recorded; UnknownSagaError.
    """
    if isinstance(history, Saga):
        history, saga = saga, history  # type: ignore[assignment]
    assert isinstance(history, Mapping)
    chosen = saga if isinstance(saga, Saga) else _registered(history)
    info, rows = _read(history)
    for length in _lengths(len(rows)):
        _replay_prefix(chosen, info, rows[:length])


def _registered(history: History) -> Saga[Any, Any]:
    saga = registry.sagas.get((history["saga"], history["version"]))
    if saga is None:
        raise UnknownSagaError(
            f"saga {history['saga']} version {history['version']}, which run {history['id']} needs, is not registered "
            f"here (known: {', '.join(registry.names) or 'none'}); import it, or pass the saga to replay it with"
        )
    return saga


def _read(history: History) -> tuple[RunInfo, Rows]:
    deadline = history["deadline"]
    info = RunInfo(
        id=history["id"],
        saga=history["saga"],
        version=history["version"],
        input=history["input"],
        started=datetime.fromisoformat(history["started"]),
        queue="",
        deadline=datetime.fromisoformat(deadline) if deadline else None,
        parent=history.get("parent", ""),
        link=history.get("link", 0),
        since=history.get("since", 0),
    )
    rows = [
        (datetime.fromisoformat(at), [decode_entry(dict(form)) for form in forms]) for at, forms in history["journal"]
    ]
    return info, rows


def _lengths(rows: int) -> Iterator[int]:
    """Yield how many rows to replay: each number up to a limit, then spread evenly, always all of them."""
    step = max(1, rows / _PREFIXES)
    yield from sorted({round(n * step) for n in range(1, int(rows / step) + 1)} | {rows} if rows else set())


def _replay_prefix(saga: Saga[Any, Any], info: RunInfo, rows: Rows) -> None:
    execution = Execution(info, saga.script())
    execution.catch_up(rows)
    fold = execution.fold
    was_waiting = fold.at == info.started and not fold.steps  # as releases before recorded what came before the start
    if was_waiting or not (fold.begun and fold.wants_code):
        return
    try:
        beyond = execution.beyond()
    except DriftError as drift:
        raise DriftError(f"{drift}\n{_difference(execution)}") from None
    except CodeError as error:
        raise DriftError(
            f"run {info.id} of {info.saga} version {info.version} replays no more: its code raises "
            f"{error.error.get('type')}: {error}"
        ) from None
    finally:
        execution.discard()
    if beyond:
        before = [asked for _, entries in rows for asked in entries if isinstance(asked, Asked)]
        new = [_line("+", entry) for entry in beyond]
        raise DriftError(
            f"replaying the first {len(rows)} journal rows of run {info.id} of {info.saga} version {info.version} "
            "gives more than was recorded. Put the change behind saga.version(...).\n"
            + "\n".join([*_context(before), "- (it waits here)", *new[:_SHOWN]])
        )


# -- what differs ------------------------------------------------------------------------------------------------------
def _difference(execution: Execution) -> str:
    """Return what was recorded (-) and what is asked for today (+), after what is still the same."""
    code = execution.code
    assert code is not None
    same = code.asked()
    known = {asked.key for asked in same} | execution.fold.unasked
    recorded = {key: step.asked for key, step in execution.fold.steps.items() if key not in known}
    if code.asking is not None and code.asking[0] not in known:
        key, request = code.asking
        today = _line("+", request.asked(key))
        recorded = {key: recorded[key]} if key in recorded else recorded
    else:
        today = _ending(code) if code.ended else "+ (something else: see above)"
    missing = [_line("-", asked) for asked in recorded.values()]
    return "\n".join([*_context(same), *missing[:_SHOWN], today])


def _ending(code: SagaCode) -> str:
    _, error = code.outcome()
    return (
        f"+ (the saga function raises {type(error).__name__}: {error})" if error else "+ (the saga function ends here)"
    )


def _context(asked: Sequence[Asked]) -> list[str]:
    return [_line(" ", entry) for entry in asked[-_SHOWN:]]


def _line(mark: str, entry: Entry) -> str:
    if isinstance(entry, Asked):
        return f"{mark} {entry.key} with {dumps(entry.args)}"[:_WIDTH]
    return f"{mark} {dumps(encode(entry))}"[:_WIDTH]
