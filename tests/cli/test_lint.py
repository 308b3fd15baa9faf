"""lint: each rule finds its mistake, on its line, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli.rules import RULES

ROOT = Path(__file__).parents[2]
BROKEN = Path(__file__).parent / "broken.py"
_MAIN = """
import sys
from celery.bin.celery import celery
from orchestrator.cli import saga
celery.add_command(saga)
celery(prog_name="celery")
"""


def _lint(app: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Lint in a process of its own, since it imports what is wrong."""
    command = [sys.executable, "-c", _MAIN, "-A", app, "saga", "lint", *arguments]
    return subprocess.run(command, cwd=cwd, env={"PYTHONPATH": f"{ROOT}:{cwd}", "COLUMNS": "80"}, capture_output=True,
                          text=True, check=False)  # fmt: skip


@pytest.fixture(scope="module")
def found() -> subprocess.CompletedProcess[str]:
    """What the linter says about everything that is wrong."""
    return _lint("tests.cli.broken")


def test_every_mistake_is_found_on_its_line_and_nothing_else(found: subprocess.CompletedProcess[str]) -> None:
    lines = BROKEN.read_text().splitlines()
    wanted = {(n, code[0]) for n, line in enumerate(lines, 1) if (code := re.findall(r"# (SG\d+)$", line))}
    told = re.findall(r"^tests/cli/broken\.py:(\d+):\d+: (SG\d+) ", found.stdout, re.MULTILINE)
    assert {(int(line), code) for line, code in told} == wanted
    assert {code for _, code in wanted} == RULES.keys() - {"SG001"}


def test_errors_exit_with_1_and_are_counted(found: subprocess.CompletedProcess[str]) -> None:
    assert found.returncode == 1
    assert re.fullmatch(r"Found \d+ errors and 8 warnings\.", found.stdout.splitlines()[-1])


def test_the_reference_application_is_clean() -> None:
    clean = _lint("tasks.app", "--strict")
    assert (clean.returncode, clean.stderr) == (0, "")
    assert clean.stdout.startswith("All checks passed: 7 sagas")


GOOD = """
from celery import Celery
from orchestrator import Orchestrator, saga, step
app = Celery("good")
orchestrator = Orchestrator(app)
@step
def bare(): ...
@saga.define
async def only() -> None:
    await saga.step(bare)
"""
REFUSED = """
from orchestrator import step
@step
def undo(nonsense: int) -> None: ...
@step(compensate=undo)
def do(n: int) -> None: ...
"""


def test_warnings_are_no_errors_unless_strict(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    assert _lint("good", cwd=tmp_path).returncode == 0
    assert _lint("good", "--strict", cwd=tmp_path).returncode == 1


def test_a_declaration_that_is_refused_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "refused.py").write_text(REFUSED)
    refused = _lint("good", "refused.py", "--json", cwd=tmp_path)
    [finding] = json.loads(refused.stdout)
    assert refused.returncode == 1
    assert (finding["path"], finding["line"], finding["code"]) == ("refused.py", 5, "SG001")
    assert "takes nonsense" in finding["message"]


UNREADABLE = """
from __future__ import annotations
from typing import TYPE_CHECKING
from orchestrator import saga, step
if TYPE_CHECKING:
    from decimal import Decimal
class Order: ...
@step
def charge(order: Order) -> None: ...
@saga.define
async def pay(amount: Decimal) -> None: ...
@step
def refund(amount: Decimal) -> None: ...
@step(compensate=refund)
def take(amount: int) -> None: ...
"""


def test_annotations_that_cannot_be_read_are_found_before_a_run_parks_by_them(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "unreadable.py").write_text(UNREADABLE)
    found = json.loads(_lint("good", "unreadable.py", "--json", cwd=tmp_path).stdout)
    assert [(each["line"], each["code"]) for each in found] == [(9, "SG001"), (11, "SG001"), (13, "SG001")]
    assert "'order' is annotated with" in found[0]["message"] and "cannot be encoded" in found[0]["message"]
    assert "pay: its annotations cannot be resolved (name 'Decimal' is not defined)" in found[1]["message"]


INCLUDES = """
from celery import Celery
from orchestrator import Orchestrator
app = Celery("includes", include=["refused"])
orchestrator = Orchestrator(app)
"""


@pytest.mark.parametrize("named", [(), ("refused",), ("refused.py",)])
def test_modules_beside_the_app_are_found_as_celery_finds_them(named: tuple[str, ...], tmp_path: Path) -> None:
    """The script `celery` does not have the current directory on its path: lint ended with a traceback."""
    (tmp_path / "includes.py").write_text(INCLUDES if not named else GOOD)
    (tmp_path / "refused.py").write_text(REFUSED)
    command = [sys.executable, "-P", "-c", _MAIN, "-A", "includes", "saga", "lint", *named]
    linted = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "COLUMNS": "80"}, capture_output=True,
                            text=True, check=False)  # fmt: skip
    assert linted.stdout.startswith("refused.py:5:1: SG001 ") and "Traceback" not in linted.stderr


def test_a_module_that_is_not_there_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    assert _lint("good", "nowhere.at.all", cwd=tmp_path).returncode == 2
