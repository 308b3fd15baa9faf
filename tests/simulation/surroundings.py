"""What the engine finds around it while a seed is played: clocks, sleep, connections, a process table, a log.

Owns what is put in the place of the real thing, and that it is taken away again.  No part of the engine is replaced.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from orchestrator.celery import companion
from orchestrator.engine import advance, attempts, cache, drain, lead, lease, pump, session
from orchestrator.store.connection import Patient
from tests.simulation import steps
from tests.simulation.scheduler import current

if TYPE_CHECKING:
    from tests.simulation.world import Simulation

_connect = psycopg.connect
_declared = importlib.import_module("orchestrator.step")  # the package has a decorator of that name


class _Log(logging.Handler):
    """An error in the log of the engine says that something happened which nobody foresaw."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation

    def emit(self, record: logging.LogRecord) -> None:
        self._simulation.scheduler.tell(f"{record.name}: {record.getMessage()}")
        if record.levelno >= logging.ERROR and record.name.startswith("orchestrator"):
            error = record.exc_info[1] if record.exc_info else None
            self._simulation.broke(f"logged: {record.getMessage()} {error!r}")


@contextmanager
def surrounded(simulation: Simulation) -> Iterator[None]:
    """Put the engine into the simulation."""
    scheduler = simulation.scheduler

    def connect(*args: Any, **kwargs: Any) -> Any:
        return _connect(*args, **kwargs) if current() is None else simulation.network.connect(*args, **kwargs)

    def monotonic() -> float:
        return scheduler.monotonic

    def kill(pid: int, signal: int) -> None:
        for node in simulation.nodes:
            for child in list(node.children):
                if child.pid == pid:
                    node.kill_child(child)

    time = SimpleNamespace(monotonic=monotonic, sleep=scheduler.wait)
    with pytest.MonkeyPatch.context() as patch, _log(simulation):
        for module, name, value in (
            (psycopg, "connect", connect),
            (Patient, "connect", connect),
            (attempts, "time", time),
            (advance, "time", time),
            (drain, "time", time),
            (drain, "_LEADS_FROM", 4),  # few runs are many here
            (session, "time", time),
            (lead, "time", time),
            (cache, "monotonic", monotonic),
            (pump, "monotonic", monotonic),
            (companion, "monotonic", monotonic),
            (companion, "is_alive", simulation.pids.__contains__),
            (companion, "_is_process", simulation.pids.__contains__),
            (companion, "os", SimpleNamespace(kill=kill, path=os.path)),
            (lease, "is_alive", simulation.pids.__contains__),
            (_declared, "_router", lambda name: ""),
            (_declared, "_routes", {}),
        ):
            patch.setattr(module, name, value)
        steps.use(simulation.provider)
        yield


@contextmanager
def _log(simulation: Simulation) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("orchestrator", "psycopg", "sqlalchemy")]
    handler, propagate = _Log(simulation), [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagates in zip(loggers, propagate, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagates
