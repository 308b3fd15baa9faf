"""What is on the wire: bounded decoders, and the examination of a message before Celery touches it.

Owns the replacement of kombu's and py-amqp's decoders, which are process-wide, and the functions that say why
a message cannot be used. Their words name fields and sizes, and must never hold content of the message.
Must never import the worker, or settle a message: that is the guard's.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import kombu.compression
from amqp import serialization as amqp_serialization  # type: ignore[import-untyped]
from celery.utils.imports import symbol_by_name
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.exceptions import ContentDisallowed, DecodeError

__all__ = [
    "JSON", "Limits", "MalformedError", "bound_decoders", "check_call", "check_envelope", "check_size",
    "expired", "printable", "reason", "unfold",
]  # fmt: skip

JSON = "application/json"
_UNREADABLE = "application/x-unreadable"
_EMBED = ("callbacks", "errbacks", "chain", "chord")
_MAX_TEXT = 64 * 1024
_compression: Any = kombu.compression


@dataclass(frozen=True, slots=True)
class Limits:
    """Say how much the worker takes: bytes of body (inflated) and headers, levels of nesting, how long unknown names.

    Of an unknown task name: seconds until its message is first given back, at most between two returns, and
    in all before it is refused.
    """

    body_bytes: int = 16 * 1024 * 1024
    header_bytes: int = 1024 * 1024
    depth: int = 200
    unknown_first_delay_s: float = 2.0
    unknown_longest_delay_s: float = 60.0
    unknown_patience_s: float = 3600.0


class MalformedError(Exception):
    """Carry why a message is refused, in words that hold nothing of its content."""


# Decoders: process-wide in kombu and py-amqp, therefore replaced process-wide.


def bound_decoders(limit_bytes: int) -> None:
    """Replace kombu's decompressors by ones that raise DecodeError beyond ``limit_bytes``."""
    openers: dict[str, Callable[[], Any]] = {
        "application/x-gzip": zlib.decompressobj,
        "application/x-bz2": bz2.BZ2Decompressor,
        "application/x-lzma": partial(lzma.LZMADecompressor, memlimit=128 * 1024 * 1024),
        "application/zstd": _zstd,
        "application/x-brotli": _Brotli,
    }
    for content_type in openers.keys() & set(_compression.encoders()):
        encoder, _ = _compression.get_encoder(content_type)
        _compression.register(encoder, _bounded(openers[content_type], limit_bytes), content_type)
    amqp_serialization.PROPERTY_CLASSES[amqp_serialization.Basic.CLASS_ID] = _read_properties


def _bounded(opener: Callable[[], Any], limit_bytes: int) -> Callable[[bytes], bytes]:
    def inflate(data: bytes) -> bytes:
        if len(data) > limit_bytes:
            raise DecodeError(f"compressed body of {len(data)} bytes exceeds {limit_bytes}")
        stream = opener()
        plain: bytes = stream.decompress(data, limit_bytes + 1)
        if len(plain) > limit_bytes:
            raise DecodeError(f"body inflates beyond {limit_bytes} bytes")
        if not stream.eof:
            raise DecodeError("compressed body is cut short")
        return plain

    return inflate


def _zstd() -> Any:
    try:
        zstd: Any = symbol_by_name("compression.zstd:ZstdDecompressor")
    except ImportError:
        zstd = symbol_by_name("backports.zstd:ZstdDecompressor")
    return zstd()


class _Brotli:
    """Give brotli's decompressor the face of the others; before 1.2 it has no bound and raises TypeError."""

    def __init__(self) -> None:
        self._stream: Any = symbol_by_name("brotli:Decompressor")()
        self.eof = False

    def decompress(self, data: bytes, limit: int) -> bytes:
        plain: bytes = self._stream.process(data, output_buffer_limit=limit)
        self.eof = self._stream.is_finished()
        return plain


def _read_properties(buffer: Any, offset: int) -> tuple[dict[str, Any], int]:
    # RabbitMQ stores properties that py-amqp cannot read (a content type that is not UTF-8, a timestamp of
    # 2**64). Raising here ends the worker, and the next one gets the same message first: mark it instead.
    try:
        properties, end = amqp_serialization.decode_properties_basic(buffer, offset)
        return properties, end
    except Exception:
        return {"content_type": _UNREADABLE}, len(buffer)


# Examination: pure functions of what is on the wire.


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def _name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 512 and value.isprintable()


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _instant(value: Any) -> bool:
    try:
        return isinstance(value, str | datetime) and 1971 <= maybe_iso8601(value).year <= 9998
    except (ValueError, AttributeError, OverflowError):
        return False


def _time_limits(value: Any) -> bool:
    limits = value if isinstance(value, list | tuple) else ()
    return len(limits) == 2 and all(
        item is None or (type(item) in (int, float) and 0 <= item <= 10**9) for item in limits
    )


def _names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_name, value))


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _signature(value: Any) -> bool:
    if not isinstance(value, dict) or not _name(value.get("task")):
        return False
    shapes: dict[str, tuple[type, ...]] = {"args": (list, tuple), "kwargs": (dict,), "options": (dict,)}
    subtype = value.get("subtask_type")
    return (subtype is None or isinstance(subtype, str)) and all(
        value.get(key) is None or isinstance(value[key], shape) for key, shape in shapes.items()
    )


