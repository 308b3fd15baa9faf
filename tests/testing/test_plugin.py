"""The pytest plugin: its fixture in a project of its own, and nothing for those who do not use it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = re.compile(r"^<!-- file: (?P<name>\S+) -->\n```python\n(?P<code>.*?)^```$", re.M | re.S)


def run_pytest(folder: Path, *arguments: str, **environment: str) -> str:
    """Run pytest in a folder, with the installed plugin; returns what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:valkey", *arguments],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_tests_of_the_documentation_pass(_postgres_url: str, tmp_path: Path) -> None:
    for found in FILE.finditer((ROOT / "docs" / "testing.md").read_text()):
        (tmp_path / found["name"]).write_text(found["code"])
    said = run_pytest(tmp_path, "-q", "test_checkout.py", ORCHESTRATOR_TEST_DATABASE_URL=_postgres_url)
    assert "4 passed" in said


@pytest.mark.parametrize("imported", ["orchestrator", "celery", "sqlalchemy"])
def test_nothing_is_imported_for_those_who_do_not_use_it(tmp_path: Path, imported: str) -> None:
    (tmp_path / "test_plain.py").write_text(f"import sys\n\ndef test_plain(): assert {imported!r} not in sys.modules\n")
    assert "1 passed" in run_pytest(tmp_path, "-q")


def test_a_missing_server_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from orchestrator import embedded\n\n"
        "def start(directory): raise embedded.EmbeddedError('the extra is not installed')\n\n"
        "embedded.start = start\n"
    )
    (tmp_path / "test_it.py").write_text(
        "import pytest\nfrom orchestrator import ConfigurationError\n\n"
        "def test_it(request):\n"
        "    with pytest.raises(ConfigurationError, match='set ORCHESTRATOR_TEST_DATABASE_URL to a server'):\n"
        "        request.getfixturevalue('saga_environment')\n"
    )
    assert "1 passed" in run_pytest(tmp_path, "-q", ORCHESTRATOR_TEST_DATABASE_URL="")
