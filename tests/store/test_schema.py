"""The schema: made by migrations, the same as the tables in code, checked before anything uses it."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text

from orchestrator import SchemaError, StoreUnavailableError, store
from orchestrator.store import liveness
from orchestrator.store.connection import open_connection
from orchestrator.store.migration import _config
from orchestrator.store.tables import SCHEMA, metadata
from tests.acceptance.running import until


def test_the_tables_in_code_are_those_that_the_migrations_make(database_url: str) -> None:
    url = database_url.replace("postgresql://", "postgresql+psycopg://")
    # A user of the schema's name would have it as its default schema, which is then reflected without a name.
    engine = create_engine(url, connect_args={"options": "-c search_path=public"})
    with engine.connect() as connection:
        options = {"include_schemas": True, "version_table_schema": SCHEMA, "compare_type": True}
        found = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
        nullable = connection.execute(
            text("SELECT table_name, column_name, is_nullable FROM information_schema.columns WHERE table_schema = :s"),
            {"s": SCHEMA},
        ).all()
    engine.dispose()
    assert found == []
    known = {(table.name, column.name): column.nullable for table in metadata.tables.values() for column in table.c}
    made = {(table, column): null == "YES" for table, column, null in nullable}
    assert {name: null for name, null in made.items() if name in known} == known


def test_migrating_twice_changes_nothing(database_url: str) -> None:
    assert store.migrate(database_url) == []


def at_revision(database_url: str, revision: str) -> None:
    """Bring an empty database to the schema of an earlier release."""
    engine = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {SCHEMA}"))
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def test_lanes_take_over_what_is_outstanding(empty_database_url: str) -> None:
    at_revision(empty_database_url, "0008")
    with open_connection(empty_database_url, name="test") as connection:
        connection.execute("""
            INSERT INTO orchestrator.work (run_id, key, role, target, queue, due_at, fence, incarnation)
            VALUES ('r', '', 'turn', 's@1', 'q', now(), NULL, NULL), ('r', 'a', 'do', 't', 'q', now(), NULL, NULL),
                ('r', 'b', 'do', 't', 'q', now(), 7, 3), ('r2', 'b', 'undo', 't', 'q', now(), 8, 3)""")
        assert "0009" in store.migrate(empty_database_url)
        found = connection.execute(
            "SELECT run_id, lane = 0, key, role, fence, begun_by FROM orchestrator.work ORDER BY run_id, key"
        ).fetchall()
        lanes = connection.execute("SELECT DISTINCT run_id, lane FROM orchestrator.work").fetchall()
    assert found == [
        ("r", True, "", "turn", None, None), ("r", False, "a", "do", None, None), ("r", False, "b", "do", 7, 3),
        ("r2", False, "b", "undo", 8, 3),
    ]  # fmt: skip
    assert len(lanes) == 4


def test_a_run_that_is_started_while_lanes_come_keeps_its_turn(empty_database_url: str) -> None:
    at_revision(empty_database_url, "0008")
    waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE relation = 'orchestrator.work'::regclass AND NOT granted)"
    migrating = threading.Thread(target=store.migrate, args=[empty_database_url])
    with (
        open_connection(empty_database_url, name="client") as client,
        open_connection(empty_database_url, name="watcher") as watcher,
    ):
        with client.transaction():
            client.execute("INSERT INTO orchestrator.work (run_id, key, role, target, queue, due_at) "
                           "VALUES ('r', '', 'turn', 's@1', 'q', now())")  # fmt: skip
            migrating.start()
            until(lambda: watcher.execute(waits).fetchone() == (True,), "the migration waits for the start")
        migrating.join()
        assert watcher.execute("SELECT run_id, lane FROM orchestrator.work").fetchall() == [("r", 0)]


def test_who_might_use_the_table_of_work_may_do_so_with_lanes(empty_database_url: str) -> None:
    at_revision(empty_database_url, "0008")
    role = f"app-{uuid.uuid4().hex}"
    with open_connection(empty_database_url, name="test") as connection:
        connection.execute(f'CREATE ROLE "{role}"')
        try:
            connection.execute(f'GRANT SELECT, INSERT ON orchestrator.work TO "{role}"')
            connection.execute("GRANT SELECT ON orchestrator.work TO PUBLIC")
            store.migrate(empty_database_url)
            of_role = [f"has_table_privilege('{role}', 'orchestrator.work', '{what}')" for what in ("INSERT", "DELETE")]
            assert connection.execute(f"SELECT {', '.join(of_role)}").fetchone() == (True, False)
            of_all = "SELECT has_table_privilege('pg_monitor', 'orchestrator.work', 'SELECT')"
            assert connection.execute(of_all).fetchone() == (True,)
        finally:
            connection.execute(f'DROP OWNED BY "{role}"')
            connection.execute(f'DROP ROLE "{role}"')


def test_lanes_wait_until_workers_of_releases_before_are_stopped(empty_database_url: str) -> None:
    at_revision(empty_database_url, "0008")
    with open_connection(empty_database_url, name="test") as connection:
        me = liveness.register(connection, node="old@here", host="h", pid=1, queues=["q"], targets=[], slots=1)
        with pytest.raises(SchemaError, match=r"nothing was migrated: .* alive \(old@here\), .* stop them"):
            store.migrate(empty_database_url)
        assert liveness.declare_dead(connection, me)
    assert store.migrate(empty_database_url) == ["0009"]


def test_many_may_migrate_at_once(empty_database_url: str) -> None:
    applied: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: applied.append(store.migrate(empty_database_url)), daemon=True)
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(applied) == 4 and sorted(map(bool, applied)) == [False, False, False, True]


def test_a_missing_and_a_newer_schema_are_named(empty_database_url: str, database_url: str) -> None:
    with open_connection(empty_database_url, name="test") as empty, pytest.raises(SchemaError, match="saga migrate"):
        store.check(empty)
    with open_connection(database_url, name="test") as connection:
        store.check(connection)
        connection.execute("UPDATE orchestrator.alembic_version SET version_num = '9999'")
        with pytest.raises(SchemaError, match="newer"):
            store.check(connection)
        connection.execute("UPDATE orchestrator.alembic_version SET version_num = '0000'")
        with pytest.raises(SchemaError, match="saga migrate"):
            store.check(connection)
    with pytest.raises(SchemaError):
        store.migrate(database_url)


def test_without_a_database_a_migration_says_so() -> None:
    with pytest.raises(StoreUnavailableError, match="cannot be reached"):
        store.migrate("postgresql://me:s3cret@127.0.0.1:1/nothing")


@pytest.fixture
def visitor(empty_database_url: str) -> Iterator[str]:
    """URL of an empty database for a role that may connect to it, and nothing else."""
    role = f"visitor_{uuid.uuid4().hex}"
    with open_connection(empty_database_url, name="test") as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
        where = urlsplit(empty_database_url)
        database = where.path[1:]
        connection.execute(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC")
        connection.execute(f"GRANT CONNECT ON DATABASE {database} TO {role}")
        yield where._replace(netloc=f"{role}:x@{where.netloc.rpartition('@')[2]}").geturl()
        connection.execute(f"DROP OWNED BY {role} CASCADE")
        connection.execute(f"DROP ROLE {role}")


def test_a_role_that_may_make_no_schema_is_told_so(visitor: str) -> None:
    with pytest.raises(SchemaError, match="Postgres refuses: permission denied for database"):
        store.migrate(visitor)


def test_a_role_that_was_given_the_schema_can_migrate(visitor: str, empty_database_url: str) -> None:
    with open_connection(empty_database_url, name="test") as connection:
        connection.execute(f"CREATE SCHEMA {SCHEMA} AUTHORIZATION {urlsplit(visitor).username}")
    assert store.migrate(visitor)
    assert store.migrate(visitor) == []


def test_a_lock_that_cannot_be_had_is_no_database_that_cannot_be_reached(
    empty_database_url: str,
) -> None:
    database = urlsplit(empty_database_url).path[1:]
    with open_connection(empty_database_url, name="test") as connection:
        connection.execute(f"ALTER DATABASE {database} SET lock_timeout = '50ms'")
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(7091237)")
            with pytest.raises(StoreUnavailableError, match="a lock could not be had in time"):
                store.migrate(empty_database_url)
