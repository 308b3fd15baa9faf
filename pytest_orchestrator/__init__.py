"""The pytest plugin: an environment for sagas as a fixture.

Owns the fixtures alone.  It is loaded into every pytest run of a machine that has the package: it must never import
anything of it before a test asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from orchestrator.testing import Environment


@pytest.fixture(scope="session")
def saga_database() -> Iterator[str]:
    """URL of a Postgres database of this session, with the orchestrator's schema and a clock that can be moved.

    It is made on ORCHESTRATOR_TEST_DATABASE_URL, or on an embedded Postgres, and dropped at the end.
    """
    from orchestrator.testing.servers import database

    with database() as url:
        yield url


@pytest.fixture(scope="session")
def _saga_environment(saga_database: str) -> Iterator[Environment]:
    from orchestrator.testing import Environment

    with Environment(saga_database) as environment:
        yield environment


@pytest.fixture
def saga_environment(_saga_environment: Environment) -> Iterator[Environment]:
    """Environment without runs, stubs and faults on the session's database; what is yours there is yours to reset."""
    _saga_environment.reset()
    yield _saga_environment
    _saga_environment.release()
