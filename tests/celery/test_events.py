"""A real worker on a real broker tells of every step, as an event receiver and stock Flower see it."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from celery import Celery
from celery.events.state import State

from orchestrator import Orchestrator, SagaFailed
from orchestrator.celery import events
from orchestrator.machine.journal import AttemptEnded
from orchestrator.store.turns import Taken
from tests.celery import events_app
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
NODE = "teller@bank"
CANARY = "canary-4711"


def until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what}: not within {seconds} s")


class Bank:
    """The app in this process, a worker of it in another, and what an event receiver saw."""

    def __init__(self, database_url: str, broker_url: str, log: Path) -> None:
        self.database_url = database_url
        self.redis = redis.Redis.from_url(broker_url, socket_timeout=None)  # who watches may have to wait long
        self.log = log
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "CELERY_BROKER_URL": broker_url,
                            "ORCHESTRATOR_DATABASE_URL": database_url}  # fmt: skip
        self.sagas = events_app
        self.app = Celery("observed", broker=broker_url, set_as_current=False)
        Orchestrator(self.app, database_url=database_url)  # from now on the sagas start through it
        self.events: list[dict[str, Any]] = []
        self.state = State()

    @contextmanager
    def worker(self, *options: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        command = ["worker", "-c", "2", "-n", NODE, "-l", "INFO", "--without-mingle", *options]
        with self.process(*command, **environment) as process:
            until(lambda: f"{NODE} ready" in self.log.read_text(), "a worker that is ready")
            yield process

    @contextmanager
    def process(self, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        whole = [sys.executable, "-m", "celery", "-A", "tests.celery.events_app", *command]
        with self.log.open("ab") as sink:
            environment = {**self.environment, **environment}
            process = subprocess.Popen(whole, stdout=sink, stderr=sink, env=environment, cwd=ROOT)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receive events, as Flower does, until the block ends."""
        over, ready = threading.Event(), threading.Event()
        thread = threading.Thread(target=self._listen, args=(over, ready))
        thread.start()
        try:
            assert ready.wait(10)
            yield
        finally:
            over.set()
            thread.join()

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        """Collect every command that reaches the broker, until the block ends, however it ends."""
        commands: list[str] = []
        over = threading.Event()

        def watch() -> None:
            while not over.is_set():
                commands.append(monitor.next_command()["command"])

        with self.redis.monitor() as monitor:  # type: ignore[no-untyped-call]
            thread = threading.Thread(target=watch)
            thread.start()
            try:
                yield commands
            finally:
                over.set()
                self.redis.ping()  # a last command, so that the thread looks up
                thread.join()

    def _listen(self, over: threading.Event, ready: threading.Event) -> None:
        with self.app.connection_for_read() as connection:
            receiver = self.app.events.Receiver(connection, handlers={"*": self._receive})
            with receiver.consumer_context() as (open_one, _, _):
                ready.set()
                while not over.is_set():
                    try:
                        open_one.drain_events(timeout=0.1)
                    except TimeoutError:
                        continue

    def _receive(self, event: dict[str, Any]) -> None:
        self.events.append(dict(event))
        self.state.event(event)

    def sent(self, name: str) -> list[str]:
        """Return the types of the events about tasks of that name, in the order of their arrival."""
        return [event["type"] for event in list(self.events) if self.name_of(event) == name]

    def name_of(self, event: dict[str, Any]) -> str | None:
        task = self.state.tasks.get(event.get("uuid"))
        return task.name if task else None

    def settled(self, count: int) -> Callable[[], bool]:
        """Tell whether so many tasks have ended."""
        return lambda: sum(task.state in ("SUCCESS", "FAILURE") for task in list(self.state.tasks.values())) >= count

    def task_events(self) -> list[dict[str, Any]]:
        return [event for event in list(self.events) if event["type"].startswith("task-")]


@pytest.fixture
def bank(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Bank]:
    log = tmp_path / "log"
    log.touch()
    there = Bank(database_url, broker_url, log)
    yield there
    there.app.close()
    there.redis.close()


def test_every_step_is_told_under_its_own_name(bank: Bank) -> None:
    with bank.listening(), bank.worker("-E"):
        run = bank.sagas.visit.delay("hello")
        assert run.get(timeout=60) == "hello"
        until(bank.settled(4), "the events of four steps")
    tasks = {task.name: task for task in bank.state.tasks.values()}
    assert set(tasks) == {"bank.echo", "bank.book", "bank.legacy", "bank.flaky"}
    for task in tasks.values():
        assert (task.state, task.worker.hostname, task.root_id) == ("SUCCESS", NODE, run.id)
        assert (task.args, task.kwargs, task.result) == ("…", "…", "…")
        assert task.uuid.startswith(f"{run.id}:")
        assert 0 < task.runtime < 5
        assert task.received <= task.started <= task.succeeded
    assert tasks["bank.flaky"].retries == 2
    assert tasks["bank.echo"].retries == 0
    assert bank.sent("bank.echo") == ["task-received", "task-started", "task-succeeded"]
    once = ["task-received", "task-started"]
    assert bank.sent("bank.flaky") == [*once, "task-retried", *once, "task-retried", *once, "task-succeeded"]


