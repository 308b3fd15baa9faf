"""Calling functions of the user's with what they ask for.

Owns how a function says what it wants: by the names of its parameters, or by having one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from orchestrator.testing.stubs import to_its_end


def call(function: Callable[..., Any] | None, **known: Any) -> Any:
    """Call a function with what it takes of `known` by name; one parameter of another name gets the first of them.

    It may be async.
    """
    if function is None:
        return None
    try:
        wanted = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    except ValueError:  # a builtin that does not tell
        wanted = []
    if len(wanted) == 1 and wanted[0] not in known:
        return to_its_end(function(next(iter(known.values()))))
    return to_its_end(function(**{name: known[name] for name in wanted if name in known}))
