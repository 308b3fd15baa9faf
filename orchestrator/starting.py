"""What a caller says when a run is started, checked and made into what is stored.

Owns the start options and the run id.  Must never touch the database.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from orchestrator.codec import Json, check, is_name
from orchestrator.errors import UsageError
from orchestrator.machine.journal import Restore, encode
from orchestrator.machine.policy import is_priority
from orchestrator.options import StartOptions
from orchestrator.saga import Saga
from orchestrator.saga.face import is_tag
from orchestrator.step import StepContext, current_step, route
from orchestrator.store import runs

_OPTIONS = frozenset(StartOptions.__annotations__)
_CELERY_NOISE = frozenset({
    "producer", "connection", "router", "ignore_result", "shadow", "expires", "retry", "serializer", "routing_key",
    "exchange", "headers", "root_id", "parent_id", "time_limit", "soft_time_limit", "add_to_parent", "group_id",
    "group_index", "periodic_task_name", "retry_policy", "compression", "publisher", "argsrepr", "kwargsrepr",
    "delivery_mode", "expiration", "mandatory",
})  # fmt: skip
_KEPT_OF_KEY = 400  # bytes
_LONGEST_S = 1000 * 365 * 86400.0
_CANVAS = frozenset({"link", "link_error", "chain", "chord", "reply_to"})  # the last one in a canvas of any kind


def prepare(
    saga: Saga[Any, Any], encoded: Json, options: dict[str, Any], default_queue: Callable[[], str]
) -> tuple[runs.Start, Any]:
    """Return what is to be started for an encoded input and start options, and the caller's transaction if any.

    Raises: PayloadError, UsageError.
    """
    for name in options:
        if name in _CANVAS and options[name]:
            raise UsageError(
                f"{name}= on saga {saga.name}: Celery's canvas would lose it; make what comes after a step "
                "of the saga, or run a canvas of tasks with orchestrator.durable(...)"
            )
        if name not in _OPTIONS and name not in _CELERY_NOISE and name not in _CANVAS:
            raise UsageError(f"saga {saga.name} has no start option {name}=; it has {', '.join(sorted(_OPTIONS))}")
    check(encoded, what=f"the input of {saga.name}")
    context = current_step.get()
    run_id, transaction = options.get("task_id"), options.get("transaction")
    if context is not None and run_id is None:
        run_id = _id_within(context.idempotency_key, context.starts)
        context.starts += 1
    if context is not None and transaction is None:
        transaction = context.connection
    deadline = options.get("deadline", saga.options.deadline)
    new = runs.Start(
        id=_valid_id(run_id) if run_id is not None else _new_id(),
        saga=saga.name,
        version=saga.options.version,
        input=encoded,
        queue=_queue(options.get("queue") or saga.options.queue or route(saga.name) or default_queue()),
        priority=_priority(options.get("priority"), saga),
        delay=_seconds("countdown", options.get("countdown") or 0),
        eta=_eta(options.get("eta")),
        deadline=None if deadline is None else _deadline(deadline),
        tags=_tags(options.get("tags")),
        hears=_heard_of(context),
    )
    return new, transaction


def _heard_of(context: StepContext | None) -> Json:
    """Return what a run hears before anything else: that it may have been here before, as the run of its step."""
    return None if context is None or context.restored_by is None else encode(Restore(context.restored_by))


def is_due(new: runs.Start) -> bool:
    """Tell whether it is due as soon as it is committed."""
    return not new.delay and new.eta is None


def _new_id() -> str:
    """Return a time-ordered UUID (version 7, RFC 9562), so that runs of one time lie together in the indexes."""
    value = time.time_ns() // 1_000_000 << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0x3 << 62) | 2 << 62
    return str(uuid.UUID(int=value))


def _id_within(key: str, number: int) -> str:
    """Return the id of what a step starts, the same at each attempt; a key may be longer than an id can be."""
    run_id = f"{key}:{number}"
    if is_name(run_id):
        return run_id
    whole = hashlib.sha256(key.encode(errors="replace")).hexdigest()[:32]
    return f"{key.encode()[:_KEPT_OF_KEY].decode(errors='ignore')}...{whole}:{number}"


def _valid_id(run_id: Any) -> str:
    text = str(run_id)
    if not is_name(text):
        raise UsageError("a run id (task_id) must be text of 1 to 500 printable bytes")
    if re.search(r"~\d+$", text):
        raise UsageError(f"run id {text!r}: names that end in ~ and a number are for ended links of continued runs")
    return text


def _queue(queue: Any) -> str:
    if not is_name(queue):
        raise UsageError("queue must be text of 1 to 500 printable bytes")
    return str(queue)


def _seconds(option: str, value: Any) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not abs(seconds) <= _LONGEST_S:
        raise UsageError(f"{option} must be a number of seconds, at most a thousand years")
    return float(seconds)


def _deadline(value: Any) -> float:
    if (seconds := _seconds("deadline", value)) <= 0:
        raise UsageError("deadline must be positive: it counts from the start, and the run would go back at once")
    return seconds


def _eta(value: Any) -> datetime | None:
    eta = aware("eta", value)
    if eta is not None and abs((eta - datetime.now(UTC)).total_seconds()) > _LONGEST_S:
        raise UsageError("eta must be within a thousand years from now")
    return eta


def _priority(priority: Any, saga: Saga[Any, Any]) -> int:
    priority = saga.options.priority if priority is None else priority
    if not is_priority(priority):
        raise UsageError(f"priority must be a whole number from 0 to 9 (higher first), not {priority!r}")
    return int(priority)


def _tags(tags: Any) -> dict[str, Json] | None:
    if not tags:
        return None
    if not isinstance(tags, Mapping) or not all(map(is_tag, tags.values())):
        raise UsageError(
            "tags must be a mapping of names to text of at most 500 printable bytes, numbers, truth values"
        )
    check(named := dict(tags), what="the tags")
    return named


def aware(option: str, value: Any) -> datetime | None:
    """Return an instant as a caller gives it, as a datetime or text in ISO 8601.  Raises: UsageError."""
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        value = datetime.fromisoformat(value) if isinstance(value, str) else value
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise UsageError(f"{option} must be an aware datetime; say which time zone it is in")
    return value
