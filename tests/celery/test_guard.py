"""A real worker on a real broker meets every poison that we know, and answers the next good task."""

from __future__ import annotations

import base64
import bz2
import json
import logging
import lzma
import os
import struct
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import amqp
import kombu
import pytest
import redis
from celery.worker.consumer import Consumer as Stock
from kombu import compression
from kombu.asynchronous import Hub
from kombu.exceptions import DecodeError
from kombu.transport import pyamqp

from orchestrator.celery import guard, wire

SECRET = "s3cret-payload"
ROOT = Path(__file__).parents[2]
CALL: Any = [[1, SECRET], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]


def until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what}: not within {seconds} s")


class Site:
    """A broker, and the log and process of a worker on it."""

    def __init__(self, url: str, log: Path, **environment: str) -> None:
        self.redis = redis.Redis.from_url(url)
        self.log = log
        self.environment = {**os.environ, "CELERY_BROKER_URL": url, "PYTHONPATH": str(ROOT), **environment}
        self.process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def worker(self) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "celery", "-A", "tests.celery.guard_app", "worker"]
        command += ["-P", "prefork", "-c", "1", "-l", "WARNING", "--without-mingle"]
        with self.log.open("ab") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=sink, env=self.environment, cwd=ROOT)
        try:
            yield process
        finally:
            process.kill()  # its children die with it
            process.wait()

    def push(self, raw: Any) -> None:
        self.redis.lpush("celery", raw if isinstance(raw, bytes) else json.dumps(raw))

    def result(self, task_id: str) -> Any:
        stored = until(lambda: self.redis.get(f"celery-task-meta-{task_id}"), f"result of {task_id}")
        return json.loads(stored)

    def ask(self, name: str = "add", body: Any = ((2, 3), {}, {}), **headers: Any) -> Any:
        raw = envelope(body, task=name, **headers)
        self.push(raw)
        return self.result(raw["headers"]["id"])

    def has_complained(self, times: int) -> bool:
        return len(self.complaints()) == times

    def complaints(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if "WARNING" in line or "ERROR" in line
                or "CRITICAL" in line or "Traceback" in line]  # fmt: skip


def envelope(body: Any = CALL, **headers: Any) -> dict[str, Any]:
    plain = body if isinstance(body, bytes) else json.dumps(body).encode()
    task_id = uuid.uuid4().hex
    return {
        "body": base64.b64encode(plain).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": "note", "id": task_id, "retries": 0, **headers},
        "properties": {
            "correlation_id": task_id,
            "reply_to": "",
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "celery"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": uuid.uuid4().hex,
        },
    }


def changed(path: str, value: Any, body: Any = CALL) -> dict[str, Any]:
    raw = envelope(body)
    *parents, last = path.split("/")
    place: Any = raw
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return raw


def protocol_1(**fields: Any) -> dict[str, Any]:
    body = {"task": "note", "id": uuid.uuid4().hex, "args": [SECRET], "kwargs": {}, **fields}
    return {**envelope(body), "headers": {}}


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


BOMB = b" " * 64 * 1024 * 1024
FORGED = {"task": "note", "args": 5, "kwargs": {}, "options": {}}

