"""The source of a saga and what the names in it mean, without running it.

Owns the way from an expression to the object or the dotted name that it stands for.  Must never call anything.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

_IGNORED = re.compile(r"#\s*saga:\s*ignore(?:\[([\w,\s]+)\])?")
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Source:
    """A function's syntax tree with the names of its module."""

    path: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    names: dict[str, Any]
    lines: list[str]

    def ignores(self, line: int, code: str) -> bool:
        """Tell whether a comment on this line leaves the rule `code` alone."""
        found = _IGNORED.search(self.lines[line - 1]) if 0 < line <= len(self.lines) else None
        return found is not None and (found[1] is None or code in re.split(r"[,\s]+", found[1]))


@functools.lru_cache(maxsize=256)
def _parsed(path: str) -> tuple[ast.Module, list[str]]:
    with open(path, encoding="utf-8") as file:
        text = file.read()
    return ast.parse(text), text.splitlines()


def source_of(function: Callable[..., Any]) -> Source | None:
    """Return the source of a function; None if it has none that can be read."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    path = inspect.getsourcefile(function) if code is not None else None
    if code is None or path is None:
        return None
    try:
        tree, lines = _parsed(path)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first <= code.co_firstlineno <= node.lineno:
                return Source(path, node, _names(function, node), lines)
    return None


def _names(function: Any, node: ast.AST) -> dict[str, Any]:
    """Return what the names in a function's body mean: its module's, and what it imports itself."""
    names = dict(getattr(function, "__globals__", {}))
    names.update(_closure(function))
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            for alias in inner.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                names[alias.asname or name] = sys.modules.get(name, _Named(name))
        elif isinstance(inner, ast.ImportFrom) and inner.module and not inner.level:
            module = sys.modules.get(inner.module)
            for alias in inner.names:
                names[alias.asname or alias.name] = getattr(module, alias.name, _Named(f"{inner.module}.{alias.name}"))
    return names


def _closure(function: Any) -> dict[str, Any]:
    try:
        return dict(inspect.getclosurevars(function).nonlocals)
    except (TypeError, ValueError):
        return {}


@dataclass(frozen=True, slots=True)
class _Named:
    """Something that is imported inside a function and not loaded now: its name is all that is known."""

    dotted: str


def resolve(source: Source, node: ast.expr) -> Any:
    """Return the object that a name or attribute chain stands for, None if that cannot be told."""
    found = _resolve(source, node)
    return None if found is _MISSING or isinstance(found, _Named) else found


def _resolve(source: Source, node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return source.names.get(node.id, getattr(builtins, node.id, _MISSING))
    if isinstance(node, ast.Attribute):
        owner = _resolve(source, node.value)
        if owner is _MISSING or isinstance(owner, _Named):
            return _MISSING
        return inspect.getattr_static(owner, node.attr, _MISSING) if not isinstance(owner, ModuleType) else getattr(
            owner, node.attr, _MISSING
        )  # fmt: skip
    return _MISSING


def dotted(source: Source, node: ast.expr) -> str:
    """Return the full dotted name of an expression, as ``datetime.datetime.now``; empty if it has none."""
    if isinstance(node, ast.Attribute):
        owner = dotted(source, node.value)
        return f"{owner}.{node.attr}" if owner else ""
    if not isinstance(node, ast.Name):
        return ""
    return _name_of(_resolve(source, node))


def _name_of(found: Any) -> str:
    if isinstance(found, _Named):
        return found.dotted
    if isinstance(found, ModuleType):
        return found.__name__
    if not callable(found):
        return ""
    module, name = getattr(found, "__module__", None), getattr(found, "__qualname__", "")
    if not module:  # a bound method of a C type, such as random.random
        module = type(getattr(found, "__self__", None)).__module__
    return f"{module}.{name}" if name else ""


def helpers(source: Source) -> Iterator[Callable[..., Any]]:
    """Yield the functions of the same module that this one calls by name: they are saga code as well."""
    for call in ast.walk(source.node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            found = source.names.get(call.func.id)
            if inspect.isfunction(found) and inspect.getsourcefile(found) == source.path:
                yield found
