"""The schedules of an app: its entries as they are now, how their messages are sent, and what people may order.

Owns what beat and the command line share.  Must never decide by itself when a slot is due.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from itertools import islice
from time import monotonic
from typing import Any

import celery.beat
from celery import Celery
from kombu.connection import Connection as BrokerConnection
from kombu.exceptions import OperationalError as BrokerError

from orchestrator import saga as sagas
from orchestrator.celery import entries, nightly
from orchestrator.celery.doorbell import abandon
from orchestrator.celery.entries import Entry
from orchestrator.engine.schedules import Decision, Schedule, Schedules
from orchestrator.errors import UsageError
from orchestrator.store import check
from orchestrator.store import schedules as store
from orchestrator.store.connection import Connection

logger = logging.getLogger("celery.beat")

_TIMEOUTS = {"socket_connect_timeout": 1.0, "socket_timeout": 2.0, "connect_timeout": 1.0, "max_retries": 1,
             "interval_start": 0, "interval_step": 0.1, "interval_max": 0.1, "read_timeout": 2.0, "write_timeout": 2.0,
             "confirm_publish": False}  # fmt: skip
_PATIENCE_S = 1.0  # less than a lease
BROKER_AWAY = (BrokerError, OSError)


def engine_of(orchestrator: Any) -> Schedules:
    """Return the engine's side of an app's schedules; they go by the name that the app was given."""

    def ring(connection: Connection, queue: str, rows: int) -> None:
        orchestrator.client.ring_for(connection, queue, rows)

    return Schedules(orchestrator.app.main or "celery", ring)


class Book:
    """The entries of an app, read anew whenever its beat_schedule has changed."""

    def __init__(self, app: Celery) -> None:
        self.app = app
        self._raw: dict[str, Any] = {}
        self.added: dict[str, Any] = {}
        self.schedules: dict[str, Schedule] = {}
        self.entries: dict[str, Entry] = {}
        self.problems: dict[str, str] = {}

    def update_from_dict(self, more: Mapping[str, Any]) -> None:
        """Add entries to those of the configuration."""
        self.added.update(more)

    def refresh(self, now: datetime) -> bool:
        """Read the entries; False if they are what they were."""
        configured = self.app.conf.beat_schedule
        if not self._raw:  # Celery's own entry, the clean-up of results, if the backend needs it
            celery.beat.Scheduler.install_default_entries(self, configured)
            self.added = {**nightly.entries(self.app.orchestrator.settings, configured), **self.added}
        raw = {**self.added, **(configured if isinstance(configured, Mapping) else {})}
        if raw == self._raw:
            return False
        self._raw = {name: _copied(each) for name, each in raw.items()}
        self.schedules, self.entries, self.problems = {}, {}, {}
        for name, each in raw.items():
            self._read(str(name), each, now)
        return True

    def _read(self, name: str, raw: Any, now: datetime) -> None:
        if not _is_storable(name):
            self.problems[ascii(name)[:100]] = "it cannot be used: its name must be text of 1 to 2000 bytes without NUL"
            return
        try:
            prepare = self.app.orchestrator.client.prepare
            self.schedules[name], self.entries[name] = entries.read(self.app, prepare, name, raw, now)
            problem = self.schedules[name].problem
        except Exception as error:  # whatever is wrong with one entry, the others go on
            problem = f"it cannot be used: {str(error) or type(error).__name__}"
        if problem:
            self.problems[name] = problem

    def declared(self) -> list[store.Declared]:
        """Return what the database is to know of the entries, the bad ones among them."""
        bad = [store.Declared(name, "", "", self.problems[name]) for name in self.problems.keys() - self.schedules]
        return [each.declared for each in self.schedules.values()] + bad


def _is_storable(name: str) -> bool:
    """Tell whether a name can be a key in the database, where one that cannot would keep all others out."""
    raw = name.encode(errors="replace")
    return 0 < len(raw) <= 2000 and b"\0" not in raw and raw.decode() == name


def _copied(raw: Any) -> Any:
    """A copy that does not change when somebody edits the entry in its place."""
    if not isinstance(raw, dict):
        return raw
    return {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}


class Undeliverable(Exception):
    """A message could not be sent, and it is not the broker's fault; says whose."""

    def __init__(self, name: str, reason: Exception) -> None:
        super().__init__(name)
        self.name = name
        self.reason = reason


