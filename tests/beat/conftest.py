"""Beats as real processes on a database and a broker of the test's own, and what they left there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from tests.acceptance.running import ROOT, until
from tests.faults.rabbitmq import RabbitMQ

WITHIN_S = 200.0
REPORT = "tests.beat.app.report"
EVERY_SECOND = timedelta(seconds=1)


class Beat:
    """One `celery beat`, with the scheduler that the app has by default."""

    def __init__(self, log: Path, environment: dict[str, str], *options: str) -> None:
        self.log = log
        command = [sys.executable, "-m", "celery", "-A", "tests.beat.app", "beat", "-l", "INFO", "--pidfile", ""]
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [*command, *options], stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, cwd=ROOT, env=environment
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(10.0)

    def stop(self) -> int:
        """End it as a supervisor does; returns its exit code."""
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        return self.process.wait(20.0)


@dataclass
class Hall:
    """Where beats live; `entries` is the beat_schedule that they all have."""

    database_url: str
    broker_url: str
    folder: Path
    entries: dict[str, Any] = field(default_factory=dict)
    beats: list[Beat] = field(default_factory=list)

    def start(self, *options: str, **environment: str) -> Beat:
        """Start one more beat."""
        surroundings = {
            **os.environ, "ORCHESTRATOR_DATABASE_URL": self.database_url, "CELERY_BROKER_URL": self.broker_url,
            "PYTHONPATH": str(ROOT), "BEATS": json.dumps(self.entries), **environment,
        }  # fmt: skip
        log = self.folder / f"beat-{len(self.beats) + 1}.log"
        self.beats.append(Beat(log, surroundings, *options))
        return self.beats[-1]

    # -- what is in the database and the broker ------------------------------------------------------------------------
    def sql(self, query: str, *values: Any) -> list[Any]:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            cursor = connection.execute(query, values)
            return cursor.fetchall() if cursor.description else []

    def until_leads(self, *, but: Beat | None = None) -> Beat:
        """Wait until a beat leads, one that is not `but`; returns it."""

        def look() -> Beat | None:
            rows = self.sql("SELECT split_part(holder, ' ', 2) FROM orchestrator.leaders WHERE holder <> ''")
            pids = {int(pid) for (pid,) in rows}
            return next((beat for beat in self.beats if beat.process.pid in pids and beat is not but), None)

        return self.until(look, "a leader")

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        try:
            return until(condition, what, WITHIN_S)
        except AssertionError as error:
            raise AssertionError("\n".join([str(error), *(beat.said[-3000:] for beat in self.beats)])) from error

    def slots(self, name: str, *states: str) -> list[datetime]:
        """Return the slots of a schedule that are in one of these states, in order."""
        query = "SELECT slot FROM orchestrator.slots WHERE schedule = %s AND state = ANY (%s) ORDER BY slot"
        return [slot for (slot,) in self.sql(query, name, list(states or ("started", "sent")))]

    def until_more(self, name: str, more: int = 3) -> None:
        """Wait until a schedule has fired so many times more."""
        before = len(self.slots(name))
        self.until(lambda: len(self.slots(name)) >= before + more, f"{more} more slots of {name}")

    def messages(self) -> Counter[str]:
        """Return the ids of the messages in the broker's queue, each with how often it is there."""
        with redis.Redis.from_url(self.broker_url) as client:
            found: Any = client.lrange("celery", 0, -1)
            return Counter(json.loads(message)["headers"]["id"] for message in found)

    # -- what must be true ---------------------------------------------------------------------------------------------
    def judge(self, saga: str, plain: str = "", *, died: int = 0) -> None:
        """Every slot of every second has fired, once; a message more only for a sender that `died`.  Ends the beats."""
        ends = {beat.stop() for beat in self.beats if beat.is_alive}
        assert ends <= {0, -signal.SIGTERM}, "one that is only starting has no handler yet"
        for name in filter(None, (saga, plain)):
            slots = self.slots(name)
            assert slots == [slots[0] + n * EVERY_SECOND for n in range(len(slots))], f"{name}: {slots}"
        runs = self.sql("SELECT id FROM orchestrator.runs WHERE id LIKE %s ORDER BY id", f"beats/{saga}@%")
        wanted = self.sql("SELECT run_id FROM orchestrator.slots WHERE schedule = %s ORDER BY 1", saga)
        assert runs == wanted
        if plain:
            sent = self.messages()
            ids = {run_id for (run_id,) in self.sql("SELECT run_id FROM orchestrator.slots WHERE state = 'sent'")}
            assert ids <= sent.keys() and sent.total() - len(sent) <= died, f"{ids ^ sent.keys()} {sent}"

    def close(self) -> None:
        for beat in self.beats:
            if beat.is_alive:
                beat.signal(signal.SIGCONT)
                beat.signal(signal.SIGKILL)


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """A RabbitMQ of Debian's."""
    broker = RabbitMQ(tmp_path_factory.mktemp("rabbitmq"))
    yield broker
    broker.stop()


@pytest.fixture
def hall(database_url: str, broker_url: str, tmp_path: Path) -> Iterator[Hall]:
    """A hall whose beats have an entry that starts a saga and one that sends a task, each every second."""
    options = {"options": {"catch_up": "all"}}
    entries = {
        "saga": {"task": REPORT, "schedule": 1.0, **options},
        "plain": {"task": "beats.plain", "schedule": 1.0, **options},
    }
    made = Hall(database_url, broker_url, tmp_path, entries)
    yield made
    made.close()
