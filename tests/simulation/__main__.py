"""Play seeds by hand: ``python -m tests.simulation --seed 7 --verbose`` prints the schedule of one.

``--from 1000 --count 5000`` hunts; it prints the seeds that fail, and exits with 1 if there were any.  With ``--fault``
it hunts for a seed that finds a fault that was mended.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from orchestrator import embedded, store
from tests.simulation.database import empty, prepare
from tests.simulation.faults import MUST_HAPPEN
from tests.simulation.kept import KEPT
from tests.simulation.network import Sessions
from tests.simulation.world import Simulation, has_families


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--from", type=int, default=1, dest="first")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--verbose", action="store_true", help="print the schedule")
    parser.add_argument("--fault", choices=[fault.__name__ for fault, *_ in KEPT], help="put a mended fault back")
    parser.add_argument(
        "--focus", default="", help="let only statements that say this, or that, be in danger: this|that"
    )
    parser.add_argument("--keep-going", action="store_true", help="do not end at the first seed that fails")
    parser.add_argument("--families", action="store_true", help="only seeds whose runs have children, blocks, maps")
    arguments = parser.parse_args()
    seeds = [*range(arguments.first, arguments.first + arguments.count)]
    if arguments.families:
        seeds = [seed for seed in seeds if has_families(seed)]
    if arguments.seed is not None:
        seeds = [arguments.seed]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="simulation-")))
        url = os.environ.get("ORCHESTRATOR_TEST_DATABASE_URL")
        url = url or stack.enter_context(embedded.start(folder)).database_url
        store.migrate(url)
        prepare(url)
        for fault, *_ in KEPT:
            if fault.__name__ == arguments.fault:
                fault(stack.enter_context(pytest.MonkeyPatch.context()))
        sessions = Sessions()
        stack.callback(sessions.close)
        return hunt(seeds, url, folder, sessions, arguments)


def hunt(seeds: list[int], url: str, folder: Path, sessions: Sessions, arguments: argparse.Namespace) -> int:
    failed: list[int] = []
    happened: Counter[str] = Counter()
    states: Counter[str] = Counter()
    began = time.monotonic()
    for number, seed in enumerate(seeds, 1):
        empty(url)
        tell = print if arguments.verbose else None
        simulation = Simulation(seed, url, folder / "effects", sessions, tell, arguments.focus)
        verdict = simulation.play()
        if len(seeds) == 1:
            print(f"schedule {verdict.schedule}")
        happened += verdict.happened
        states += verdict.states
        if len(seeds) > 1 and number % 100 == 0:
            sessions.close()  # before there are more than the server takes
            print(f"{number} seeds in {time.monotonic() - began:.0f} s", flush=True)
        if verdict.broken:
            failed.append(seed)
            print(f"seed {seed}:", *verdict.broken, sep="\n    ", flush=True)
            if not arguments.keep_going:
                break
    missing = [name for name in sorted(MUST_HAPPEN) if not happened[name]]
    seconds = time.monotonic() - began
    print(f"{len(seeds)} seeds in {seconds:.1f} s; failed: {failed}")
    print(", ".join(f"{name} {count}" for name, count in sorted((happened + states).items()) if "once" not in name))
    print(f"did not happen: {missing}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
