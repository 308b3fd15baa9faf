"""A client process: does the loads that it is asked for on its standard input, and times them itself.

A process of its own for each side, so that its CPU time can be told from the others'.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def clocked() -> Iterator[dict[str, float]]:
    """Yield a dictionary that has the seconds when the block has ended."""
    clock: dict[str, float] = {}
    began = time.perf_counter()
    yield clock
    clock["seconds"] = time.perf_counter() - began


def waited(call: Callable[[], object]) -> float:
    """Return the seconds that a call took."""
    with clocked() as clock:
        call()
    return clock["seconds"]


def effect(run: int, number: int) -> None:
    """Leave a mark in the effect log; one write, whoever else writes."""
    log = os.open(os.environ["BENCH_EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(log, f"{run} {number}\n".encode())
    finally:
        os.close(log)


def main() -> None:
    loads = importlib.import_module(sys.argv[1]).LOADS
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = loads[asked.pop("load")](**asked)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
