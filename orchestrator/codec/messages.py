"""Values of plain Celery tasks, as Celery's own JSON carries them.

Owns the form: what JSON has as it is, and datetime, date, time, Decimal, UUID, bytes and whatever else is registered
with kombu (`kombu.utils.json.register_type`) in kombu's envelope, ``{"__type__": "decimal", "__value__": "9.99"}``.  So
a task that was not written for this package gets what a message would have brought it.  It must never refuse what can
be stored without an envelope: models, dataclasses and sets become plain JSON.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeAlias

from kombu.utils import json as kombu_json
from pydantic import PlainSerializer, PlainValidator

from orchestrator.codec.text import MAX_DEPTH, Json
from orchestrator.codec.values import ValueCodec, encode_any
from orchestrator.errors import PayloadError

_ENVELOPE = {"__type__", "__value__"}
_AS_IT_IS = frozenset({str, int, float, bool, type(None)})


def to_message(value: Any, what: str = "the value") -> Json:
    """Return a value as JSON with Celery's envelopes.

    Raises:
        PayloadError: as `encode_any`.
    """
    return encode_any(_enveloped(value), what)


def from_message(value: Any) -> Any:
    """Return the value of JSON with Celery's envelopes; a dict that only looks like one stays what it is."""
    kind = type(value)
    if kind is list:
        return [from_message(item) for item in value]
    if kind is not dict:
        return value
    found = {key: from_message(item) for key, item in value.items()}
    if found.keys() == _ENVELOPE:
        try:
            return kombu_json.object_hook(found)
        except Exception:  # a type that nobody has registered, or a text that does not fit it
            return found
    return found


def without_envelopes(value: Json) -> Json:
    """Return JSON with Celery's envelopes as plain JSON, which those read who know what type it is to have.

    One that holds a type which only kombu can write stays as it is.
    """
    try:
        return encode_any(from_message(value))
    except PayloadError:
        return value


def _enveloped(value: Any, depth: int = 1) -> Any:
    """Put into envelopes what kombu has some for; what is too deep is left to who refuses it."""
    kind = type(value)
    if kind in _AS_IT_IS or depth > MAX_DEPTH:
        return value
    if kind is dict:
        return {key: _enveloped(item, depth + 1) for key, item in value.items()}
    if kind in (list, tuple):
        return [_enveloped(item, depth + 1) for item in value]
    try:
        return json.loads(kombu_json.dumps(value))  # type: ignore[no-untyped-call]
    except Exception:  # kombu knows nothing of it
        return value


_dump = ValueCodec().dump  # raises the bare reason, to which whoever encodes a call adds the parameter

MessageValue: TypeAlias = Annotated[
    Any, PlainValidator(from_message), PlainSerializer(lambda value: _dump(_enveloped(value)), return_type=Any)
]
"""The annotation of what a plain Celery task is given and returns."""
