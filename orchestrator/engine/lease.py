"""The life of a worker start: its incarnation, renewed until the process ends.

Owns the living half of rule 6.  A worker that starts declares dead the earlier incarnations of its node on its host
whose processes are gone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from orchestrator.failpoints import failpoint
from orchestrator.store import liveness
from orchestrator.store.connection import Connection


def host_name() -> str:
    """Return the name of this host as incarnations carry it; the boot id tells containers and reboots apart."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()[:8]
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}".strip()


def is_alive(pid: int) -> bool:
    """Tell whether a process of this host is there; one that we may not signal is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def begin_life(
    connection: Connection, *, node: str, pid: int, queues: Sequence[str], targets: Sequence[str], slots: int
) -> tuple[int, list[str]]:
    """Register this worker start; returns its incarnation and the queues to ring for what its dead forerunners held."""
    host = host_name()
    rings: list[str] = []
    for earlier, _, its_node, its_host, its_pid in liveness.alive(connection):
        gone = its_pid != pid and its_node == node and its_host == host and not is_alive(its_pid)
        if gone and liveness.declare_dead(connection, earlier):
            failpoint("life.buried", connection)
            rings += liveness.give_back_gone(connection, earlier)
            failpoint("life.inherited", connection)
    incarnation = liveness.register(
        connection, node=node, host=host, pid=pid, queues=queues, targets=targets, slots=slots
    )
    return incarnation, rings
