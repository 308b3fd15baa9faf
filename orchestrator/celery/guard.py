"""The guard: what a message must be before Celery touches it, for every task of an app.

Owns the admission of messages in a worker's main process. A message is admitted, given back, or refused;
refused means one log line (sizes and names, never content) and a reject without requeue, so that it is gone,
or dead-lettered where RabbitMQ is told to, and the worker lives. Stock Celery 5.7 dies of a valid JSON body
that is not ``[args, kwargs, embed]``, redelivers a message without ``id`` for ever (kombu's Redis transport
takes any ``KeyError`` for a lost connection), and inflates a bomb before it looks at the content type.

A well-formed message whose task has no implementation here is *given back*: during a rolling deploy a newer
worker may know it. It is held through the worker's timer (2 s, doubling to 60 s; it does not use up prefetch
while held), then requeued, and only after ``unknown_patience_s`` in this worker it ends as in stock Celery:
one error line, result ``NotRegistered``. One warning is logged when it is first seen. A quorum queue's
delivery limit counts these returns: give such queues a dead-letter exchange.

Must never log a payload, open a database connection, or import a module that defines tasks.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial, wraps
from queue import Empty
from time import monotonic
from typing import Any, ClassVar

import kombu.utils.json
from celery import Celery, bootsteps, signals
from celery.exceptions import NotRegistered
from celery.utils.imports import symbol_by_name
from celery.utils.objects import Bunch

from orchestrator.celery import wire
from orchestrator.celery.wire import Limits, MalformedError

__all__ = ["Limits", "install"]

logger = logging.getLogger(__name__)

_MAX_HELD = 1000
_MAX_REMEMBERED = 10_000
_json: Any = kombu.utils.json


def install(app: Celery, limits: Limits | None = None) -> None:
    """Guard every worker of this app, and bound kombu's decompressors in this process.

    A task with a true attribute ``embeds_ignored`` additionally runs without the callbacks, errbacks, chain,
    chord, time limits, stamps and reply address of its message, and takes JSON alone. Installing twice
    changes nothing.
    """
    limits = limits or Limits()
    wire.bound_decoders(limits.body_bytes)
    steps = app.steps["worker"]
    if not any(isinstance(step, type) and issubclass(step, GuardStep) for step in steps):
        steps.add(type("Guard", (GuardStep,), {"limits": limits, "__module__": __name__}))


class GuardStep(bootsteps.Step):
    """Give the worker, before it builds one, a consumer that examines every message first."""

    limits: ClassVar[Limits] = Limits()

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        stock = symbol_by_name(worker.consumer_cls)
        worker.consumer_cls = type("GuardedConsumer", (_Guarded, stock), {"limits": self.limits})
        beyond = set(worker.app.conf.accept_content or ()) - {"json", wire.JSON}
        if beyond:
            logger.warning("accept_content lets in more than JSON: %s", ", ".join(sorted(beyond)))


class _Guarded:
    """Examine, hold and refuse messages; mixed in before Celery's consumer class or the user's own."""

    limits: ClassVar[Limits]
    app: Any
    qos: Any
    timer: Any
    connection_errors: tuple[type[BaseException], ...]

    def __init__(self, *args: Any, **options: Any) -> None:
        self._held: dict[int, Any] = {}
        self._returned: OrderedDict[str, tuple[float, int]] = OrderedDict()
        super().__init__(*args, **options)
        gossip = getattr(self, "gossip", None)
        if gossip is not None:
            gossip.on_message = self._survive(gossip.on_message, "an event of another worker")

    # Transport

    def connect(self) -> Any:
        connection = super().connect()  # type: ignore[misc]
        transport = connection.transport
        if hasattr(transport, "_deliver"):
            transport._deliver = self._survive(partial(_deliver_checked, transport._deliver), "a message")
        poller: Any = getattr(transport, "cycle", None)
        if hasattr(poller, "on_readable"):
            poller.on_readable = self._survive(poller.on_readable, "an unreadable envelope")
        return connection

    def on_connection_error_after_connected(self, error: Exception) -> None:
        try:
            super().on_connection_error_after_connected(error)  # type: ignore[misc]
        except AttributeError as failure:
            # kombu 5.7 gives back unread messages while it closes a Redis connection that is closed already; its broker
            # redelivers them anyhow.
            logger.warning("The lost broker connection could not be closed: %s", wire.reason(failure))

    def call_soon_ack(self, acknowledge: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Acknowledge in the event loop, and survive that it is too late.

        kombu 5.7 has no error of its own for a channel of Redis that is gone.  The broker gives it again anyhow.
        In a pool of threads a task may be begun, and is acknowledged only then, long after its connection was lost.
        """

        @wraps(acknowledge)
        def survive(*args: Any, **options: Any) -> None:
            try:
                acknowledge(*args, **options)
            except AttributeError as failure:
                logger.warning("A message of a lost broker connection is not acknowledged: %s", type(failure).__name__)

        return super().call_soon_ack(survive, *args, **options)  # type: ignore[misc]

    def _survive(self, handle: Callable[..., Any], what: str) -> Callable[..., Any]:
        @wraps(handle)
        def survive(*args: Any) -> Any:
            try:
                return handle(*args)
            except Exception as error:
                if isinstance(error, Empty) or self._is_infrastructure(error):
                    raise
                logger.error("Dropped %s: %s", what, wire.reason(error))

        return survive

    def _is_infrastructure(self, error: Exception) -> bool:
        # kombu counts KeyError among Redis' connection errors: from a message it is the message's fault.
        known = self.connection_errors + getattr(self, "channel_errors", ())
        return isinstance(error, MemoryError) or (isinstance(error, known) and not isinstance(error, KeyError))

    # Tasks

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], None]:
        handle = super().create_task_handler(*args, **options)  # type: ignore[misc]

        def on_task_received(message: Any) -> None:
            try:
                self._examine(message)
                handle(message)
            except Exception as error:
                if self._is_infrastructure(error):
                    raise
                self._refuse(message, error)

        return on_task_received

    def _examine(self, message: Any) -> None:
        wire.check_size(message, self.limits)
        fields, args, kwargs, embed = wire.unfold(message.headers, message.payload)
        wire.check_call(fields, message.properties, args, kwargs, embed)
        bare = getattr(self.app.tasks.get(fields["task"]), "embeds_ignored", False)
        if bare and (message.content_type != wire.JSON or fields is not message.headers):
            raise MalformedError("its task takes JSON messages of protocol 2 alone")
        if bare or embed is None:
            _strip(message, args, kwargs, bare)

    def _refuse(self, message: Any, error: Exception) -> None:
        headers = message.headers if isinstance(message.headers, dict) else {}
        logger.error(
            "Refused a message: %s. Task %s, %d bytes, delivery tag %s",
            wire.reason(error),
            wire.printable(headers.get("task")),
            len(message.body or b""),
            wire.printable(str(message.delivery_tag)),
        )
        no_ack = getattr(message.channel, "no_ack_consumers", None) or ()
        if not message.acknowledged and message.delivery_info.get("consumer_tag") not in no_ack:
            message.reject_log_error(logger, self.connection_errors)
        signals.task_rejected.send(sender=self, message=message, exc=error)

    def on_decode_error(self, message: Any, error: Exception) -> None:
        self._refuse(message, error)

    def on_invalid_task(self, body: Any, message: Any, error: Exception) -> None:
        self._refuse(message, error)

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._refuse(message, MalformedError("it names no task"))

    # Tasks that this worker does not know

    def on_unknown_task(self, body: Any, message: Any, error: Exception) -> None:
        fields = wire.unfold(message.headers, message.payload)[0]
        since, returns = self._returned.pop(fields["id"], (monotonic(), 0))
        if wire.expired(fields.get("expires")):
            return self._refuse(message, MalformedError("it expired before a worker knew its task"))
        if monotonic() - since > self.limits.unknown_patience_s:
            return self._give_up(message, fields, error)
        if not returns:
            logger.warning(
                "No task %s here: its message goes back to the queue, for a newer worker, for up to %d s",
                wire.printable(fields["task"]), self.limits.unknown_patience_s,
            )  # fmt: skip
        self._returned[fields["id"]] = (since, returns + 1)
        if len(self._returned) > _MAX_REMEMBERED:
            self._returned.popitem(last=False)
        doubled = self.limits.unknown_first_delay_s * 2.0 ** min(returns, 30)
        self._hold(message, min(doubled, self.limits.unknown_longest_delay_s))

    def _hold(self, message: Any, delay_s: float) -> None:
        # Beyond _MAX_HELD messages prefetch is used up, so that the broker keeps the rest.
        widened = len(self._held) < _MAX_HELD
        if widened:
            self.qos.increment_eventually()
        self._held[id(message)] = self.timer.call_after(delay_s, self._give_back, (message, widened))

    def _give_back(self, message: Any, widened: bool) -> None:
        if self._held.pop(id(message), None) is None:
            return
        if widened:
            self.qos.decrement_eventually()
        self.call_soon(message.reject_log_error, logger, self.connection_errors, True)  # type: ignore[attr-defined]

    def _give_up(self, message: Any, fields: Mapping[str, Any], error: Exception) -> None:
        name, run = fields["task"], fields["id"]
        self._refuse(message, MalformedError("no worker knew its task in time"))
        properties = message.properties
        request = Bunch(
            name=name,
            chord=None,
            errbacks=None,
            root_id=fields.get("root_id"),
            correlation_id=properties.get("correlation_id"),
            reply_to=properties.get("reply_to"),
        )
        try:
            self.app.backend.mark_as_failure(run, NotRegistered(name), request=request)
        except Exception as failure:
            logger.error("Could not record that task %s is unknown: %s", wire.printable(name), type(failure).__name__)
        signals.task_unknown.send(sender=self, message=message, exc=error, name=name, id=run)

    def on_close(self) -> None:
        # The broker redelivers what is held: delivery tags do not outlive their channel.
        held, self._held = self._held, {}
        for entry in held.values():
            self.timer.cancel(entry)
        super().on_close()  # type: ignore[misc]


def _deliver_checked(deliver: Callable[[Any, str], None], raw: Any, queue: str) -> None:
    wire.check_envelope(raw)
    deliver(raw, queue)


def _strip(message: Any, args: Any, kwargs: Any, bare: bool) -> None:
    message.body = _json.dumps([args, kwargs, {}])
    message.content_type, message.content_encoding = wire.JSON, "utf-8"
    message._decoded_cache = None
    if bare:
        dropped = ("timelimit", "shadow", "stamps", "stamped_headers", "group", "group_index")
        message.headers = {key: value for key, value in message.headers.items() if key not in dropped}
        message.properties = {key: value for key, value in message.properties.items() if key != "reply_to"}
