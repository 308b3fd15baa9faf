"""A step may fork; a copy that comes back from it must not go on as a second worker's child."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator import step
from tests.celery.conftest import Invoke


@pytest.mark.parametrize("raises", [False, True], ids=["returns", "raises"])
def test_a_copy_that_comes_back_from_a_step_is_ended(raises: bool, invoke: Invoke, tmp_path: Path) -> None:
    """It shares the connections of its parent: what the two would say there is torn."""
    copies: list[int] = []

    def fork() -> str:
        pid = os.fork()
        if pid:
            copies.append(pid)
            return "the step"
        if raises:
            raise ValueError("the copy")
        return "the copy"

    step(name="forking.fork")(fork)
    here = os.getpid()
    try:
        done = invoke("forking.fork")
    finally:
        if os.getpid() != here:  # or the copy would go on with the tests
            (tmp_path / "went on").touch()
            os._exit(0)
    _, status = os.waitpid(copies[0], 0)
    assert not (tmp_path / "went on").exists()
    assert os.waitstatus_to_exitcode(status) == os.EX_SOFTWARE
    assert done.result == "the step" and done.error is None
