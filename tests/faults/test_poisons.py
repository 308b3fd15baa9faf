"""The poisons that the guard is tested with on Valkey, as far as AMQP can say them, on a RabbitMQ."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import amqp
import pytest
from amqp.exceptions import FrameSyntaxError

from tests.celery.test_guard import POISONS, SECRET, Site
from tests.faults.conftest import new_valkey_url
from tests.faults.rabbitmq import RabbitMQ
from tests.faults.servers import Servers


def as_amqp(raw: Any) -> amqp.Message | None:
    """Return what Redis would hold of a message in the form of AMQP; None if there is no such message."""
    try:
        body, headers = base64.b64decode(raw["body"], validate=True), raw["headers"]
        properties = {name: raw["properties"][name] for name in ("correlation_id", "reply_to", "priority")}
        message = amqp.Message(
            body, content_type=raw["content-type"], content_encoding=raw["content-encoding"],
            application_headers=headers, **properties,
        )  # fmt: skip
        message._serialize_properties()
        json.dumps(headers, allow_nan=False)  # RabbitMQ hangs up on who sends what is no number
    except (TypeError, KeyError, ValueError, AttributeError, binascii.Error, FrameSyntaxError):
        return None
    return message if isinstance(headers, dict) else None


class Amqp(Site):
    """A site whose messages go through RabbitMQ; results are kept elsewhere."""

    def __init__(self, broker_url: str, results_url: str, log: Path) -> None:
        super().__init__(results_url, log, CELERY_BROKER_URL=broker_url, GUARD_RESULTS=results_url)
        self._parts = urlsplit(broker_url)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Speak to the broker until the block ends."""
        address = f"{self._parts.hostname}:{self._parts.port}"
        login = {"userid": self._parts.username, "password": unquote(self._parts.password or "")}
        with amqp.Connection(address, virtual_host=self._parts.path[1:], **login) as connection:
            self._channel = connection.channel()
            self._channel.queue_declare("celery", durable=True, auto_delete=False)
            yield

    def waiting(self) -> int:
        return int(self._channel.queue_declare("celery", passive=True).message_count)

    def push(self, raw: Any) -> None:
        message = raw if isinstance(raw, amqp.Message) else as_amqp(raw)
        self._channel.basic_publish(message, routing_key="celery")


# Of these nothing is left that would be wrong in AMQP: it has no such fields, or has them as text alone.
OF_REDIS = {
    "no delivery info", "no delivery tag", "delivery tag a table", "delivery tag true", "lone surrogate tag",
    "no exchange", "unknown body encoding", "reply address a table",
}  # fmt: skip
SAYABLE = {
    name: message for name, raw in POISONS.items() if name not in OF_REDIS and (message := as_amqp(raw)) is not None
}
BARE = {
    "no properties": amqp.Message(b"[[], {}, {}]"),
    "an empty message": amqp.Message(b""),
    "nothing but bytes": amqp.Message(bytes(range(256))),
}


@pytest.mark.debian
def test_every_poison_that_amqp_can_say_costs_one_line_and_the_worker_lives(
    rabbitmq: RabbitMQ, own_servers: Servers, tmp_path: Path
) -> None:
    assert len(SAYABLE) > 40
    site = Amqp(rabbitmq.new_url(), new_valkey_url(own_servers), tmp_path / "log")
    with site.open(), site.worker() as process:
        site.ask()
        already = len(site.complaints())
        wrong = []
        for name, message in (SAYABLE | BARE).items():
            site.push(message)
            assert site.ask()["result"] == 5, name
            lines = site.complaints()[already:]
            already += len(lines)
            if len(lines) != 1 or not ("Refused a message" in lines[0] or "Dropped" in lines[0]):
                wrong.append((name, lines))
        assert wrong == []
        assert process.poll() is None
        assert site.waiting() == 0
    assert SECRET not in site.log.read_text()
    assert site.redis.llen("noted") == 0