POISONS: dict[str, Any] = {
    # the envelope
    "no JSON": b"\xff\xfe" + SECRET.encode(),
    "empty list": [],
    "a number": b"7",
    "deep envelope": deep(100_000),
    "huge integer": b"1" * 5000,
    "unknown kombu type": {"__type__": ["x"], "__value__": 1},
    "no properties": changed("properties", ...),
    "properties a list": changed("properties", []),
    "no delivery info": changed("properties/delivery_info", ...),
    "no delivery tag": changed("properties/delivery_tag", ...),
    "delivery tag a table": changed("properties/delivery_tag", {}),
    "delivery tag true": changed("properties/delivery_tag", True),
    "lone surrogate tag": changed("properties/delivery_tag", "\ud800"),
    "no exchange": changed("properties/delivery_info/exchange", ...),
    "unknown body encoding": changed("properties/body_encoding", "rot13"),
    "broken base64": changed("body", "abc"),
    "headers a list": changed("headers", [SECRET]),
    "headers a text": changed("headers", SECRET),
    "body a number": changed("body", 5),
    # the body
    "no headers": changed("headers", {}),
    "no body": changed("body", ...),
    "pickle": changed("content-type", "application/x-python-serialize"),
    "yaml": changed("content-type", "application/x-yaml"),
    "raw bytes": changed("content-type", "application/data"),
    "content type a list": changed("content-type", ["application/json"]),
    "content encoding a number": changed("content-encoding", 8),
    "body a text": envelope(SECRET),
    "body an int": envelope(42),
    "body null": envelope(None),
    "body of two": envelope([[], {}]),
    "body of four": envelope([[], {}, {}, {}]),
    "body a map of three": envelope({"a": 1, "b": 2, "c": 3}),
    "args a text": envelope([SECRET, {}, {}]),
    "kwargs a list": envelope([[], [], {}]),
    "embed a list": envelope([[], {}, [1]]),
    "deep body": envelope(deep(100_000)),
    "deep argument": envelope(b"[[" + deep(500) + b"], {}, {}]"),
    "huge integer argument": envelope(b"[[" + b"9" * 5000 + b"], {}, {}]"),
    "not UTF-8": envelope(b'[["\xff"], {}, {}]'),
    "large body": envelope([["x" * 2_000_000], {}, {}]),
    # compression
    "gzip bomb": envelope(zlib.compress(BOMB), compression="application/x-gzip"),
    "bz2 bomb": envelope(bz2.compress(BOMB), compression="bzip2"),
    "lzma bomb": envelope(lzma.compress(BOMB), compression="xz"),
    "gzip cut short": envelope(zlib.compress(b"[[], {}, {}]")[:-6], compression="gzip"),
    "unknown compression": envelope(compression="zip"),
    "compression a list": envelope(compression=["gzip"]),
    # the headers
    "no id": changed("headers/id", ...),
    "id a number": changed("headers/id", 5),
    "id a list": changed("headers/id", []),
    "id with NUL": changed("headers/id", "a\0b"),
    "id with a lone surrogate": changed("headers/id", "a\ud800"),
    "task a list": changed("headers/task", ["note"]),
    "task null": changed("headers/task", None),
    "task a table": changed("headers/task", {}),
    "task with a line break": changed("headers/task", "note\nERROR forged line"),
    "shadow a table": envelope(shadow={"a": SECRET}),
    "eta rubbish": envelope(eta="tomorrow"),
    "eta a number": envelope(eta=5),
    "eta empty": envelope(eta=""),
    "eta at the end of time": envelope(eta="9999-12-31T23:59:59-12:00"),
    "expires rubbish": envelope(expires="soon"),
    "expires a table": envelope(expires={}),
    "expires at the end of time": envelope(expires="9999-12-31T23:59:59-12:00"),
    "expires in year 1": envelope(expires="0001-01-01T00:00:00+12:00"),
    "timelimit a text": envelope(timelimit="ab"),
    "timelimit of three": envelope(timelimit=[1, 2, 3]),
    "timelimit of texts": envelope(timelimit=["a", "b"]),
    "timelimit not a number": envelope(timelimit=[float("nan"), None]),
    "timelimit infinite": envelope(timelimit=[None, float("inf")]),
    "retries a text": envelope(retries="3"),
    "stamps a list": envelope(stamped_headers=["a"], stamps=[1]),
    "stamped headers of lists": envelope(stamped_headers=[[1]], stamps={}),
    "reply address a table": changed("properties/reply_to", {}),
    "correlation id a list": changed("properties/correlation_id", [1]),
    # callbacks
    "embed beyond its names": envelope([[], {}, {"id": "x", "delivery_info": None}]),
    "callbacks a text": envelope([[], {}, {"callbacks": SECRET}]),
    "callbacks of texts": envelope([[], {}, {"callbacks": [SECRET]}]),
    "errbacks forged": envelope([[], {}, {"errbacks": [FORGED]}]),
    "chain forged": envelope([[], {}, {"chain": [FORGED]}]),
    "chord a list": envelope([[], {}, {"chord": [FORGED]}]),
    # protocol 1
    "protocol 1 without id": protocol_1(id=None),
    "protocol 1 kwargs a list": protocol_1(kwargs=[]),
    "protocol 1 args a text": protocol_1(args="abc"),
    "protocol 1 task a list": protocol_1(task=["note"]),
    "protocol 1 callbacks a text": protocol_1(callbacks="abc"),
    "ring by protocol 1": protocol_1(task="ring", args=[]),
}


