"""Doorbells: Celery messages that say only "there is work for this queue".

Owns their form and how they are rung.  Must never carry a payload, wait without a bound, or fail a caller: a doorbell
that cannot be rung is rung by the pump.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

from kombu.connection import Connection
from kombu.messaging import Producer

from orchestrator.failpoints import failpoint

logger = logging.getLogger(__name__)

DRAIN = "orchestrator.drain"
_BODY: Any = ([], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None})
_REST_AFTER_FAILURE_S = 1.0
_PATIENCE_S = 2.0
_TIMEOUTS = {"socket_connect_timeout": 1.0, "socket_timeout": 2.0, "connect_timeout": 1.0, "max_retries": 1,
             "interval_start": 0, "interval_step": 0.1, "interval_max": 0.1}  # fmt: skip


class Bell:
    """Rings the doorbells of one process over a broker connection of its own; made anew after a fork."""

    def __init__(self, connection: Mapping[str, Any], expires: timedelta = timedelta(seconds=10)) -> None:
        options = dict(connection)
        self._brokers = deque(options.pop("alternates", ()))
        options["transport_options"] = {**(options.get("transport_options") or {}), **_TIMEOUTS}
        options["connect_timeout"] = 1.0
        self._options = options
        self._expires = expires
        self._connection: Connection | None = None
        self._producer: Producer | None = None
        self._owner = 0
        self._lock = threading.Lock()
        self._rest_until = 0.0

    def ring(self, queue: str, times: int = 1) -> bool:
        """Ring `queue` so many times; False if the broker cannot be reached within about a second."""
        if monotonic() < self._rest_until:
            return False
        with self._held() as held:
            if not held:
                return False
            try:
                producer = self._opened()
                failpoint("bell.before")
                for _ in range(times):
                    self._publish(producer, queue)
                failpoint("bell.after")
                return True
            except Exception as error:
                self._rest_until = monotonic() + _REST_AFTER_FAILURE_S
                self._abandon()
                self._brokers.rotate(-1)
                logger.info(
                    "doorbell of queue %s not rung: the broker cannot be reached (%s)", queue, type(error).__name__
                )
                return False

    @contextlib.contextmanager
    def _held(self) -> Iterator[bool]:
        if self._owner != os.getpid():  # a lock that another thread held at the fork stays held for ever
            self._lock, self._owner = threading.Lock(), os.getpid()
            self._connection = self._producer = None
        held = self._lock.acquire(timeout=2.0)
        try:
            yield held
        finally:
            if held:
                self._lock.release()

    def _opened(self) -> Producer:
        if self._producer is None:
            others = {"hostname": self._brokers[0], "alternates": [*self._brokers]} if self._brokers else {}
            self._connection = connection = Connection(**{**self._options, **others})
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0.1, timeout=1.0)
            self._producer = Producer(connection.default_channel, auto_declare=False)
        return self._producer

    def _publish(self, producer: Producer, queue: str) -> None:
        now = datetime.now(UTC)
        message_id = str(uuid.uuid4())
        producer.publish(
            _BODY,
            exchange="",  # the anonymous exchange leads to the queue of that name, whatever the app's routing
            routing_key=queue,
            serializer="json",
            retry=False,
            timeout=_PATIENCE_S,
            confirm_timeout=_PATIENCE_S,  # a RabbitMQ whose disk is full confirms nothing, and says nothing
            delivery_mode=1,
            expiration=self._expires.total_seconds(),
            correlation_id=message_id,
            headers={
                "lang": "py", "task": DRAIN, "id": message_id, "root_id": message_id, "parent_id": None, "group": None,
                "retries": 0, "eta": None, "expires": (now + self._expires).isoformat(), "timelimit": [None, None],
                "argsrepr": "()", "kwargsrepr": "{}", "origin": "orchestrator", "ignore_result": True,
            },
        )  # fmt: skip

    def _abandon(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            abandon(connection)

    def close(self) -> None:
        """Close the broker connection."""
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None and self._owner == os.getpid():
            with contextlib.suppress(Exception):
                connection.release()


def abandon(connection: Connection) -> None:
    """Close the socket of a connection without a farewell: a broker that is as good as dead answers none."""
    raw = getattr(connection, "_connection", None)
    with contextlib.suppress(Exception):
        raw.collect() if hasattr(raw, "collect") else connection.release()  # type: ignore[union-attr]


def connection_options(app: Any) -> dict[str, Any]:
    """Return what a `Bell` needs to reach the broker that `app` writes to: plain values that a process can be sent."""
    connection = app.connection_for_write()
    info = connection.info()
    return {
        "hostname": connection.as_uri(include_password=True),
        "alternates": [*connection.alt],  # all of them, where there are several for failover
        "login_method": connection.login_method,
        "ssl": info.get("ssl") or False,
        "transport_options": dict(app.conf.broker_transport_options or {}),
        "heartbeat": 0,
    }
