"""Example arguments for a saga, made from its annotations, to be edited by whoever starts one by hand."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter

from orchestrator.saga import Saga

_BY_TYPE: dict[str, Any] = {"integer": 1, "number": 1.0, "boolean": True, "null": None, "string": "..."}
_BY_FORMAT = {
    "date-time": "2030-01-01T00:00:00Z", "date": "2030-01-01", "duration": "PT1M", "email": "ann@example.com",
    "uuid": "00000000-0000-4000-8000-000000000000",
}  # fmt: skip


def example_call(saga: Saga[Any, Any]) -> str:
    """Return the required arguments of a saga as a JSON array that a person can edit."""
    hints = saga.codec._annotations
    required = [name for name in saga.codec.parameters if name in saga.codec._required]
    return json.dumps([_of_annotation(hints.get(name, Any), name) for name in required], ensure_ascii=False)


def _of_annotation(annotation: Any, name: str) -> Any:
    try:
        schema = TypeAdapter(annotation).json_schema()
    except Exception:  # an annotation without a schema has no example
        return None
    return _of_schema(schema, schema.get("$defs", {}), 0, name)


def _of_schema(schema: dict[str, Any], definitions: dict[str, Any], depth: int, name: str = "") -> Any:
    for known in ("default", "const"):
        if known in schema:
            return schema[known]
    for choices in ("examples", "enum"):
        if schema.get(choices):
            return schema[choices][0]
    if "$ref" in schema and depth < 8:
        inner = definitions.get(schema["$ref"].rpartition("/")[2], {})
        return _of_schema(inner, definitions, depth + 1, name)
    for union in ("anyOf", "oneOf", "allOf"):
        if schema.get(union):
            return _of_schema(schema[union][0], definitions, depth + 1, name)
    if schema.get("type") == "object":
        wanted = schema.get("required", ())
        properties = schema.get("properties", {})
        return {key: _of_schema(properties[key], definitions, depth + 1, key) for key in properties if key in wanted}
    if schema.get("type") == "array":
        return [_of_schema(schema["items"], definitions, depth + 1)] if "items" in schema else []
    if schema.get("type") == "string" and "format" not in schema and name:
        return name
    return _BY_FORMAT.get(schema.get("format", ""), _BY_TYPE.get(schema.get("type", "")))