def test_every_poison_costs_one_line_and_the_worker_lives(broker_url: str, tmp_path: Path) -> None:
    site = Site(broker_url, tmp_path / "log")
    with site.worker() as process:
        site.ask()
        already = len(site.complaints())
        wrong = []
        for name, raw in POISONS.items():
            site.push(raw)
            assert site.ask()["result"] == 5, name
            lines = site.complaints()[already:]
            already += len(lines)
            if len(lines) != 1 or not ("Refused a message" in lines[0] or "Dropped" in lines[0]):
                wrong.append((name, lines))
        assert wrong == []
        assert process.poll() is None
        until(lambda: not site.redis.hlen("unacked"), "nothing left unacknowledged")
    assert SECRET not in site.log.read_text()
    assert not any(line.startswith("ERROR forged") for line in site.log.read_text().splitlines())
    assert site.redis.llen("noted") == 0
    assert site.redis.llen("celery") == 0


def test_broadcast_poisons_cost_one_line_too(broker_url: str, tmp_path: Path) -> None:
    site = Site(broker_url, tmp_path / "log")
    channel = f"/{urlsplit(broker_url).path.strip('/') or 0}.celeryev/worker.heartbeat"
    poisons = [b"[]", deep(100_000), *(json.dumps(envelope(body)).encode() for body in (5, [1], "x"))]
    with site.worker() as process:
        site.ask()
        for number, raw in enumerate(poisons, start=1):
            until(partial(site.redis.publish, channel, raw), "the worker listens")
            until(partial(site.has_complained, number), f"one line for {raw[:20]!r}")
        assert site.ask()["result"] == 5
        assert process.poll() is None
    assert all("Dropped" in line for line in site.complaints())


def test_own_tasks_ignore_what_the_message_embeds(broker_url: str, tmp_path: Path) -> None:
    site = Site(broker_url, tmp_path / "log")
    good = {"task": "note", "args": [], "kwargs": {}, "options": {}}
    forged = {"callbacks": [good], "errbacks": [good], "chain": [good], "chord": good}
    with site.worker():
        answer = site.ask("ring", [[], {}, forged], timelimit=[0.001, 0.001])
        assert answer["result"] == [None, None, None, None, []]
        assert site.ask()["result"] == 5
    assert site.redis.llen("noted") == 0
    assert site.complaints() == []


def test_ordinary_messages_pass(broker_url: str, tmp_path: Path) -> None:
    site = Site(broker_url, tmp_path / "log")
    then = {"task": "note", "args": [], "kwargs": {}, "options": {}}
    with site.worker():
        assert site.ask(body=[[2, 3], {}, None])["result"] == 5
        assert site.ask(body=zlib.compress(b"[[2, 3], {}, {}]"), compression="application/x-gzip")["result"] == 5
        site.push(protocol_1(args=["old"]))
        assert site.ask(body=[[2, 3], {}, {"chain": [then]}], timelimit=[60, None])["result"] == 5
        until(lambda: site.redis.llen("noted") == 2, "the chain went on")
    assert site.redis.lrange("noted", 0, -1) == [b"('old',)", b"(5,)"]
    assert site.complaints() == []


