"""The machine alone: no app that other tests have bound in this process routes its steps."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from orchestrator.step import set_router


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families", type=int, default=200, help="how many random families of runs to play")


@pytest.fixture(autouse=True)
def no_routes() -> Iterator[None]:
    router = sys.modules["orchestrator.step"]._router
    set_router(lambda name: "")
    yield
    set_router(router)
