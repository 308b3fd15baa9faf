"""Single values to JSON and back, by their annotation or without one.

Owns the settings under which pydantic encodes. It must never let pydantic drop something silently (an
iterator read empty, NaN turned into null) or depend on a process (the order of a set).
"""

from __future__ import annotations

import collections.abc
import functools
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, Final, NewType

from pydantic import BaseModel, ConfigDict, Secret, SecretBytes, SecretStr, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, SchemaSerializer, core_schema, to_json

from orchestrator.codec.text import MAX_DEPTH, Json, first_line, short
from orchestrator.errors import DefinitionError, PayloadError

_CONFIG: Final = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
_SECRETS: Final = (Secret, SecretBytes, SecretStr)
_UNKNOWN: Final = re.compile(r"Unable to serialize unknown type: <class '([^']{1,200})'>")
_PLAIN_TYPES: Final = frozenset({str, int, bool, type(None)})


def encode_any(value: object, what: str = "the value") -> Json:
    """Encode a value that has no annotation: builtins, and what pydantic can dump; it
    comes back as plain JSON.

    Raises:
        PayloadError: the value is a generator, a coroutine or an object that pydantic cannot dump.
    """
    try:
        return typing.cast(Json, _plain(value))
    except Exception as error:
        raise PayloadError(f"{what} cannot be stored: {reason(error)}") from error


class ValueCodec:
    """Encode and decode values of one annotation.

    Both directions validate. Decoding reads as JSON, so that strict models, bytes and
    keys come back as they were.

    Raises:
        DefinitionError: the annotation is nothing that pydantic can encode.
    """

    __slots__ = ("_exact", "_is_any", "_is_sure", "_to_json", "_validate", "_validate_json", "annotation")

    def __init__(self, annotation: Any = Any, *, what: str = "the value") -> None:
        self.annotation = _durable(annotation)
        self._is_any = self.annotation in (Any, object)
        self._exact = self.annotation if self.annotation in (str, int, bool) else None
        try:
            adapter: TypeAdapter[Any] = _adapter(self.annotation)
            serializer = _serializer(adapter)
        except PayloadError as error:
            raise DefinitionError(f"{what} is annotated with {annotation!r}: {error}") from None
        except Exception as error:
            raise DefinitionError(
                f"{what} is annotated with {annotation!r}, which cannot be encoded: {explain(error)} "
                "Annotate it with a type that pydantic supports, or with Any."
            ) from error
        self._is_sure = _is_sure(adapter.core_schema)
        self._to_json = serializer.to_python
        self._validate = adapter.validator.validate_python
        self._validate_json = adapter.validator.validate_json

    def encode(self, value: Any) -> Json:
        """Validate a value and return it as JSON; raises whatever pydantic raises.

        What could not be read again is refused now: later nobody is there who could pass something else.
        """
        if type(value) is self._exact:
            return typing.cast(Json, value)
        encoded = self.dump(value)
        if not self._is_sure:
            self._read_again(encoded)
        return encoded

    def dump(self, value: Any) -> Json:
        """Validate a value and return it as JSON that nobody will read by this annotation."""
        if type(value) is self._exact:
            return typing.cast(Json, value)
        if self._is_any:
            return typing.cast(Json, _plain(value))
        if _is_stream(type(value)):
            raise _not_data(value)
        # Fields by their names, whatever aliases they have for others: each can be read back by its name.
        encoded: Json = self._to_json(self._validate(value), mode="json", warnings="error", by_alias=False)
        return encoded

    def _read_again(self, encoded: Json) -> None:
        try:
            self.decode(encoded)
        except PydanticSerializationError:
            return  # it is no JSON at all, which is found where it is to be stored
        except Exception as error:
            raise PayloadError(
                f"it cannot be read back from the JSON that it becomes: {explain(error)} Pass it in a form that can, "
                "or correct how its type is written and read."
            ) from error

    def decode(self, value: Json) -> Any:
        """Return the value of its JSON, which shares nothing with it; raises whatever pydantic raises."""
        if self._is_any or type(value) is self._exact:
            return copied(value)
        return self._validate_json(to_json(value), by_alias=True, by_name=True)


def copied(value: Json) -> Json:
    """Return a JSON value that can be changed, while what is recorded stays as it is."""
    if type(value) is dict:
        return {name: copied(item) for name, item in value.items()}
    if type(value) is list:
        return [copied(item) for item in value]
    return value


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return TypeAdapter(annotation)
    if is_dataclass(annotation) or hasattr(annotation, "__total__"):
        # pydantic takes no config beside such a type, but does beside a new name for it.
        annotation = typing.cast(Any, NewType)("Value", annotation)
    return TypeAdapter(annotation, config=_CONFIG)


def _durable(annotation: Any) -> Any:
    """Read a bare ``Iterable`` as a list, because pydantic would decode it to an iterator that works once."""
    if typing.get_origin(annotation) is collections.abc.Iterable:
        return types.GenericAlias(list, typing.get_args(annotation) or (Any,))
    return annotation