def test_a_message_whose_channel_is_gone_is_acknowledged_in_vain_and_no_more(
    broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With threads a task is acknowledged when one begins it, which may be long after its connection was lost."""
    consumer = object.__new__(type("Consumer", (guard._Guarded, Stock), {}))
    consumer.hub, consumer.connection_errors = Hub(), (ConnectionError,)
    with kombu.Connection(broker_url) as connection:
        queue = connection.SimpleQueue("acknowledged-late")
        queue.put("work")
        message = queue.get(timeout=10.0)
        message.channel.basic_recover(requeue=True)  # what was delivered has gone back to its queue
    consumer.call_soon_ack(message.ack_log_error, logging.getLogger(), consumer.connection_errors)
    for ready in consumer.hub._pop_ready():
        ready()
    said = "A message of a lost broker connection is not acknowledged: AttributeError"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_unknown_tasks_wait_for_a_newer_worker(broker_url: str, tmp_path: Path) -> None:
    old = Site(broker_url, tmp_path / "old")
    calls = [envelope([[], {}, {}], task="newer") for _ in range(10)]  # more than the worker's prefetch
    with old.worker():
        for raw in calls:
            old.push(raw)
        until(lambda: len(old.complaints()) == 10, "the old worker saw them all")
        assert old.ask()["result"] == 5
        with Site(broker_url, tmp_path / "new", GUARD_NEWER="1").worker():
            for raw in calls:
                assert old.result(raw["headers"]["id"])["result"] == "done by the newer worker"
    assert len(old.complaints()) == 10
    assert all("No task 'newer' here" in line for line in old.complaints())


def test_an_unknown_task_ends_when_patience_does(broker_url: str, tmp_path: Path) -> None:
    site = Site(broker_url, tmp_path / "log", GUARD_PATIENCE_S="0.5")
    with site.worker():
        assert site.ask("newer", [[], {}, {}])["result"]["exc_type"] == "NotRegistered"
        until(lambda: not site.redis.hlen("unacked"), "nothing left unacknowledged")
        assert site.ask()["result"] == 5
    assert ["No task 'newer'" in line for line in site.complaints()] == [True, False]
    assert site.redis.llen("celery") == 0


def test_stale_doorbells_of_an_unknown_task_are_gone_at_once(broker_url: str, tmp_path: Path) -> None:
    site = Site(broker_url, tmp_path / "log")
    with site.worker():
        site.push(envelope([[], {}, {}], task="newer", expires="2020-01-01T00:00:00+00:00"))
        assert site.ask()["result"] == 5
    assert len(site.complaints()) == 1
    assert "expired" in site.complaints()[0]


@pytest.mark.parametrize("content_type", ["application/x-gzip", "application/x-bz2", "application/x-lzma"])
def test_decompressors_are_bounded_and_still_read_what_was_written(content_type: str) -> None:
    wire.bound_decoders(1000)
    packed, _ = compression.compress("x" * 1000, content_type)
    assert compression.decompress(packed, content_type) == b"x" * 1000
    packed, _ = compression.compress("x" * 1001, content_type)
    with pytest.raises(DecodeError, match="beyond 1000 bytes"):
        compression.decompress(packed, content_type)
    wire.bound_decoders(wire.Limits().body_bytes)


def test_unreadable_amqp_properties_become_a_message_that_is_refused() -> None:
    wire.bound_decoders(wire.Limits().body_bytes)
    received = amqp.Message()
    received.inbound_header(struct.pack(">HxxQHB", 60, 2, 0x8000, 2) + b"\xff\xff")
    received.inbound_body(b"[]")
    received.delivery_info = {"delivery_tag": 1}
    with pytest.raises(wire.MalformedError, match="properties"):
        wire.check_size(pyamqp.Message(received), wire.Limits())
