"""The plugin's environment, on the Postgres that the other tests have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator.store import testbed


@pytest.fixture(scope="session")
def saga_database(_postgres_url: str) -> Iterator[str]:
    """A database next to those of the other tests, in the place of the plugin's."""
    url = testbed.create(_postgres_url)
    yield url
    testbed.drop(url, _postgres_url)
