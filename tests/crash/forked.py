"""Something done with a database in a process of its own, which a failpoint may end or cut off."""

from __future__ import annotations

import os
from collections.abc import Callable

import psycopg

from orchestrator import failpoints
from orchestrator.failpoints import VARIABLE
from orchestrator.store.connection import Connection, open_connection

CUT = 3  # the exit code of who lost the connection


def in_a_process(database_url: str, do: Callable[[Connection], object], points: str = "") -> int:
    """Do it with a connection in a forked process; returns its exit code."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            failpoints.arm({VARIABLE: points})
            with open_connection(database_url, name="forked") as connection:
                do(connection)
            code = 0
        except psycopg.OperationalError:
            code = CUT
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
