"""The public calls are typed: what is right passes mypy --strict with the types it says, what is wrong is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SAID = re.compile(r"wrong\.py:(\d+): error: .*\[([a-z-]+)\]$", re.M)
EXPECTED = re.compile(r"# E: ([a-z-]+(?:, [a-z-]+)*)$")


def mypy(name: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context", str(HERE / name)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=110, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_what_is_right_has_the_types_that_it_says() -> None:
    assert mypy("right.py") == (0, "")


def test_each_wrong_use_has_its_error_and_nothing_else_has_one() -> None:
    code, said = mypy("wrong.py")
    found = sorted((int(line), kind) for line, kind in set(SAID.findall(said)))
    lines = enumerate((HERE / "wrong.py").read_text().splitlines(), 1)
    expected = sorted((n, kind) for n, line in lines for hit in EXPECTED.findall(line) for kind in hit.split(", "))
    assert (code, found) == (1, expected), said
