"""Runs of every kind on a fresh database, played by a worker's child."""

from tests.engine.conftest import child, connection, new_child

__all__ = ["child", "connection", "new_child"]
