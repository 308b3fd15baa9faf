"""What pip installs with the package is enough to run a worker on either broker."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

_PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def _installed(stated: list[str], extras: frozenset[str] = frozenset({""})) -> set[str]:
    """Return the distributions that pip installs for these requirements."""
    found: set[str] = set()
    for each in map(Requirement, stated):
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
            found |= {each.name, *_installed(requires(each.name) or [], frozenset({"", *each.extras}))}
    return found


def _imported(module: str) -> set[str]:
    """Return the packages that are imported with a module, outside of the standard library."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


@pytest.mark.parametrize("transport", ["kombu.transport.redis", "kombu.transport.pyamqp"])
def test_the_package_requires_what_a_transport_of_kombu_imports(transport: str) -> None:
    installed = _installed(_PROJECT["dependencies"])
    sources = packages_distributions()
    missing = {name for name in _imported(transport) if not installed & set(sources[name])}
    assert not missing, f"{transport} imports what no requirement brings: {missing}"
