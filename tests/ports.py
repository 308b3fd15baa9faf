"""Ports for servers that tests start."""

from __future__ import annotations

from orchestrator.embedded.place import _port


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody uses now, and that the kernel gives to nobody before its server starts."""
    return _port(None, 0, taken=0)
