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
from orchestrator.store import filters, liveness, pauses, runs, schedules, turns
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


@saga.define(name="security.told")
async def told(text: str) -> str:
    async with saga.lock(text, text):
        return await saga.wait_signal(text, str)


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


def test_filters_take_any_text(
    client: Client, new_child: Callable[[], Child], connection: Connection, untouched: None
) -> None:
    """Every one by which runs are found: one that fits finds its run, one that does not finds none and harms none."""
    child = new_child()
    for text in TEXTS:
        options = {"task_id": f"run {text}", "queue": QUEUE, "tags": {"said": text, text: "x"}}
        client.start(asleep, ("x",), {}, options)
    child.drain()
    for text in TEXTS:
        for tags, expected in (({"said": text}, 1), ({text: "x"}, 1), ({text: text}, 0), ({"said": f"{text}!"}, 0)):
            for found in (filters.listing(tags=tags), filters.unfinished(tags=tags)):
                ids = [row["id"] for row in filters.listed(connection, found)]
                assert ids == [f"run {text}"] * expected
            assert client.bulk("cancel", tags=tags, dry_run=True).total == expected
        for wanted in (
            filters.listing(states=[text]),
            filters.listing(states=[text, "running"], saga=text),
            filters.unfinished(states=[text]),
            filters.unfinished(saga=text, parked=True),
        ):
            assert filters.listed(connection, wanted) == []
        assert client.bulk("terminate", saga=text, by=text, reason=text).total == 0
        assert client.bulk("retry", step=text, by=text, reason=text).total == 0
        assert client.bulk("skip", saga=asleep, step=text, tags={"said": text}, by=text).total == 0
        assert client.prune(timedelta(0), saga=text).total == 0
        with pytest.raises(UsageError):
            client.bulk("cancel", states=[text])
        with pytest.raises(UsageError):
            client.prune(timedelta(0), states=[text])
    assert count(connection) == len(TEXTS)
    assert {client.outcome(f"run {text}").state for text in TEXTS} == {"running"}


def test_signals_locks_and_pauses_are_named_by_any_text(
    client: Client, new_child: Callable[[], Child], connection: Connection, untouched: None
) -> None:
    child = new_child()
    results = {text: client.start(told, (text,), {}, {"queue": QUEUE, "task_id": f"run {text}"}) for text in TEXTS}
    child.drain()
    held = {name for (name,) in connection.execute("SELECT name FROM orchestrator.locks").fetchall()}
    assert len(held) == len(TEXTS)
    for text in TEXTS:
        for kind in ("saga", "queue"):
            assert client.pause(**{kind: text}, by=text, reason=text)
            assert not client.pause(**{kind: text}, by=text, reason=text)
            assert [(p.name, p.by, p.reason) for p in pauses.listed(connection) if not p.lifted] == [(text,) * 3]
            assert client.resume(**{kind: text}, by=text, reason=text)
            while pauses.untold(connection):
                pauses.tell(connection, text)
        assert client.signal(f"run {text}", text, text, text) == text
    child.drain()
    assert {text: result.get(timeout=60) for text, result in results.items()} == {text: text for text in TEXTS}
    assert count(connection, "locks") == count(connection, "pauses") == 0


def test_schedules_are_named_by_any_text(connection: Connection, untouched: None) -> None:
    since = schedules.clock(connection)
    for app in TEXTS:
        schedules.declare(connection, app, [schedules.Declared(text, text, text, text) for text in TEXTS], since)
    for text in TEXTS:
        assert schedules.lead(connection, text, text, timedelta(seconds=1)) is not None
        schedules.note_problem(connection, text, text, text)
        assert schedules.pause(connection, text, text, text, text)
        assert schedules.decide(
            connection, text, text, since, origin="trigger", state="skipped", run_id=text, because=text
        )
        assert set(schedules.standing(connection, text)) == set(TEXTS)
        (paused,) = [row for row in schedules.listing(connection, text) if row["paused_at"] is not None]
        assert (paused["name"], paused["problem"]) == (text, text)
        assert schedules.resume(connection, text, text, catch_up=False)
        schedules.resign(connection, text, text)
    assert count(connection, "schedules") == len(TEXTS) ** 2
    assert count(connection, "slots") == len(TEXTS)


def test_the_command_line_passes_any_text_on(database_url: str, untouched: None) -> None:
    """Every command that takes a name, all of them in one process."""
    run = ["show", "history", "explain", "cancel", "terminate", "retry", "skip", "resolve"]
    commands = [[command, text] for text in TEXTS for command in run if not text.startswith("-")]
    commands += [["list", "--saga", text, "--json"] for text in TEXTS]
    commands += [["list", "--where", f"{text}={text}", "--json"] for text in TEXTS]
    commands += [["start", text, "[]"] for text in TEXTS]
    for text in TEXTS:
        commands += [["list", "--state", text], ["signal", "--id", text, "--", text, text, '"x"'],
                     ["pause", "--", text], ["resume", "--queue", text], ["bulk", "cancel", "--state", text, "--yes"],
                     ["prune", "--older-than", text], ["schedules", "pause", "--", text],
                     ["schedules", "trigger", "--", text]]  # fmt: skip
    empty = [["bulk", "cancel", f"--{name}", f"{text}=" if name == "where" else text, "--yes", "--json"]
             for text in TEXTS for name in ("saga", "step", "where")]  # fmt: skip
    empty += [["prune", "--older-than", "1d", "--saga", text, "--json"] for text in TEXTS]
    commands += empty
    environment = {**os.environ, "ORCHESTRATOR_DATABASE_URL": database_url, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.commands"], input=json.dumps(commands), capture_output=True, text=True,
        cwd=ROOT, env=environment, timeout=100, check=True,
    )  # fmt: skip
    answers = [(command, code, said) for command, (code, said) in zip(commands, json.loads(done.stdout), strict=True)]
    done_well = [a for a in answers if (a[0][0] == "list" and "--json" in a[0]) or a[0] in empty]
    refused = [a for a in answers if a not in done_well and a[0][0] != "resume"]  # which says that nothing is paused
    odd = [a for a in refused if a[1] not in (1, 2)] + [a for a in answers if "Traceback" in a[2]]
    assert odd == []
    assert {(code, said) for command, code, said in done_well if command[0] == "list"} == {(0, "[]\n")}
    assert {(code, _total(said)) for command, code, said in done_well if command[0] != "list"} == {(0, 0)}


def _total(said: str) -> int:
    """Return how many runs an order has found, by the numbers of what it prints for programs."""
    told = json.loads(said)
    return int(told["total"])


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
