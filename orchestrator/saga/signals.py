"""Waiting for signals: what somebody outside tells a run.

Owns the awaiting side, and what a signal may carry; `SagaResult.signal` is the telling one.
"""

from __future__ import annotations

import asyncio
import functools
from datetime import timedelta
from typing import Any, TypeVar, overload

from orchestrator.codec import Json, ValueCodec, encode_any, is_name
from orchestrator.codec.values import explain
from orchestrator.errors import PayloadError, UsageError
from orchestrator.machine.code import Request, SagaCode
from orchestrator.machine.journal import Asked
from orchestrator.machine.policy import Effect
from orchestrator.saga.declare import Saga, registry
from orchestrator.saga.inside import code_of
from orchestrator.saga.steps import failure_of

T = TypeVar("T")
_NO_TIME_S = 1e-6  # of journal time: asyncio would not look at what is there already


@overload
async def wait_signal(name: str, kind: type[T], /, *, timeout: timedelta | float | None = None) -> T: ...
@overload
async def wait_signal(name: str, /, *, timeout: timedelta | float | None = None) -> Any: ...
async def wait_signal(name: str, kind: Any = None, /, *, timeout: timedelta | float | None = None) -> Any:
    """Wait for the next signal of this name; one that came before anybody waited is kept.

    Its payload is read as `kind`, by default as `saga.define(signals=...)` says.  One that cannot be read so is passed
    over: the history shows it, and the wait goes on.  `timeout` is a timedelta, or seconds; with 0 only a signal that
    is there already is heard.
    Raises: TimeoutError.
    """
    code = code_of("wait_signal")
    if not is_name(name):
        raise UsageError("saga.wait_signal: its name must be text of 1 to 500 printable bytes")
    codec = ValueCodec(kind or declared_signals(code).get(name, Any), what=f"signal {name!r}")
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    async with asyncio.timeout(None if seconds is None else max(seconds, _NO_TIME_S)):
        while True:
            payload = await code.ask(_request(name, code))
            try:
                return codec.decode(payload)
            except ValueError:
                continue


def declared_signals(code: SagaCode) -> dict[str, Any]:
    """Return what the running saga declares about its signals: the type of each name."""
    info = code.fold.info
    saga = registry.sagas.get((info.saga, info.version))
    return dict(saga.options.signals or {}) if saga else {}


def _request(name: str, code: SagaCode) -> Request:
    return Request(
        name=f"signal:{name}",
        asked=lambda key: Asked(key, name, {}, kind="signal", effect=Effect.NONE),
        same=lambda asked: asked.kind == "signal" and asked.task == name,
        decode=_as_it_is,
        failure=functools.partial(failure_of, code.fold.info.id),
    )


def _as_it_is(payload: Json) -> Json:
    return payload


def payload_of(run_id: str, saga: Saga[Any, Any] | None, name: str, payload: Any) -> Json:
    """Encode what a signal carries, as the saga declares it if it does.

    Raises: PayloadError; UsageError if the saga declares its signals and this is none of them.
    """
    encoded = encode_any(payload, f"signal {name!r}")
    declared = saga.options.signals if saga else None
    if declared is None:
        return encoded
    if name not in declared:
        raise UsageError(
            f"run {run_id}: its saga has no signal {name!r}; it has {', '.join(sorted(declared)) or 'none'}"
        )
    try:
        ValueCodec(declared[name], what=f"signal {name!r}").decode(encoded)
    except ValueError as error:
        wanted = getattr(declared[name], "__name__", declared[name])
        raise PayloadError(f"run {run_id}: signal {name!r} is to carry {wanted}: {explain(error)}") from error
    return encoded
