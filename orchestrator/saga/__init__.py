"""Sagas: durable async functions, and what their code may ask for.

Owns the authors' side of a run: `define` declares a saga, the other functions are called inside one.  Must never touch
the database or the clock: requests go to the deterministic loop that runs the saga.
"""

from orchestrator.saga.blocks import lock, scope
from orchestrator.saga.declare import Saga, define, registry
from orchestrator.saga.face import progress, publish, tag
from orchestrator.saga.facts import Info, info, random, uuid4, version
from orchestrator.saga.family import child, continue_as_new
from orchestrator.saga.mapping import MapSummary, map
from orchestrator.saga.signals import wait_signal
from orchestrator.saga.steps import once, step
from orchestrator.saga.timing import as_completed, now, sleep, sleep_until, wait

__all__ = [
    "Info", "MapSummary", "Saga", "as_completed", "child", "continue_as_new", "define", "info", "lock", "map", "now",
    "once", "progress", "publish", "random", "registry", "scope", "sleep", "sleep_until", "step", "tag", "uuid4",
    "version", "wait", "wait_signal",
]  # fmt: skip
