"""No name, filter or reason is ever more than a text to the database."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import psycopg
import pytest
from psycopg import sql

from orchestrator import Effect, UnknownRunError, UsageError, saga, step, store
from orchestrator.client import Client
from orchestrator.saga import Saga, registry
from orchestrator.settings import Settings
from orchestrator.store import filters, liveness, runs, turns
from orchestrator.store.connection import Connection, open_connection
from tests.engine.stage import QUEUE, Child, entries
from tests.security.conftest import count
from tests.security.hostile import HOSTILE

ROOT = Path(__file__).parents[2]
TEXTS = list(HOSTILE.values())


@step(effect=Effect.NONE)
def echo(text: str) -> str:
    return text


@saga.define(name="security.named")
async def named(text: str) -> list[str]:
    """Use a text wherever saga code can name something."""
    said = await saga.step(echo.with_options(key=text), text)
    return [said, await saga.once(text, lambda: text)]


@saga.define(name="security.asleep")
async def asleep(text: str) -> str:
    await saga.sleep(timedelta(hours=1))
    return text


@saga.define(name="security.elsewhere")
async def elsewhere(text: str) -> str:
    return await saga.step(echo.with_options(queue=text), text)


@contextmanager
def called(text: str) -> Iterator[Saga[Any, Any]]:
    """A saga whose name is the text."""

    @saga.define(name=text)
    async def called(text: str) -> str:
        return text

    yield called
    del registry.sagas[text, 1]


def test_runs_and_steps_are_named_by_any_text(
    client: Client, new_child: Callable[[], Child], connection: Connection, untouched: None
) -> None:
    results = {text: client.start(named, (text,), {}, {"task_id": text, "queue": QUEUE}) for text in TEXTS}
    new_child().drain()
    for text, result in results.items():
        assert result.get(timeout=60) == [text, text]
        assert client.outcome(text).id == text
        keys = {entry["key"] for entry in entries(connection, text) if "key" in entry}
        assert any(text in key for key in keys), keys
        assert (
            filters.listed(connection, filters.listing(saga=text))
            == filters.listed(connection, filters.listing(parent=text))
            == []
        )
        assert runs.outcomes(connection, [f"{text}x"]) == {}
    assert len(filters.listed(connection, filters.listing(saga=named.name))) == len(TEXTS) == count(connection)


def test_sagas_are_named_by_any_text(
    client: Client, new_child: Callable[[], Child], connection: Connection, untouched: None
) -> None:
    with ExitStack() as declared:
        sagas = [declared.enter_context(called(text)) for text in TEXTS]
        results = [client.start(each, ("done",), {}, {"queue": QUEUE}) for each in sagas]
        new_child().drain()
        assert [result.get(timeout=60) for result in results] == ["done"] * len(TEXTS)
    for text in TEXTS:
        assert [row["saga"] for row in filters.listed(connection, filters.listing(saga=text))] == [text]


def test_queues_nodes_and_tasks_are_named_by_any_text(
    client: Client, new_child: Callable[[], Child], connection: Connection, untouched: None
) -> None:
    child = new_child()
    for text in TEXTS:
        client.start(elsewhere, (text,), {}, {"queue": QUEUE, "task_id": f"run {text}"})
        client.start(named, (text,), {}, {"queue": text, "task_id": f"waits {text}"})
    child.drain()
    for text in TEXTS:
        assert [work.queue for work in runs.outstanding(connection, f"run {text}")] == [text]
        incarnation = liveness.register(
            connection, node=text, host=text, pid=1, queues=[text], targets=child.targets, slots=1
        )
        assert liveness.due(connection, timedelta(milliseconds=100))[text] == 2
        assert runs.rings_needed(connection, text, 5) == 1
        taken = turns.take(
            connection, queues=[text], targets=[text, *child.targets], incarnation=incarnation, child=1,
            fences=[1, 2], reservation=timedelta(milliseconds=100), short=[text],
        )  # fmt: skip
        assert taken and {item.queue for item in taken} == {text}
        assert liveness.enter(connection, incarnation, 1, [text])
        assert text in {served.node for served in runs.serving(connection)}


def test_orders_carry_any_text(
    client: Client, new_child: Callable[[], Child], connection: Connection, untouched: None
) -> None:
    child = new_child()
    for text in TEXTS:
        client.start(asleep, ("x",), {}, {"task_id": f"run {text}", "queue": QUEUE})
    child.drain()
    for text in TEXTS:
        with pytest.raises(UsageError, match="is not parked"):
            client.operate(f"run {text}", "retry", text, by=text, reason=text)
        with pytest.raises(UnknownRunError):
            client.cancel(text)
        client.cancel(f"run {text}", reason=text, by=text)
    child.drain()
    for text in TEXTS:
        outcome = client.outcome(f"run {text}")
        assert outcome.state == "cancelled"
        assert outcome.error is not None and outcome.error["message"] == f"cancelled by {text}: {text}"


def test_the_command_line_passes_any_text_on(database_url: str, untouched: None) -> None:
    """Every command that takes a name, all of them in one process."""
    run = ["show", "history", "explain", "cancel", "terminate", "retry", "skip", "resolve"]
    commands = [[command, text] for text in TEXTS for command in run if not text.startswith("-")]
    commands += [["list", "--saga", text, "--json"] for text in TEXTS]
    commands += [["start", text, "[]"] for text in TEXTS]
    environment = {**os.environ, "ORCHESTRATOR_DATABASE_URL": database_url, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.commands"], input=json.dumps(commands), capture_output=True, text=True,
        cwd=ROOT, env=environment, timeout=100, check=True,
    )  # fmt: skip
    answers = [(command, code, said) for command, (code, said) in zip(commands, json.loads(done.stdout), strict=True)]
    odd = [a for a in answers if a[0][0] != "list" and (a[1] not in (1, 2) or "Traceback" in a[2])]
    assert odd == []
    assert {(code, said) for command, code, said in answers if command[0] == "list"} == {(0, "[]\n")}


@pytest.mark.parametrize("password", ["p@ss:/?#[]%27", "'; DROP TABLE canary; --", "a b&host=elsewhere"])
def test_a_database_and_its_role_may_be_called_anything(
    password: str, _postgres_url: str, new_child: Callable[[], Child]
) -> None:
    name = "we\"ird; DROP DATABASE postgres; -- '%s"
    role = 'ro"le; --'
    with psycopg.connect(_postgres_url, autocommit=True) as server:
        identifiers = sql.Identifier(name), sql.Identifier(role)
        server.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(identifiers[1], sql.Literal(password)))
        server.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(*identifiers))
        try:
            parts = urlsplit(_postgres_url)
            login = f"{quote(role, safe='')}:{quote(password, safe='')}"
            url = f"postgresql://{login}@{parts.hostname}:{parts.port}/{quote(name, safe='')}"
            assert store.migrate(url)
            client = Client(Settings.from_environment({}, database_url=url), lambda *_: None, lambda: QUEUE)
            assert client.start(named, ("x",), {}, {}).status == "pending"
            client.pool.close()
            with open_connection(url, name="test") as connection:
                assert connection.execute("SELECT current_database()::text, current_user::text").fetchone() == (
                    name,
                    role,
                )
        finally:
            server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(identifiers[0]))
            server.execute(sql.SQL("DROP ROLE {}").format(identifiers[1]))