def test_failures_and_undos_are_told(bank: Bank) -> None:
    with bank.listening(), bank.worker("-E"):
        run = bank.sagas.fail.delay("hello")
        with pytest.raises(SagaFailed):
            run.get(timeout=60)
        until(bank.settled(3), "the events of three steps")
    tasks = {task.name: task for task in bank.state.tasks.values()}
    states = {name: task.state for name, task in tasks.items()}
    assert states == {"bank.reserve": "SUCCESS", "bank.broken": "FAILURE", "bank.release": "SUCCESS"}
    assert tasks["bank.broken"].exception == "ValueError('…')"
    assert tasks["bank.broken"].retries == 2
    assert tasks["bank.release"].uuid == tasks["bank.reserve"].uuid + ":undo"


def test_a_long_step_is_told_while_it_runs(bank: Bank) -> None:
    with bank.listening(), bank.worker("-E"):
        run = bank.sagas.sit.delay("bench")
        until(lambda: bank.sent("bank.wait") == ["task-received", "task-started"], "a started step")
        bank.redis.rpush("bench", "go")
        assert run.get(timeout=60) == "bench"
        until(bank.settled(1), "the end of the step")
    assert bank.sent("bank.wait") == ["task-received", "task-started", "task-succeeded"]


def test_a_refused_outcome_is_not_told(bank: Bank) -> None:
    with bank.listening(), bank.worker("-E"):
        bank.sagas.sit.delay("bench")
        until(lambda: bank.sent("bank.wait") == ["task-received", "task-started"], "a started step")
        with psycopg.connect(bank.database_url) as connection:
            connection.execute("UPDATE orchestrator.work SET fence = 1 WHERE task = 'bank.wait'")
        bank.redis.rpush("bench", "go")
        until(lambda: "has lost its fence" in bank.log.read_text(), "the refusal")
        assert bank.sagas.chat.delay(3).get(timeout=60) == 3
        until(bank.settled(3), "the events of three later steps")
    assert bank.sent("bank.wait") == ["task-received", "task-started"]


def test_a_call_with_fewer_attempts_than_declared_fails_at_once(bank: Bank) -> None:
    with bank.listening(), bank.worker("-E"):
        with pytest.raises(SagaFailed):
            bank.sagas.once.delay("hello").get(timeout=60)
        until(bank.settled(1), "the events of the step")
    assert bank.sent("bank.broken") == ["task-received", "task-started", "task-failed"]


def test_payloads_are_told_if_that_is_set(bank: Bank) -> None:
    with bank.listening(), bank.worker("-E", ORCHESTRATOR_SHOW_PAYLOADS="true"):
        with pytest.raises(SagaFailed):
            bank.sagas.fail.delay(CANARY).get(timeout=60)
        until(bank.settled(3), "the events of three steps")
    tasks = {task.name: task for task in bank.state.tasks.values()}
    assert tasks["bank.reserve"].kwargs == f"{{'word': '{CANARY}'}}"
    assert tasks["bank.reserve"].result == f"'{CANARY}'"
    assert tasks["bank.broken"].exception == f"ValueError('cannot {CANARY}')"
    assert "in broken" in tasks["bank.broken"].traceback


def test_without_events_nothing_is_sent_until_somebody_asks(bank: Bank) -> None:
    with bank.listening(), bank.worker():
        assert bank.sagas.chat.delay(5).get(timeout=60) == 5
        bank.app.control.enable_events()

        def told() -> bool:
            bank.sagas.chat.delay(3).get(timeout=60)
            return bool(bank.task_events())

        asked = time.time()
        until(told, "events after they were enabled")
        bank.app.control.disable_events()
    assert min(event["timestamp"] for event in bank.task_events()) >= asked


def test_doorbells_and_payloads_are_nowhere_to_be_seen(bank: Bank) -> None:
    with bank.watching() as commands, bank.listening(), bank.worker("-E"):
        assert bank.sagas.visit.delay(CANARY).get(timeout=60) == CANARY
        with pytest.raises(SagaFailed):
            bank.sagas.fail.delay(CANARY).get(timeout=60)
        until(bank.settled(7), "the events of seven steps")
    lines = [line for line in bank.log.read_text().splitlines() if ": INFO/" in line]
    succeeded = [line for line in lines if "succeeded in" in line]
    assert len([line for line in succeeded if line.endswith(": …")]) == len(succeeded) == 6
    assert not [line for line in lines if "orchestrator.drain[" in line or CANARY in line]
    assert CANARY not in json.dumps(bank.events)
    assert "orchestrator.drain" not in {task.name for task in bank.state.tasks.values()}
    assert any("task.multi" in command for command in commands)
    assert not [command for command in commands if CANARY in command or CANARY in _decoded(command)]


