"""The database of the simulation: the engine's schema with a clock that the simulation moves.

Owns that database and how it is emptied between seeds.  Only the one function that tells the engine the time is
replaced.
"""

from __future__ import annotations

import psycopg

from tests.proof import effects

# A sequence, so that everybody sees the same time at once, whatever snapshot they have.
_CLOCK = """
CREATE SEQUENCE public.simulated_microseconds;
CREATE OR REPLACE FUNCTION orchestrator.now() RETURNS timestamptz LANGUAGE sql STABLE AS
    'SELECT timestamptz ''epoch'' + last_value * interval ''1 microsecond'' FROM public.simulated_microseconds';
"""
_EMPTY = """
TRUNCATE orchestrator.runs, orchestrator.journal, orchestrator.arrivals, orchestrator.work, orchestrator.incarnations,
    orchestrator.drainers, orchestrator.locks, orchestrator.gates, orchestrator.pauses, orchestrator.paused_runs,
    transactional_effects RESTART IDENTITY
"""


def prepare(database_url: str) -> None:
    """Give a migrated database the simulation's clock, and no more durability than a simulation needs."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(_CLOCK)
        connection.execute(effects.TABLE)
        name = psycopg.sql.Identifier(connection.info.dbname)
        for setting in ("synchronous_commit = off", "deadlock_timeout = '100ms'"):
            connection.execute(psycopg.sql.SQL(f"ALTER DATABASE {{}} SET {setting}").format(name))


def empty(database_url: str) -> None:
    """Forget what a seed left behind."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(_EMPTY)
