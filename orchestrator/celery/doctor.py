"""What the doctor asks of the broker: whether it answers, what its queues hold, how Celery is told to use it.

Must never take a message, and never wait without a bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from celery import Celery
from kombu.connection import Connection

from orchestrator.engine.doctor import Broker, Queue

_TIMEOUTS = {"socket_connect_timeout": 2.0, "socket_timeout": 5.0, "connect_timeout": 2.0, "max_retries": 1}


def broker(app: Celery, queues: Iterable[str]) -> Broker:
    """Ask the broker that `app` writes to about these queues."""
    conf = app.conf
    connection: Connection = app.connection_for_write(connect_timeout=2.0, heartbeat=0, transport_options=_TIMEOUTS)
    known: dict[str, Any] = {
        "url": connection.as_uri(),
        "prefetch": conf.worker_prefetch_multiplier,
        "result_backend": _kind(conf.result_backend),
    }
    try:
        with connection:
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0.1, timeout=2.0)
            known["queues"] = {queue: _state(connection, queue) for queue in queues}
            if connection.transport.driver_type == "redis":
                known["visibility_timeout_s"] = float(conf.broker_transport_options.get("visibility_timeout", 3600))
                known["evicts"] = _evicts(connection)
    except Exception as error:  # each transport has its own; what matters is that it does not answer
        known["error"] = str(error) or type(error).__name__
    return Broker(**known)


def _state(connection: Connection, queue: str) -> Queue:
    """Ask about one queue, over a channel of its own: a queue that is not there closes it."""
    with connection.channel() as channel:
        try:
            declared = channel.queue_declare(queue, passive=True)
        except connection.channel_errors:
            return Queue(0, 0)
        is_amqp = connection.transport.driver_type == "amqp"
        return Queue(declared.message_count, declared.consumer_count if is_amqp else None)


def _evicts(connection: Connection) -> str:
    """Return the policy by which a Redis throws keys away that are messages; empty if it does not, or does not say."""
    with connection.channel() as channel:
        try:
            policy = str(channel.client.config_get("maxmemory-policy").get("maxmemory-policy", ""))
        except Exception:  # CONFIG is often forbidden
            return ""
    return policy if policy.startswith("allkeys") else ""  # messages have no expiry, so volatile ones spare them


def _kind(url: str | None) -> str:
    return (url or "").partition(":")[0].removeprefix("disabled")
