"""What a run shows of itself while it runs: progress, published state, search attributes.

Owns what operators and callers see of it.  Must never be read back by saga code: it is derived from the journal, not
part of it.
"""

from __future__ import annotations

import math
from typing import Any

from orchestrator.codec import check, encode_any, is_name
from orchestrator.errors import UsageError
from orchestrator.machine.code import SagaCode
from orchestrator.saga.inside import code_of


def progress(done: float, total: float | None = None, note: str = "") -> None:
    """Show how far the run has come; seen in `SagaResult.published["progress"]`, ``saga show`` and Flower."""
    _show(code_of("progress"), {"progress": {"done": done, "total": total, "note": note}})


def publish(**state: Any) -> None:
    """Show values under their names until they are published again; written with the turn, without a journal entry.

    Raises: PayloadError for what cannot be stored.
    """
    _show(code_of("publish"), state)


def _show(code: SagaCode, state: dict[str, Any]) -> None:
    shown = {**code.published, **{name: encode_any(value, f"published {name!r}") for name, value in state.items()}}
    check(shown, what="the published state")
    code.published = shown


def tag(**tags: str | int | float | bool | None) -> None:
    """Make the run findable: ``saga list --where customer=42``; None takes a tag away.

    Raises: UsageError for a value that is not text, a number or a truth value.
    """
    code = code_of("tag")
    for name, value in tags.items():
        if not (value is None or is_tag(value)):
            raise UsageError(
                f"saga.tag: {name}= must be text of at most 500 printable bytes, a number or a truth value"
            )
    check(dict(tags), what="the tags")
    code.tags = {**code.tags, **tags}


def is_tag(value: object) -> bool:
    """Tell whether a value can be searched for: text of at most 500 printable bytes, a number or a truth value."""
    if isinstance(value, str):
        return is_name(value)
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and abs(value) < 10**500  # of more digits Python makes no text
