"""The checker finds each broken promise by its own name, and nothing in a database where all were kept."""

from __future__ import annotations

from typing import Any

from tests.proof import town
from tests.proof.checker import Report, Seen, check
from tests.proof.conftest import Place

SEEN = Seen(faults=3, redeliveries=1)


def checked(place: Place, **changes: Any) -> Report:
    """Check the town with all that its story tells."""
    given: dict[str, Any] = {
        "effect_log": place.effect_log,
        "acknowledged": town.STARTED,
        "may_park": ["parked"],
        "refused": town.REFUSED,
        "seen": SEEN,
    }
    return check(place.database_url, **{**given, **changes})


def test_where_every_promise_was_kept_nothing_is_found(place: Place) -> None:
    report = checked(place)
    assert report.ok, str(report)