def _signatures(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_signature, value))


#: What each field that Celery itself reads must be, if it is there and not null.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("root_id", "parent_id", "group", "taskset", "shadow", "reply_to", "correlation_id"), _text),
    **dict.fromkeys(("argsrepr", "kwargsrepr", "lang", "origin"), _text),
    **dict.fromkeys(("retries", "group_index", "replaced_task_nesting"), _count),
    **dict.fromkeys(("eta", "expires"), _instant),
    "timelimit": _time_limits,
    "stamped_headers": _names,
    "stamps": _mapping,
    **dict.fromkeys(("callbacks", "errbacks", "chain"), _signatures),
    "chord": _signature,
}


def _deeper(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        nested = [item for item in layer if isinstance(item, dict | list | tuple)]
        layer = [part for item in nested for part in (item.values() if isinstance(item, dict) else item)]
        if not layer:
            return False
    return True


def _outweighs(value: Any, limit_bytes: int) -> bool:
    weight, parts = 0, [value]
    while parts:
        part = parts.pop()
        weight += len(part) if isinstance(part, str | bytes) else 8
        if weight > limit_bytes:
            return True
        if isinstance(part, dict):
            parts += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple):
            parts += part
    return False


def unfold(headers: Mapping[str, Any], payload: Any) -> tuple[Mapping[str, Any], Any, Any, Any]:
    """Return fields, args, kwargs and embed of a message of protocol 2, 1, or the hybrid of both."""
    if isinstance(payload, dict) and ("task" not in headers or "args" in payload):
        fields = {**payload, **headers} if "task" in headers else payload
        embed = {key: payload.get(key) for key in _EMBED[:2] + _EMBED[3:]}
        return fields, payload.get("args", ()), payload.get("kwargs", {}), embed
    if isinstance(payload, list | tuple) and len(payload) == 3 and "task" in headers:
        return headers, *payload
    raise MalformedError("its body is not [args, kwargs, embed]")


def check_size(message: Any, limits: Limits) -> None:
    """Raise MalformedError for a message too large or too deeply nested, if possible undecoded."""
    if message.content_type == _UNREADABLE or not isinstance(message.headers, dict):
        raise MalformedError("its properties cannot be read")
    if len(message.body or b"") > limits.body_bytes:
        raise MalformedError(f"its body exceeds {limits.body_bytes} bytes")
    if _outweighs(message.headers, limits.header_bytes):
        raise MalformedError(f"its headers exceed {limits.header_bytes} bytes")
    if _deeper((message.payload, message.headers, message.properties), limits.depth):
        raise MalformedError(f"it is nested deeper than {limits.depth} levels")


def check_call(fields: Mapping[str, Any], properties: Mapping[str, Any], args: Any, kwargs: Any, embed: Any) -> None:
    """Raise MalformedError for a call that Celery, or a pool child, could not take apart."""
    for field in ("task", "id"):
        if not _name(fields.get(field)):
            raise MalformedError(f"its {field} is not a printable name")
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        raise MalformedError("its arguments are not a list and a mapping")
    if not (embed is None or (isinstance(embed, dict) and set(embed) <= set(_EMBED))):
        raise MalformedError("its embed is not a mapping of callbacks, errbacks, chain and chord")
    for source in (fields, properties, embed or {}):
        for field, good in _FIELDS.items():
            if source.get(field) is not None and not good(source[field]):
                raise MalformedError(f"its field {field} cannot be used")


def check_envelope(raw: Any) -> None:
    """Refuse what kombu's virtual transports (Redis among them) cannot turn into a message and settle."""
    properties = raw.get("properties") if isinstance(raw, dict) else None
    delivery = properties.get("delivery_info") if isinstance(properties, dict) else None
    if not isinstance(properties, dict) or not isinstance(delivery, dict):
        raise MalformedError("it is not an envelope")
    names = (properties.get("delivery_tag"), delivery.get("exchange"), delivery.get("routing_key"))
    if not all(map(_text, names)) or not isinstance(raw.get("headers") or {}, dict):
        raise MalformedError("its envelope names no queue and delivery tag")


def printable(value: Any) -> str:
    """Return a name fit for a log line: bounded, one line, ASCII."""
    return ascii(value[:80]) if isinstance(value, str) else f"of type {type(value).__name__}"


def expired(expires: Any) -> bool:
    """Tell whether an ``expires`` that was checked lies in the past; naive ones are UTC."""
    return bool(expires) and maybe_make_aware(maybe_iso8601(expires)) < datetime.now(UTC)


def reason(error: Exception) -> str:
    """Return why a message was refused, without anything of its content."""
    match error:
        case MalformedError():
            return str(error)
        case ContentDisallowed():
            return "its content type is not accepted"
        case DecodeError():
            return "it cannot be decoded within bounds"
        case _:
            return f"it cannot be used ({type(error).__name__})"