class Post:
    """Sends tasks that are no sagas, over a connection to the broker of its own; each attempt takes a bounded time.

    A RabbitMQ that is short of memory or disk takes a message and confirms nothing, perhaps for hours.  Were it sent
    again, each copy would be delivered in the end: one message is waited for, as long as its connection lives.
    """

    def __init__(self, app: Celery, book: Book) -> None:
        self._app = app
        self._book = book
        self._producer: Any = None
        self._unconfirmed: str | None = None
        self._taken: str | None = None

    def deliver(self, name: str, slot: datetime, message_id: str) -> None:
        """Send the message of a slot.  Raises: Undeliverable; what the broker's client raises if it is away."""
        entry = self._book.entries[name]
        if self._was_taken(message_id):
            return
        logger.info("Scheduler: Sending due task %s (%s)", name, entry.task)
        try:
            args, kwargs = entry.call(slot)
        except Exception as error:  # an argument that is computed may fail as the broker does, with an OSError
            raise Undeliverable(name, error) from error
        try:
            if entry.task in sagas.registry.names:  # it was none when this was decided
                options = {**entry.options, "task_id": message_id}
                self._app.orchestrator.client.start(sagas.registry.latest(entry.task), tuple(args), kwargs, options)
            else:
                self._send(entry, args, kwargs, slot, message_id)
        except BROKER_AWAY:
            raise
        except Exception as error:
            raise Undeliverable(name, error) from error

    def _send(self, entry: Entry, args: Any, kwargs: Any, slot: datetime, message_id: str) -> None:
        """Send the message of a slot; once more over a new connection if the one at hand has died meanwhile."""
        headers = {**(entry.options.get("headers") or {}), "celery_beat_task": True, "beat_slot": slot.isoformat()}
        options = {"timeout": _PATIENCE_S, **entry.options, "task_id": message_id, "headers": headers, "retry": False}
        known = self._producer is not None
        try:
            self._publish(entry.task, args, kwargs, options)
        except Exception:
            if self._unconfirmed:
                raise
            self._abandon()
            if not known:
                raise
            self._publish(entry.task, args, kwargs, options)

    def _publish(self, task_name: str, args: Any, kwargs: Any, options: dict[str, Any]) -> None:
        task = self._app.tasks.get(task_name)
        producer = self._opened()
        if task is None:
            self._app.send_task(task_name, args, kwargs, producer=producer, **options)
        else:
            task.apply_async(args, kwargs, producer=producer, **options)
        if hasattr(producer.channel, "confirm_select"):
            self._unconfirmed = options["task_id"]
            self._await_confirmation()

    def _was_taken(self, message_id: str) -> bool:
        """Tell whether a message that was sent before has been confirmed since.  Raises: TimeoutError."""
        if self._unconfirmed:
            try:
                self._await_confirmation()
            except TimeoutError:
                raise
            except Exception as error:
                logger.info("beat: a message was not confirmed, and is sent again: %s", error)
        return message_id == self._taken

    def _await_confirmation(self) -> None:
        """Wait until RabbitMQ confirms what it was sent.

        Raises: TimeoutError if it does not yet; anything else if it never will: the connection is abandoned then.
        """
        give_up_at = monotonic() + _PATIENCE_S
        while self._unconfirmed:
            try:
                self._producer.connection.drain_events(timeout=max(give_up_at - monotonic(), 0.001))
            except TimeoutError:
                raise TimeoutError("it does not confirm what it was sent") from None
            except Exception:
                self._abandon()
                raise

    def _opened(self) -> Any:
        if self._producer is None:
            connection: BrokerConnection = self._app.connection_for_write(
                connect_timeout=1.0, heartbeat=0, transport_options=_TIMEOUTS
            )
            connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0.1, timeout=1.0)
            self._producer = self._app.amqp.Producer(connection, auto_declare=False)
            channel = self._producer.channel
            if hasattr(channel, "confirm_select"):
                channel.confirm_select(nowait=True)
                channel.events["basic_ack"].add(self._confirmed)
                channel.events["basic_nack"].add(self._refused)
        return self._producer

    def _confirmed(self, *_: Any) -> None:
        self._taken, self._unconfirmed = self._unconfirmed, None

    def _refused(self, *_: Any) -> None:
        raise ConnectionError("the broker could not take the message")

    def _abandon(self) -> None:
        producer, self._producer, self._unconfirmed = self._producer, None, None
        if producer is not None:
            abandon(producer.connection)

    def close(self) -> None:
        """Close the connection."""
        if self._unconfirmed:
            self._abandon()
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(Exception):
                producer.connection.release()


