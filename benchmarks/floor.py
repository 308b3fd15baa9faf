"""The floor: what the database does if nothing but one insert and one commit is asked of it for each step."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from statistics import median
from typing import Any

import psycopg

_FORK = multiprocessing.get_context("fork")


def sagas_per_second(url: str, sagas: int, connections: int) -> float:
    """Commit three times for each saga, over so many connections, each with a process of its own."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS floor")
        connection.execute("CREATE TABLE floor (id bigserial PRIMARY KEY, entry json)")
    together, times = _FORK.Barrier(connections), _FORK.SimpleQueue()
    share = max(1, sagas * 3 // connections)
    writers = [_FORK.Process(target=_commit, args=(url, share, together, times)) for _ in range(connections)]
    for writer in writers:
        writer.start()
    spans: list[tuple[float, float]] = [times.get() for _ in writers]
    for writer in writers:
        writer.join(60.0)
    return share * connections / 3 / (max(end for _, end in spans) - min(begin for begin, _ in spans))


def _commit(url: str, count: int, together: Any, times: Any) -> None:
    with psycopg.connect(url, autocommit=True, prepare_threshold=0) as connection:
        _insert(connection, 20)  # the catalog's caches, and the prepared statement
        together.wait(30.0)
        began = time.monotonic()
        _insert(connection, count)
        times.put((began, time.monotonic()))


def _insert(connection: psycopg.Connection[Any], count: int) -> None:
    for _ in range(count):
        connection.execute("INSERT INTO floor (entry) VALUES (%s)", ['{"a": "succeeded"}'])


def fdatasync_ms(folder: str) -> float:
    """Return the median time to write and sync 8 KiB in a folder, in milliseconds."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        return median(_synced(file.fileno()) for _ in range(200)) * 1000


def _synced(file: int) -> float:
    os.pwrite(file, os.urandom(8192), 0)
    began = time.perf_counter()
    os.fdatasync(file)
    return time.perf_counter() - began


def commit_ms(url: str) -> float:
    """Return the median time of one insert with its commit, in milliseconds."""
    with psycopg.connect(url, autocommit=True, prepare_threshold=0) as connection:
        connection.execute("DROP TABLE IF EXISTS commits")
        connection.execute("CREATE TABLE commits (id int)")
        times = []
        for number in range(300):
            began = time.perf_counter()
            connection.execute("INSERT INTO commits VALUES (%s)", [number])
            times.append(time.perf_counter() - began)
    return median(times) * 1000
