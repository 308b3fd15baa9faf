"""Values to JSON and back: the only door through which a value reaches the database or leaves it.

``text`` says what can be stored at all, ``values`` encodes one value by its annotation, ``calls`` the
arguments and the result of a function, ``messages`` what plain Celery tasks are given and return. This
package must never do IO and never repeat a value in a log line or an error message.
"""

from __future__ import annotations

from orchestrator.codec.calls import FunctionCodec, PlainCodec
from orchestrator.codec.messages import MessageValue, from_message, to_message, without_envelopes
from orchestrator.codec.text import (
    DEFAULT_LIMIT_BYTES,
    MAX_DEPTH,
    MAX_INT_DIGITS,
    Json,
    canonical_text,
    check,
    dumps,
    dumps_rows,
    first_line,
    is_name,
    loads,
    read_stored,
    set_limit,
)
from orchestrator.codec.values import ValueCodec, copied, encode_any
from orchestrator.errors import describe_exception

__all__ = [
    "DEFAULT_LIMIT_BYTES",
    "MAX_DEPTH",
    "MAX_INT_DIGITS",
    "FunctionCodec",
    "Json",
    "MessageValue",
    "PlainCodec",
    "ValueCodec",
    "canonical_text",
    "check",
    "copied",
    "describe_exception",
    "dumps",
    "dumps_rows",
    "encode_any",
    "first_line",
    "from_message",
    "is_name",
    "loads",
    "read_stored",
    "set_limit",
    "to_message",
    "without_envelopes",
]
