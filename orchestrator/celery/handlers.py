"""Error handlers of a canvas: plain Celery tasks that are called as Celery calls them.

Owns the translation of a recorded failure into the arguments that such a task expects: its id, or the request, the
exception and the traceback.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from celery.app.task import Context
from celery.utils.functional import arity_greater
from celery.utils.serialization import create_exception_cls

from orchestrator.canvas.telling import failure_in


def told(task: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return the arguments of a handler whose first one is a recorded failure; None for any other call."""
    failed = failure_in(args)
    if failed is None:
        return None
    if not _takes_error(task):
        return (failed["id"], *args[1:])
    error = failed["error"]
    request = Context({name: failed[name] for name in ("id", "root_id", "task")})
    return (request, _exception(error), error.get("traceback", ""), *args[1:])


def _takes_error(task: Any) -> bool:
    """Celery's rule: a task that takes more than one argument, and is not bound, takes the error itself."""
    header = getattr(task, "__header__", None)
    return header is not None and not isinstance(header, partial) and bool(arity_greater(header, 1))


def _exception(error: dict[str, Any]) -> BaseException:
    """Make the exception again, if its class is known here and takes a message alone; else one of the same name."""
    name, module, message = (str(error.get(part, "")) for part in ("type", "module", "message"))
    known = getattr(sys.modules.get(module), name, None)
    if isinstance(known, type) and issubclass(known, Exception):
        try:
            return known(message)
        except Exception:  # one that wants more than a message
            pass
    made: BaseException = create_exception_cls(name or "Exception", module)(message)
    return made
