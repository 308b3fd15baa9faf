"""Whoever can write to the broker can start what may be started by message, and nothing else.

What is no message at all, or cannot be decoded, is the guard's: see ``tests/celery/test_guard.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.acceptance.running import until
from tests.security.worker import Site, message

NAME = "security.repeat"
SECRET = "s3cret-payload"
EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def call(*args: Any, **kwargs: Any) -> list[Any]:
    return [list(args), kwargs, EMBED]


# Well-formed messages of Celery that must start nothing: each costs one line that does not show what they held.
REFUSED: dict[str, dict[str, Any]] = {
    "no argument": message(NAME, call()),
    "too many arguments": message(NAME, call(SECRET, 1, 2)),
    "an unknown argument": message(NAME, call(SECRET, sudo=True)),
    "an argument twice": message(NAME, call(SECRET, text=SECRET)),
    "an argument of another type": message(NAME, call(SECRET, times=SECRET)),
    "a table for a text": message(NAME, call({"text": SECRET})),
    "NUL": message(NAME, call(f"{SECRET}\0")),
    "a lone surrogate": message(NAME, json.dumps(call(f"{SECRET}\ud800")).encode()),
    "a text over the limit": message(NAME, call(SECRET * 30_000)),
    "deeper than can be stored": message(NAME, b'[["x"], {"times": ' + b"[" * 150 + b"]" * 150 + b"}, {}]"),
    "a long integer": message(NAME, b'[["x"], {"times": ' + b"9" * 4400 + b"}, {}]"),
    "an id that is too long": message(NAME, call(SECRET), task_id="r" * 501),
    "headers over the limit": message(NAME, call(SECRET), note="x" * 20_000_000),
    "thousands of headers": message(
        NAME, call(SECRET), **{f"header {n} {'x' * 100}": "x" * 100 for n in range(100_000)}
    ),
}

FORGED = {
    "eta": "2001-01-01T00:00:00+00:00", "retries": 1000, "is_eager": True, "called_directly": True,
    "ignore_result": False, "delivery_info": {"routing_key": "elsewhere"}, "hostname": "elsewhere@there",
    "root_id": "another run", "parent_id": "another run", "task_name": "orchestrator.drain", "queue": "elsewhere",
    "priority": 99, "deadline": -1, "transaction": "default", "countdown": 1e300, "shadow": "orchestrator.drain",
    "stamps": {"run_id": "another"}, "stamped_headers": ["run_id"],
}  # fmt: skip


def test_no_message_starts_more_than_it_may(database_url: str, broker_url: str, tmp_path: Path) -> None:
    site = Site(database_url, broker_url, tmp_path / "log")
    with site.worker():
        site.push(message(NAME, call("good"), task_id="first"))
        assert site.ended("first") == "completed"
        for name, raw in REFUSED.items():
            already = len(site.complaints())
            site.push(raw)
            after = f"after {name}"
            site.push(message(NAME, call("good"), task_id=after))
            assert site.ended(after) == "completed", name
            assert len(site.complaints()) == already + 1, (name, site.complaints()[already:])
        assert set(site.runs()) == {"first", *(f"after {name}" for name in REFUSED)}
        assert site.process.poll() is None
    assert SECRET not in site.said


def test_what_a_header_says_changes_nothing(database_url: str, broker_url: str, tmp_path: Path) -> None:
    """A run has the queue, priority and deadline of its declaration, whatever a message says."""
    site = Site(database_url, broker_url, tmp_path / "log")
    forged = {"task": "security.other", "args": ["x"], "kwargs": {}, "options": {}}
    embed = {"callbacks": [forged], "errbacks": [forged], "chain": [forged], "chord": forged}
    with site.worker():
        site.push(message(NAME, call("plain"), task_id="plain"))
        site.push(message(NAME, [["forged"], {}, embed], task_id="forged", **FORGED))
        site.push(message("orchestrator.drain", [[SECRET, 1], {"run_id": "plain"}, embed], **FORGED))
        assert (site.ended("plain"), site.ended("forged")) == ("completed", "completed")
        columns = "SELECT DISTINCT saga, version, queue, priority, parent_id, deadline_at, state FROM orchestrator.runs"
        assert len(site.rows(columns)) == 1
        assert set(site.runs()) == {"plain", "forged"}
    assert site.complaints() == []
    assert SECRET not in site.said


def test_yesterdays_messages_do_nothing_again(database_url: str, broker_url: str, tmp_path: Path) -> None:
    site = Site(database_url, broker_url, tmp_path / "log")
    bell = message("orchestrator.drain", call(), expires="2001-01-01T00:00:00+00:00")
    start = message(NAME, call("once"), task_id="run")
    with site.worker():
        site.push(start)
        assert site.ended("run") == "completed"
        before = site.rows("SELECT * FROM orchestrator.runs"), site.rows("SELECT * FROM orchestrator.journal")
        for _ in range(10):
            site.push(bell)
            site.push(start)
        site.push(message(NAME, call("other input"), task_id="run"))
        site.push(message("security.other", call("once"), task_id="run"))
        site.push(message(NAME, call("last"), task_id="last"))
        assert site.ended("last") == "completed"
    after = (
        "SELECT * FROM orchestrator.runs WHERE id = 'run'",
        "SELECT * FROM orchestrator.journal WHERE run_id = 'run'",
    )
    assert before == (site.rows(after[0]), site.rows(after[1]))
    conflicts = [line for line in site.complaints() if "did not start" in line]
    assert len(conflicts) == len(site.complaints()) == 2


def test_both_doors_can_be_closed(database_url: str, broker_url: str, tmp_path: Path) -> None:
    site = Site(database_url, broker_url, tmp_path / "log", ORCHESTRATOR_ACCEPT_MESSAGES="doorbells")
    with site.worker():
        site.push(message(NAME, call(SECRET), task_id="run"))
        site.push(message("tests.security.sagas.repeat", call(SECRET), task_id="step"))
        site.rows(
            "SELECT FROM orchestrator.start_runs_1(%s, NULL)",
            json.dumps([{"id": "ours", "saga": "security.other", "version": 1, "input": {"text": "x"},
                         "queue": "celery", "priority": 0, "delay": 0}]),
        )  # fmt: skip
        assert site.ended("ours") == "completed"
        assert set(site.runs()) == {"ours"}
        until(lambda: site.said.count("was ignored: accept_messages") == 2, "both messages are seen")
    assert SECRET not in site.said
