"""Start companions in a thread while the main thread forks, as a worker does that replaces companion and pool child.

Run by its test as a process of its own, since it forks.  The companions are a shell that says that it lives, so that
there can be hundreds; prints how many have said so.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from celery.concurrency.prefork import TaskPool

from orchestrator.celery.companion import Config
from orchestrator.celery.worker import CompanionStep

_TIMES = 150
_WITHIN_S = 60.0


def main(folder: str) -> None:
    shell = Path(folder) / "shell"
    shell.write_text("#!/bin/sh\nread config\necho incarnation 1\nread end\n")
    shell.chmod(0o700)
    sys.executable = str(shell)
    app = SimpleNamespace(tasks={}, conf=SimpleNamespace(accept_content=["json"]))
    step = CompanionStep(SimpleNamespace(app=app, pool_cls=TaskPool, time_limit=None, soft_time_limit=None))
    nothing: dict[str, Any] = dict.fromkeys(field.name for field in fields(Config))
    step._config = Config(**nothing)
    step.exclude_forks()
    lived: list[int] = []

    def spawn() -> None:
        for _ in range(_TIMES):
            step._spawn()
            assert step._process is not None
            lived.append(step._process.pid)
            step._process.kill()
            step._process.wait()

    thread = threading.Thread(target=spawn, daemon=True)
    thread.start()
    children: list[tuple[int, int]] = []
    until = time.monotonic() + _WITHIN_S
    while thread.is_alive() and time.monotonic() < until:
        if len(children) < 40:
            children.append((_sleeper(), len(lived)))
        elif len(lived) > children[0][1] + 1:
            _end(children.pop(0)[0])
        else:
            time.sleep(0.005)  # whoever the thread waits for lives on, as a pool child does
    print(len(lived), flush=True)
    for child, _ in children:
        _end(child)
    os._exit(0)


def _sleeper() -> int:
    child = os.fork()
    if child == 0:
        time.sleep(2 * _WITHIN_S)
        os._exit(0)
    return child


def _end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
