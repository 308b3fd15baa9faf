"""Databases that tests are lent: a copy of a template takes a third of a second, emptying a used one a hundredth.

Owns which one may be lent again: one that differs from its template in nothing but rows.
"""

from __future__ import annotations

import time
import uuid
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

_CONNECTED = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = %s"
# Whatever somebody made, changed or analyzed, and the rows that the migrations themselves have left.
_SHAPE = """
SELECT (SELECT sum(hashtextextended(concat_ws(' ', c.oid, relname, relnamespace, relkind, relpersistence, reloptions,
               relacl, relhastriggers, relrowsecurity), 0)) FROM pg_class c WHERE c.oid >= 16384),
    (SELECT sum(hashtextextended(a::text, 0)) FROM pg_attribute a WHERE attrelid >= 16384),
    (SELECT sum(hashtextextended(p::text, 0)) FROM pg_proc p WHERE oid >= 16384),
    (SELECT sum(hashtextextended(c::text, 0)) FROM pg_constraint c WHERE oid >= 16384),
    (SELECT sum(hashtextextended(t::text, 0)) FROM pg_trigger t WHERE oid >= 16384),
    (SELECT sum(hashtextextended(n::text, 0)) FROM pg_namespace n WHERE nspname !~ '^pg_'),
    (SELECT count(*) FROM pg_statistic WHERE starelid >= 16384),
    (SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()),
    (SELECT count(*) FROM pg_db_role_setting JOIN pg_database d ON d.oid = setdatabase
     WHERE datname = current_database())
"""
_FILLED = """
SELECT c.oid::regclass::text, pg_relation_size(c.oid) FROM pg_class c
WHERE c.oid >= 16384 AND relkind = 'r' AND pg_relation_size(c.oid) > 0 ORDER BY 1
"""
_COUNTED = "SELECT format('%I.%I', schemaname, sequencename) FROM pg_sequences WHERE last_value IS NOT NULL"


class Databases:
    """The databases of one server; every one that is lent has a name of its own, so that nobody finds it again."""

    def __init__(self, server_url: str, template: str) -> None:
        self._server_url, self._template = server_url, template
        self._spare: list[str] = []
        with psycopg.connect(self.url(template), autocommit=True) as connection:
            self._shape = connection.execute(_SHAPE).fetchone()
            self._kept = self._rows(connection)

    def url(self, name: str) -> str:
        """Return where a database is."""
        return urlsplit(self._server_url)._replace(path=f"/{name}").geturl()

    def lend(self) -> str:
        """Return the name of a database that is as the template."""
        name = f"test_{uuid.uuid4().hex}"
        if self._spare:
            self._execute("ALTER DATABASE {} RENAME TO {}", self._spare.pop(), name)
        else:
            self._execute("CREATE DATABASE {} TEMPLATE {}", name, self._template)
        return name

    def take_back(self, name: str) -> None:
        """Disconnect whoever is still there; keep the database for a next test, or drop it."""
        spare = f"spare_{uuid.uuid4().hex}"
        if self._is_left(name):
            self._execute("ALTER DATABASE {} RENAME TO {}", name, spare)
            if self._is_emptied(spare):
                self._spare.append(spare)
                return
            name = spare
        self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", name)

    def close(self) -> None:
        """Drop what was kept."""
        for name in self._spare:
            self._execute("DROP DATABASE {} WITH (FORCE)", name)

    def _is_left(self, name: str) -> bool:
        with psycopg.connect(self._server_url, autocommit=True) as connection:
            for _ in range(100):
                if connection.execute(_CONNECTED, [name]).fetchone() == (0,):
                    return True
                time.sleep(0.01)
        return False

    def _is_emptied(self, name: str) -> bool:
        """Take all rows out that the template does not have; False if more than rows has changed."""
        with psycopg.connect(self.url(name), autocommit=True) as connection:
            if connection.execute(_SHAPE).fetchone() != self._shape:
                return False
            filled = [table for table, _ in connection.execute(_FILLED).fetchall() if table not in self._kept]
            if filled:
                connection.execute(f"TRUNCATE {', '.join(filled)} RESTART IDENTITY".encode())
            for (sequence,) in connection.execute(_COUNTED).fetchall():
                connection.execute("SELECT setval(%s, 1, false)", [sequence])
            return self._rows(connection) == self._kept

    def _rows(self, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        """Return a sum of the rows of each table that is not empty."""
        tables = [table for table, _ in connection.execute(_FILLED).fetchall()]
        summed = "SELECT count(*), sum(hashtextextended(t::text, 0)) FROM "
        return {table: connection.execute(f"{summed}{table} t".encode()).fetchone() for table in tables}

    def _execute(self, statement: str, *names: str) -> None:
        with psycopg.connect(self._server_url, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))