def _serializer(adapter: TypeAdapter[Any]) -> SchemaSerializer:
    """Return pydantic's serializer, with sets in a stable order and ``Any`` as strict as the rest."""
    schema = adapter.core_schema
    hardened = _harden(schema)
    if hardened == schema:
        return adapter.serializer
    return SchemaSerializer(hardened, typing.cast(Any, dict(_CONFIG)), _use_prebuilt=False)


_OPAQUE: Final = frozenset({"metadata", "default", "expected", "members", "config", "cls", "function"})


def _harden(schema: Any) -> Any:
    if isinstance(schema, list | tuple):
        return type(schema)(_harden(part) for part in schema)
    if not isinstance(schema, dict):
        return schema
    hardened = {key: part if _is_opaque(schema, key) else _harden(part) for key, part in schema.items()}
    kind = schema.get("type")
    if isinstance(schema.get("cls"), type) and issubclass(schema["cls"], _SECRETS):
        raise _secret(schema["cls"])
    if kind in ("model", "dataclass") and _holds_stream(schema["schema"]):
        # What such a field was given is read when the model is written, and a second time there is nothing left.
        raise PayloadError(
            f"a field of {schema['cls'].__qualname__} can be read only once; annotate it with list[...] instead."
        )
    if _writes_stars(schema.get("serialization")):
        raise _secret(Secret)
    if kind == "model" and schema.get("config", {}).get("extra_fields_behavior") == "allow":
        hardened["schema"].setdefault("extras_schema", _harden(core_schema.any_schema()))
    if "serialization" in schema:
        return hardened
    if kind in ("set", "frozenset"):
        hardened["serialization"] = _IN_ORDER
    elif kind == "any":
        hardened["serialization"] = _AS_PLAIN
    return hardened


def _is_opaque(schema: dict[Any, Any], key: Any) -> bool:
    """Tell whether this part holds no schemas; what has no type is a mapping of schemas by names that authors chose."""
    return key in _OPAQUE and isinstance(schema.get("type"), str)


def _holds_stream(schema: Any) -> bool:
    if isinstance(schema, list | tuple):
        return any(map(_holds_stream, schema))
    if not isinstance(schema, dict):
        return False
    parts = (part for key, part in schema.items() if not _is_opaque(schema, key))
    return schema.get("type") == "generator" or any(map(_holds_stream, parts))


def _writes_stars(serialization: Any) -> bool:
    """Tell whether a serializer is that of ``Secret[...]``, whose schema does not name its class."""
    function = serialization.get("function") if isinstance(serialization, dict) else None
    return getattr(function, "__module__", "") == "pydantic.types" and "secret" in getattr(function, "__name__", "")


_PLAIN: Final = frozenset({
    "any", "none", "bool", "int", "float", "str", "bytes", "decimal", "date", "time", "datetime", "uuid", "list",
    "tuple", "set", "frozenset", "dict", "nullable", "union", "tagged-union", "default", "definitions",
    "definition-ref", "enum", "literal", "model", "model-fields", "model-field", "dataclass", "dataclass-args",
    "dataclass-field", "typed-dict", "typed-dict-field",
})  # fmt: skip
_BOUNDS: Final = (
    "gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "pattern", "max_digits", "decimal_places",
    "now_op", "tz_constraint",
)  # fmt: skip
_PLAIN_KEYS: Final = frozenset({"any", "str", "int", "decimal", "date", "datetime", "uuid", "enum"})
# What is left out of the JSON, or is in it and not taken from it; and code that is run when a value is made anew.
_DOUBTFUL: Final = (
    "serialization", "serialization_exclude", "serialization_exclude_if", "computed_fields", "init_only", "custom_init",
    "post_init",
)  # fmt: skip


def _is_sure(schema: Any) -> bool:
    """Tell whether all that pydantic writes by a schema it can read again, as far as that shows in the schema.

    A validator of the author's own may refuse what it has made, keys of a dict are text in JSON, and the members of an
    enum are found by values that JSON may not have.
    """
    if isinstance(schema, list | tuple):
        return all(map(_is_sure, schema))
    if not isinstance(schema, dict):
        return True
    return _is_plain(schema) and all(_is_sure(part) for key, part in schema.items() if not _is_opaque(schema, key))


def _is_plain(schema: dict[str, Any]) -> bool:
    kind = schema.get("type")
    if kind in ("model", "dataclass") and _has_bounds(schema["schema"]):
        return False  # it may have been changed since it was made, and an instance is not validated again
    if any(map(schema.get, _DOUBTFUL)) or schema.get("init") is False or callable(schema.get("discriminator")):
        return False
    if kind == "dict":
        keys = schema.get("keys_schema", {"type": "any"})
        return keys["type"] in _PLAIN_KEYS and (keys["type"] != "enum" or _values_are(keys, str))
    if kind == "enum":
        return _values_are(schema, str) or _values_are(schema, int)
    if kind == "literal":
        return all(value is None or type(value) in (str, int, bool) for value in schema["expected"])
    return not isinstance(kind, str) or kind in _PLAIN


