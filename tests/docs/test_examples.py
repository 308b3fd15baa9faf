"""The Python in README and docs runs as it is printed, each page in a process of its own.

Comments in a page, which readers do not see, say how:

- ``<!-- file: shop.py -->`` before a block: it becomes that file, which later blocks import;
- ``<!-- not run: why -->`` before a block: it is only compiled;
- ``<!-- needs: database -->`` anywhere: the page gets a fresh, migrated database and a broker;
- ``<!-- needs: worker shop -->``: also a Celery worker of the app in the page's file ``shop.py``.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- (?P<mark>file|not run): (?P<value>.+?) -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S)
NEEDS = re.compile(r"^<!-- needs: (database|worker (\w+)) -->$", re.M)


@dataclass(frozen=True, slots=True)
class Block:
    """A block of Python, the line of the page that it begins at, and the comment before it."""

    code: str
    line: int
    mark: str
    value: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(found["code"], text.count("\n", 0, found.start("code")), found["mark"] or "", found["value"] or "")
        for found in BLOCK.finditer(text)
    ]


def script_of(blocks: list[Block]) -> str:
    """Put the blocks that run where they stand in the page, so that a traceback names its lines."""
    script = ""
    for block in blocks:
        if not block.mark:
            script += "\n" * (block.line - script.count("\n")) + block.code
    return script


RUNNABLE = [page for page in PAGES if script_of(blocks_of(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_compiles(page: Path) -> None:
    assert page.read_text().count("```python\n") == len(blocks_of(page))
    for block in blocks_of(page):
        compile(block.code, f"{page.name} line {block.line}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    for block in blocks_of(page):
        if block.mark == "file":
            (tmp_path / block.value).write_text(block.code)
    script = tmp_path / f"{page.stem.replace('-', '_')}_page.py"
    script.write_text(script_of(blocks_of(page)))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    needs = NEEDS.search(page.read_text())
    if needs is None:
        return _run(script, environment)
    environment["ORCHESTRATOR_DATABASE_URL"] = request.getfixturevalue("database_url")
    environment["CELERY_BROKER_URL"] = request.getfixturevalue("broker_url")
    if needs[2] is None:
        return _run(script, environment)
    with _worker(needs[2], tmp_path, environment):
        _run(script, environment)


def _run(script: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=script.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"line numbers are those of the page\n{done.stdout}"


@contextmanager
def _worker(app: str, directory: Path, environment: dict[str, str]) -> Iterator[None]:
    """A worker needs no wait: what is started before it is ready is done when it is."""
    log = directory / "worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", app, "worker", "--concurrency", "1", "--hostname", "docs@%h"],
            cwd=directory,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield
        except AssertionError as error:
            raise AssertionError(f"{error}\nthe worker said:\n{log.read_text(errors='replace')}") from None
        finally:
            process.terminate()
            process.wait(timeout=30)
