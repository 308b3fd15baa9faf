"""The benchmarks run; how fast is nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_case_is_measured_and_reported(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks", "--case", "three", "--runs", "3", "--rounds", "1"]

    done = subprocess.run(
        [*command, "--json", str(report)], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    floors = ["floor, 1 connection", "floor, 8 connections"]
    assert [row["against"] for row in found["rows"]] == ["raw chain", *floors, "raw chain", "floor, 8 connections"]
    assert all(value > 0 for row in found["rows"] for value in [*row["ours"], *row["theirs"]])
    assert found["facts"]["cores"] >= 1 and found["facts"]["commit_ms"] > 0
    assert "3 runs of 3 steps" in done.stdout
