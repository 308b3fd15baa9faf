"""Plain Celery tasks in a test: called with a request, and what they raise read as a worker reads it.

Owns the counterpart of `orchestrator.celery.runner` for tests.  Must never send a message.
"""

from __future__ import annotations

from typing import Any

from celery.exceptions import Ignore, Reject, Retry

from orchestrator.celery import handlers
from orchestrator.codec import check
from orchestrator.errors import PayloadError, Rejected
from orchestrator.step import legacy_codec, step


def call(task: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call a task for the step that runs now.

    Raises: Rejected for `Reject`, the reason of a `Retry`, and whatever the task raises.
    """
    current = step.current()
    task.push_request(
        id=current.idempotency_key,
        root_id=current.run_id,
        retries=current.attempt - 1,
        called_directly=False,
        is_eager=True,  # so that retry() raises and sends nothing
    )
    try:
        return _kept(task, task(*(handlers.told(task, args) or args), **kwargs))
    except Ignore:
        return None
    except Reject as rejected:
        raise Rejected(str(rejected.reason or "the task raised Reject")) from rejected
    except Retry as again:
        raise (again.exc or again) from None
    finally:
        task.pop_request()


def _kept(task: Any, value: Any) -> Any:
    """Of a task with ``ignore_result`` what cannot be stored is None."""
    if task.ignore_result:
        try:
            check(legacy_codec.encode_result(value))
        except PayloadError:
            return None
    return value
