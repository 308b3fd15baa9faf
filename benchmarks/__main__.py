"""``make bench``: measure on an embedded stack of its own, print one table."""

from __future__ import annotations

import argparse
import json
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
    arguments = _parse()
    console, rows, failed = Console(stderr=True), [], []
    scale = Scale(arguments.rounds, arguments.runs)
    with (
        tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as directory,
        embedded.start(Path(directory)) as servers,
    ):
        stack = Stack(servers, Path(directory))
        known = report.facts(stack, scale.rounds, scale.runs)
        for name in arguments.case or CASES:
            began = time.monotonic()
            try:
                measured = CASES[name](stack, scale)
            except BenchmarkError as error:
                failed.append(name)
                console.print(f"{name} failed: {error}", markup=False)
                continue
            rows += measured
            console.print(f"{name}: {time.monotonic() - began:.0f} s", highlight=False)
    Console(width=None if Console().is_terminal else 150).print(report.table(rows, known))
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_json(rows, known), indent=1) + "\n")
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="only this one; may be repeated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1000, help="scale: 1000 is full size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, too")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
