"""``make bench``: measure on an embedded stack of its own, print one table."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.cases import CASES
from benchmarks.scale import Scale
from benchmarks.stack import BenchmarkError, Stack
from orchestrator import embedded


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that no server and no worker is left behind
    arguments = _parse()
    scale = Scale(arguments.rounds, arguments.runs)
    with (
        tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as directory,
        embedded.start(Path(directory)) as servers,
    ):
        stack = Stack(servers, Path(directory))
        known = report.facts(stack, scale.rounds, scale.runs)
        rows: list[report.Row] = []
        failed = 0
        try:
            for name in arguments.case or CASES:
                failed += not _measure(name, stack, scale, rows)
        finally:  # what was measured before an interruption is not lost
            Console(width=None if Console().is_terminal else 150).print(report.table(rows, known))
            if arguments.json:
                arguments.json.write_text(json.dumps(report.as_json(rows, known), indent=1) + "\n")
    return 1 if failed else 0


def _measure(name: str, stack: Stack, scale: Scale, rows: list[report.Row]) -> bool:
    """Add the rows of a case; a case that fails says so, and the others go on."""
    said = Console(stderr=True, markup=False, highlight=False)
    began = time.monotonic()
    try:
        rows += CASES[name](stack, scale)
    except BenchmarkError as error:
        said.print(f"{name} failed: {error}")
        return False
    said.print(f"{name}: {time.monotonic() - began:.0f} s")
    return True


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="only this one; may be repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1000, help="scale: 1000 is full size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
