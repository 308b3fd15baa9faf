"""What an error handler is told about the link that failed.

Owns the JSON form in which a failure is handed to a handler.  A plain Celery task gets of it what Celery would have
given it, in the worker that knows the task (`orchestrator.celery.handlers`); a declared step gets it here.
"""

from __future__ import annotations

from typing import Any

from orchestrator.codec import Json
from orchestrator.errors import StepFailed, describe_exception
from orchestrator.saga.inside import code_of

FAILURE = "orchestrator.failure"
_REQUEST = 3  # a handler with so many parameters takes request, error and traceback; any other takes the id


def failure_of(error: Exception) -> Json:
    """Return the form of a failure: the id under which Celery knew the link, its task, its run, and the error."""
    info = code_of("step").fold.info
    # Without a traceback: each replay makes the error anew, and the lines of a later release are others.
    known = {**describe_exception(error), "traceback": ""}
    failed: dict[str, Json] = {"id": info.id, "root_id": info.id, "task": info.saga, "error": known}
    if isinstance(error, StepFailed):
        step = code_of("step").fold.steps[error.key]
        failed |= {"id": f"{info.id}:{error.key}", "task": step.asked.task, "error": error.error}
    return {FAILURE: failed}


def failure_in(args: list[Any] | tuple[Any, ...]) -> dict[str, Any] | None:
    """Return the failure that the first of the arguments is, or None; anybody can send what only looks like one."""
    first = args[0] if args else None
    found = first.get(FAILURE) if isinstance(first, dict) and first.keys() == {FAILURE} else None
    if not isinstance(found, dict) or found.keys() != {"id", "root_id", "task", "error"}:
        return None
    return found if isinstance(found["error"], dict) else None


def arguments_of_handler(args: list[Json], parameters: int) -> list[Json]:
    """Return the arguments of a declared step: of a failure, as much as it has parameters for."""
    failed = failure_in(args)
    if failed is None:
        return args
    if parameters - (len(args) - 1) < _REQUEST:
        return [failed["id"], *args[1:]]
    error = failed["error"]
    request = {name: failed[name] for name in ("id", "root_id", "task")}
    return [request, error, error.get("traceback", ""), *args[1:]]