class Desk:
    """What people may order: `orchestrator.schedules`."""

    def __init__(self, orchestrator: Any) -> None:
        self._orchestrator = orchestrator
        self._engine = engine_of(orchestrator)
        self._book = Book(orchestrator.app)

    def listing(self, upcoming: int = 1) -> list[dict[str, Any]]:
        """Return every schedule of the app with its last slot and the `upcoming` ones, as plain values.

        Raises: StoreUnavailableError, SchemaError.
        """
        with self._open() as (connection, now):
            rows = {row["name"]: row for row in store.listing(connection, self._engine.app)}
            for name in sorted({*self._book.schedules, *self._book.problems} - rows.keys()):
                rows[name] = {"name": name, "settled_until": now, "outstanding": 0}
            return [self._told(row, now, upcoming) for row in rows.values()]

    def leader(self) -> tuple[str, datetime] | None:
        """Return which beat leads and when it was last seen; None if none does."""
        with self._open() as (connection, _):
            return store.leader(connection, self._engine.app)

    def pause(self, name: str, reason: str = "", by: str = "") -> bool:
        """Let a schedule fire nothing until it is resumed; False if it was paused already.  Raises: UsageError."""
        with self._open() as (connection, _):
            return store.pause(connection, self._known(connection, name), name, by, reason)

    def resume(self, name: str, *, catch_up: bool = False) -> bool:
        """End a pause; slots that passed meanwhile are left out, or with `catch_up` treated as missed ones.

        False if it was not paused.  Raises: UsageError.
        """
        with self._open() as (connection, _):
            return store.resume(connection, self._known(connection, name), name, catch_up=catch_up)

    def trigger(self, name: str) -> Decision:
        """Fire a schedule now, even if it is paused; its overlap policy counts.  Raises: UsageError."""
        with self._open() as (connection, _):
            decision = self._engine.trigger(connection, self._of(name))
            self._send(connection)
            return decision

    def backfill(self, name: str, since: datetime, until: datetime) -> list[Decision]:
        """Fire the slots from `since` up to and including `until`, aware instants, that have not fired.

        Raises: UsageError.
        """
        if since.tzinfo is None or until.tzinfo is None:
            raise UsageError("since and until must be aware instants; say which time zone they are in")
        with self._open() as (connection, _):
            decisions = self._engine.backfill(connection, self._of(name), since, until)
            self._send(connection)
            return decisions

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[Connection, datetime]]:
        with self._orchestrator.client.pool.connection() as connection:
            check(connection)
            now = store.clock(connection)
            self._book.refresh(now)
            yield connection, now

    def _of(self, name: str) -> Schedule:
        known = self._book.schedules.get(name)
        if known is None:
            problem = self._book.problems.get(name)
            names = ", ".join(map(repr, sorted(self._book.schedules))) or "none"
            raise UsageError(
                f"{name!r}: {problem}" if problem else f"there is no schedule {name!r}; there are: {names}"
            )
        return known

    def _known(self, connection: Connection, name: str) -> str:
        """Make sure that a schedule has its row; returns the app that it belongs to."""
        if all(row["name"] != name for row in store.listing(connection, self._engine.app)):
            store.ensure(connection, self._engine.app, self._of(name).declared)
        return self._engine.app

    def _send(self, connection: Connection) -> None:
        """Send what has been decided; what cannot be sent now is left to beat."""
        post = Post(self._orchestrator.app, self._book)
        with contextlib.suppress(Undeliverable, *BROKER_AWAY):
            while self._engine.send_one(connection, post.deliver, self._book.entries):
                pass
        post.close()

    def _told(self, row: dict[str, Any], now: datetime, upcoming: int) -> dict[str, Any]:
        here = self._book.schedules.get(row["name"])
        begin = max(row["settled_until"], now - timedelta(seconds=1))
        slots = list(islice(here.timetable.slots(row["settled_until"], begin), upcoming)) if here else []
        last = {each: row.get(f"last_{each}") for each in ("slot", "state", "run_id", "because")}
        paused = {"at": row.get("paused_at"), "by": row.get("paused_by"), "reason": row.get("paused_because")}
        return {
            "name": row["name"],
            "task": here.task if here else row.get("task", ""),
            "timetable": here.reads if here else row.get("reads", ""),
            "next": slots if not paused["at"] and not row.get("gone_at") else [],
            "last": last if last["slot"] else None,
            "paused": paused if paused["at"] else None,
            "outstanding": row["outstanding"],
            "overlap": here.overlap.value if here else None,
            "problem": row.get("problem") or self._book.problems.get(row["name"]),
            "gone_at": row.get("gone_at"),
        }