def _decoded(command: str) -> str:
    """Return the bodies in a command that publishes messages."""
    text = ""
    for part in command.replace("\\", "").split('"body":')[1:]:
        body = part.strip().removeprefix('"').partition('"')[0]
        text += base64.b64decode(body).decode("utf-8", "replace")
    return text


def test_a_warm_shutdown_loses_no_event(bank: Bank) -> None:
    with bank.listening():
        with bank.worker("-E"):
            assert bank.sagas.chat.delay(20).get(timeout=60) == 20
        until(bank.settled(20), "the events of twenty steps")


def test_events_go_on_after_the_broker_dropped_every_connection(bank: Bank) -> None:
    with bank.worker("-E"):
        assert bank.sagas.chat.delay(3).get(timeout=60) == 3
        bank.redis.client_kill_filter(_type="normal", skipme=True)
        with bank.listening():

            def told() -> bool:
                bank.sagas.chat.delay(3).get(timeout=60)
                return bool(bank.task_events())

            until(told, "events over a new connection")


def test_a_broker_that_does_not_answer_costs_a_step_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_shared", bytearray(b"\1" + bytes(15)))
    now = datetime.now(UTC)
    taken = Taken("r", 1, "echo#0", "do", "bank.echo", "celery", "bank.echo", 1, {"a": {"word": CANARY}}, 7, now, now)
    outcome = AttemptEnded(taken.key, taken.role, taken.attempt, "succeeded", CANARY)
    with socket.socket() as deaf, Celery("observed", set_as_current=False) as app:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        url = f"redis://127.0.0.1:{deaf.getsockname()[1]}/0"
        step_events = events.StepEvents(app, NODE, {"hostname": url})
        began = time.monotonic()
        for _ in range(5000):
            step_events.finish(step_events.begin(taken), taken, outcome)
        assert time.monotonic() - began < 10
        step_events.close()
        assert time.monotonic() - began < 15


def test_flower_lists_the_steps_by_name(bank: Bank) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/api/tasks"

    def listed() -> dict[str, Any]:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return dict(json.load(answer))
        except OSError:
            return {}

    flower = bank.process("flower", "--address=127.0.0.1", f"--port={port}", FLOWER_UNAUTHENTICATED_API="true")
    with bank.worker(), flower:  # Flower itself asks the worker for events

        def named() -> set[str]:
            with pytest.raises(SagaFailed):
                bank.sagas.fail.delay("hello").get(timeout=60)
            bank.sagas.visit.delay("hello").get(timeout=60)
            return {task["name"] for task in listed().values()}

        until(lambda: len(named()) >= 7, "seven kinds of steps in Flower", 60.0)
        tasks = list(listed().values())
    assert {task["name"] for task in tasks} == {
        "bank.echo", "bank.book", "bank.legacy", "bank.flaky", "bank.reserve", "bank.broken", "bank.release",
    }  # fmt: skip
    assert {task["worker"] for task in tasks} == {NODE}
    assert "SUCCESS" in {task["state"] for task in tasks if task["name"] == "bank.flaky"}
    assert "FAILURE" in {task["state"] for task in tasks if task["name"] == "bank.broken"}


def test_flower_starts_a_saga_and_answers_with_its_run(bank: Bank) -> None:
    """Who gets an error for an answer asks again, and starts another run."""
    port = free_port()

    def post(how: str) -> dict[str, Any]:
        url = f"http://127.0.0.1:{port}/api/task/{how}/{bank.sagas.visit.name}"
        try:
            with urllib.request.urlopen(url, json.dumps({"args": ["hello"]}).encode(), timeout=60) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            return {"error": error.code}
        except OSError:
            return {}

    flower = bank.process("flower", "--address=127.0.0.1", f"--port={port}", FLOWER_UNAUTHENTICATED_API="true")
    with bank.worker(), flower:
        began = until(lambda: post("async-apply"), "an answer of Flower", 60.0)
        waited = post("apply")
        assert (began.get("error"), waited.get("error")) == (None, None)
        result = bank.sagas.visit.AsyncResult(began["task-id"])
        assert result.get(timeout=60) == result.result == waited["result"] == "hello"
    assert began["state"] in ("pending", "running", "completed")
    assert (waited["state"], result.traceback) == ("completed", None)
