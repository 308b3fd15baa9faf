"""The pages about the reference sagas show the code as it is."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import indent

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
SHOWN = re.compile(r"^<!-- not run: (?P<source>\S+\.py) -->\n```python\n(?P<code>.*?)^```$", re.M | re.S)
QUOTES = [(page, *found.group("source", "code")) for page in PAGES for found in SHOWN.finditer(page.read_text())]


@pytest.mark.parametrize(
    ("page", "source", "code"), QUOTES, ids=[f"{page.stem}-{n}" for n, (page, *_) in enumerate(QUOTES)]
)
def test_lines_that_a_page_shows_are_in_the_source(page: Path, source: str, code: str) -> None:
    text = (ROOT / source).read_text()
    assert any(indent(code, " " * depth) in text for depth in (0, 4, 8))


def test_every_saga_has_its_page() -> None:
    sagas = {path.stem for path in (ROOT / "sagas").glob("*.py")} - {"__init__"}
    assert sagas <= {page.stem for page in PAGES} == {"index", *sagas}