def _has_bounds(schema: Any) -> bool:
    if isinstance(schema, list | tuple):
        return any(map(_has_bounds, schema))
    if not isinstance(schema, dict):
        return False
    parts = (part for key, part in schema.items() if not _is_opaque(schema, key))
    bounded = isinstance(schema.get("type"), str) and any(schema.get(name) is not None for name in _BOUNDS)
    return bounded or any(map(_has_bounds, parts))


def alike(one: Any, other: Any) -> bool:
    """Tell whether two values are equal, and of the same types: 1 is not True."""
    if type(one) is not type(other):
        return False
    if isinstance(one, BaseModel):
        return alike(vars(one), vars(other)) and alike(one.model_extra, other.model_extra)
    if is_dataclass(one) and not isinstance(one, type):
        return all(alike(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def _values_are(schema: dict[str, Any], kind: type) -> bool:
    return all(type(member.value) is kind for member in schema["members"])


def _ordered(value: Any, handler: Callable[[Any], Any]) -> list[Any]:
    return sorted(handler(value), key=to_json)


def _plain(value: Any, depth: int = 1) -> Any:
    """Return an unannotated value as JSON."""
    kind = type(value)
    if kind in _PLAIN_TYPES:
        return value
    if kind is float:
        if math.isfinite(value):
            return value
        raise PayloadError(f"it holds {value!r}, which JSON does not have; pass None or text.")
    if depth > MAX_DEPTH:
        raise PayloadError(f"it nests deeper than {MAX_DEPTH} levels (or contains itself); flatten it.")
    if kind is dict:
        return _plain_dict(value, depth)
    if kind is list or kind is tuple:
        return [_plain(item, depth + 1) for item in value]
    if kind is set or kind is frozenset:
        return sorted((_plain(item, depth + 1) for item in value), key=to_json)
    return _plain_leaf(value)


def _plain_dict(value: dict[Any, Any], depth: int) -> dict[str, Any]:
    plain = {k if type(k) is str else _plain_key(k): _plain(v, depth + 1) for k, v in value.items()}
    if len(plain) != len(value):
        raise PayloadError("two keys of a dict have the same JSON text; make its keys strings.")
    return plain


def _plain_key(key: Any) -> str:
    (text,) = _ANY.to_python({key: None}, mode="json", warnings="error")
    return str(text)


def _plain_leaf(value: Any) -> Any:
    if _is_stream(type(value)):
        raise _not_data(value)
    if isinstance(value, _SECRETS):
        raise _secret(type(value))
    if isinstance(value, BaseModel) or (is_dataclass(value) and not isinstance(value, type)):
        return _of_type(type(value)).dump(value)
    return _ANY.to_python(value, mode="json", warnings="error")


_IN_ORDER: Final = core_schema.wrap_serializer_function_ser_schema(_ordered, when_used="json")
_AS_PLAIN: Final = core_schema.plain_serializer_function_ser_schema(_plain, when_used="json")


@functools.lru_cache(maxsize=512)
def _of_type(kind: type) -> ValueCodec:
    return ValueCodec(kind, what=kind.__qualname__)


_ANY: Final = TypeAdapter(Any, config=_CONFIG).serializer


def _reads_once(kind: type) -> bool:
    return any("__next__" in vars(base) or "__await__" in vars(base) for base in kind.__mro__)


# Cached by type, because hasattr on a pydantic instance takes microseconds.
_is_stream: Final[Callable[[type], bool]] = functools.lru_cache(maxsize=2048)(_reads_once)


def _not_data(value: object) -> PayloadError:
    kind = type(value).__qualname__
    if hasattr(type(value), "__await__"):
        return PayloadError(f"it is a {kind}, not a value; await it first and pass what it returns.")
    return PayloadError(f"it is a {kind}, which can be read only once; pass a list of its items.")


def _secret(kind: type) -> PayloadError:
    return PayloadError(
        f"it is a {kind.__qualname__}, which pydantic writes as stars; what is secret is not stored. Pass a reference."
    )


def reason(error: BaseException) -> str:
    """Say why a value was refused, without repeating the value."""
    if isinstance(error, PayloadError):
        return str(error)
    if isinstance(error, PydanticSerializationError):
        # pydantic keeps only the text of what was raised inside, and shows values after the first line.
        inner = str(error).partition("PayloadError: ")[2].partition("\n")[0]
        kind = _UNKNOWN.match(str(error))
        what = f"it holds a {kind[1]}, which pydantic cannot dump" if kind else "pydantic cannot dump it"
        return inner or f"{what}. Pass data that fits its annotation."
    if isinstance(error, RecursionError):
        return f"it nests deeper than {MAX_DEPTH} levels (or contains itself); flatten it."
    return f"{explain(error)} Pass a value that fits its annotation."


def explain(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        flaws = error.errors(include_url=False, include_context=False, include_input=False)
        told = [": ".join(filter(None, [".".join(map(short, flaw["loc"])), flaw["msg"]])) for flaw in flaws[:3]]
        return "; ".join(told) + (f" and {len(flaws) - 3} more." if len(flaws) > 3 else ".")
    return f"{type(error).__name__}: {first_line(error)}."
