"""Serves the outside world until its standard input ends: ``python -m tasks.outside LOG [PORT]``."""

from __future__ import annotations

import sys
from pathlib import Path

from tasks.outside.server import Server


def main() -> None:
    """Say where it listens, then serve."""
    log, *port = sys.argv[1:]
    with Server(Path(log), *map(int, port)) as server:
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
