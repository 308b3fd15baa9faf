"""The way to the database: every round trip is a moment at which something else may happen first, or instead.

Owns the connections of actors, which are real ones, and what may become of a round trip.  A statement that waits for a
lock hands over to the others; whoever holds the lock is among them.
"""

from __future__ import annotations

import functools
import select
import time
from collections import Counter
from collections.abc import Callable
from enum import Enum
from typing import Any

import psycopg
from psycopg.waiting import Ready, Wait

from tests.simulation.scheduler import Killed, Process, Scheduler, current

_TICK_S = 0.004
_IDLE = psycopg.pq.TransactionStatus.IDLE
_GONE = "server closed the connection unexpectedly"


class Fate(Enum):
    """What becomes of a round trip."""

    ARRIVES = "arrives"
    LOST = "cut before it is sent"
    UNANSWERED = "carried out, and cut before the answer"
    LATE = "cut, and carried out later"
    STALLED = "held up before it is sent"
    KILLED = "killed before it is sent"
    KILLED_AFTER = "killed before the answer"


class Line(psycopg.Connection[Any]):
    """A connection of an actor."""

    network: Network
    process: Process
    severed = False
    saying = ""
    reads_clock = False
    kind = ""
    answered = True

    def hear(self, query: str, parameters: Any) -> None:
        """Note what is about to be asked."""
        self.saying, reads_clock = _heard(query)
        self.reads_clock = self.reads_clock or reads_clock  # since the last round trip: a pipeline has several
        if "commit_turns_3" in self.saying:
            self.network.happened["turns that shared a statement"] += parameters[0].count('"run":') > 1
        self.network.happened["fence taken anew"] += "SET fence" in self.saying

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        """Drive one round trip; psycopg has no other way to speak to the server."""
        return self.network.round_trip(self, gen)

    @property
    def closed(self) -> bool:
        return self.severed or super().closed

    def close(self) -> None:
        if not self.closed:
            self.network.hang_up(self)


class _Cursor(psycopg.Cursor[Any]):
    """Every statement goes through one, SQLAlchemy's too."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        if isinstance(self.connection, Line):
            self.connection.hear(str(query), params)
        return super().execute(query, params, **options)


class Sessions(dict[str, list[Line]]):
    """Sessions of the server that are kept from one connection, and one seed, to the next."""

    def close(self) -> None:
        for lines in self.values():
            for line in lines:
                line.pgconn.finish()
        self.clear()


class Network:
    """Opens lines for actors and decides, by asking `fate`, what becomes of each round trip."""

    def __init__(self, scheduler: Scheduler, database_url: str, sessions: Sessions) -> None:
        self.scheduler = scheduler
        self.fate: Callable[[Line, str], Fate] = lambda line, saying: Fate.ARRIVES
        self.kill: Callable[[Process], None] = scheduler.doom
        self.stall: Callable[[Process], None] = lambda process: None
        self.down_until = 0.0
        self.deadlocks = 0
        self.happened: Counter[str] = Counter()
        self.round_trips = 0
        self._lines: list[Line] = []
        self._sessions = sessions
        self._watched: set[Process] = set()
        self._shown_wall = 0.0
        self._control = psycopg.connect(database_url, autocommit=True, application_name="simulation")

    # -- connections ---------------------------------------------------------------------------------------------------
    def connect(self, *args: Any, **kwargs: Any) -> Line:
        """Stand in for `psycopg.connect` inside the simulation."""
        actor = current()
        assert actor is not None
        self.scheduler.yield_()
        if self.scheduler.monotonic < self.down_until:
            raise psycopg.OperationalError("connection refused")
        line = self._opened(args, kwargs)
        line.network, line.process, line.cursor_factory = self, actor.process, _Cursor
        self._lines.append(line)
        if actor.process not in self._watched:
            self._watched.add(actor.process)
            actor.process.on_death.append(functools.partial(self.finish, actor.process))
        return line

    def _opened(self, args: Any, kwargs: dict[str, Any]) -> Line:
        """Open a connection, or take a session of the server that another one has left: that saves much time."""
        kind = repr((args, sorted((name, value) for name, value in kwargs.items() if name != "application_name")))
        if not self._sessions.get(kind):
            line = Line.connect(*args, **kwargs)
        else:
            before = self._sessions[kind].pop()
            line = Line(before.pgconn)
            line._autocommit = bool(kwargs.get("autocommit"))
            line.prepare_threshold = kwargs.get("prepare_threshold", 5)
            line._prepared = before._prepared
            line._adapters = before._adapters
        line.kind = kind
        return line

    def finish(self, process: Process) -> None:
        """Close the sockets of a process that died."""
        for line in [line for line in self._lines if line.process is process and not line.severed]:
            self.hang_up(line)

    def cut_all(self, outage_s: float) -> None:
        """Postgres goes away: every connection ends, and none is accepted for a while."""
        self.down_until = self.scheduler.monotonic + outage_s
        for line in list(self._lines):
            if not line.severed:
                self.hang_up(line)

    def hang_up(self, line: Line) -> None:
        """End a connection; wait until the server has noticed, so that the locks it held are free or are waited for."""
        if line in self._lines:
            self._lines.remove(line)
        line.severed = True
        if line.pgconn.status != psycopg.pq.ConnStatus.OK:
            return
        if line.answered and line._pipeline is None and line.pgconn.transaction_status == _IDLE:
            self._sessions.setdefault(line.kind, []).append(line)
            return
        pid = line.pgconn.backend_pid
        line.pgconn.finish()
        for _ in range(2000):
            row = self.ask("SELECT pg_blocking_pids(pid) <> '{}' FROM pg_stat_activity WHERE pid = %s", pid)
            if row is None or row[0]:
                return
            time.sleep(0.0005)
        raise AssertionError("a backend does not end")

    def close(self) -> None:
        """Close what is left, but sessions that the next seed can use."""
        for line in list(self._lines):
            self.hang_up(line)
        self._control.close()

    def ask(self, query: str, *values: Any) -> Any:
        """Run a query of the simulation's own and return its first row."""
        return self._control.execute(query, values).fetchone()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        return self._control.execute(query).fetchall()

    # -- time ----------------------------------------------------------------------------------------------------------
    def show_time(self) -> None:
        """Let the database know what time it is."""
        if abs(self._shown_wall - self.scheduler.wall) > _TICK_S:
            self._shown_wall = self.scheduler.wall
            self._control.execute(
                "SELECT setval('public.simulated_microseconds', %s)", [int(self.scheduler.wall * 1_000_000)]
            )

    # -- round trips ---------------------------------------------------------------------------------------------------
    def round_trip(self, line: Line, gen: Any) -> Any:
        actor = current()
        if actor is None:
            return self._drive(line, gen)
        if actor.process.dead:
            raise Killed
        saying, line.answered = f"{_what(gen)} {line.saying}", False
        self.scheduler.yield_()
        if line.closed:
            raise psycopg.OperationalError(_GONE)
        fate = self.fate(line, saying)
        self.scheduler.tell(f"{actor.name}: {saying}" + ("" if fate is Fate.ARRIVES else f"  <- {fate.value}"))
        if fate is Fate.STALLED:
            self.stall(actor.process)
            self.scheduler.yield_()
            if line.closed:
                raise psycopg.OperationalError(_GONE)
            fate = self.scheduler.random.choice([Fate.ARRIVES, Fate.LOST])  # or nobody has waited for it
        self.round_trips += 1
        if line.reads_clock:
            line.reads_clock = False
            self.show_time()
        if fate is Fate.LATE and line.pgconn.pipeline_status:
            fate = Fate.UNANSWERED  # the rest of a pipeline would never be sent, and what has no end is not carried out
        if fate is Fate.LATE:
            self._carry_later(line, gen)
        if fate is Fate.KILLED:
            self.kill(actor.process)
            self.scheduler.die()
        if fate not in (Fate.LOST, Fate.LATE):
            answer = self._drive(line, gen)
            line.answered = not line.pgconn.pipeline_status  # without its end, the transaction of a pipeline is open
            if fate is Fate.ARRIVES:
                return answer
        if fate is Fate.KILLED_AFTER:
            self.kill(actor.process)
            self.scheduler.die()
        if fate is not Fate.LATE:
            self.hang_up(line)
        raise psycopg.OperationalError(_GONE)

    def _carry_later(self, line: Line, gen: Any) -> None:
        """Whoever sent it is told that the connection is gone, and the network still carries it out."""
        line.severed = True
        nobody = Process(f"network of {line.process.name}")

        def carry() -> None:
            self.scheduler.wait(self.scheduler.random.choice([0.0, 0.01, 0.2, 3.0]))
            self.scheduler.tell(f"{nobody.name}: late: {line.saying}")
            self.show_time()
            try:
                self._drive(line, gen)
            except psycopg.Error:
                pass
            finally:
                self.hang_up(line)

        self.scheduler.spawn(nobody, nobody.name, carry)

    def _drive(self, line: Line, gen: Any) -> Any:
        try:
            wanted = next(gen)
            while True:
                wanted = gen.send(self._answer(line, wanted))
        except StopIteration as done:
            return done.value
        except psycopg.errors.DeadlockDetected:
            self.deadlocks += 1
            raise

    def _answer(self, line: Line, wanted: Wait) -> Ready:
        waiting = _Waiting(self, line, wanted)
        while not waiting.settle():
            self.scheduler.hang(waiting)
            if line.pgconn.status != psycopg.pq.ConnStatus.OK:
                raise psycopg.OperationalError(_GONE)
        assert waiting.ready is not None
        return waiting.ready


class _Waiting:
    """A round trip that the server has not answered yet."""

    def __init__(self, network: Network, line: Line, wanted: Wait) -> None:
        self._network = network
        self._line = line
        self._wanted = wanted
        self._poll = select.poll()
        self._poll.register(
            line.pgconn.socket, (select.POLLIN if wanted & Wait.R else 0) | (select.POLLOUT if wanted & Wait.W else 0)
        )
        self.ready: Ready | None = None
        self._patience_ms = 5

    def settle(self) -> bool:
        """Wait for the answer, or for the certainty that the server waits for a lock."""
        if self._line.pgconn.status != psycopg.pq.ConnStatus.OK:
            return True
        for _ in range(5000):
            if found := self._poll.poll(self._patience_ms):
                events = found[0][1]
                self.ready = Ready(
                    (Ready.R if events & ~select.POLLOUT else 0) | (Ready.W if events & select.POLLOUT else 0)
                )
                return True
            blocked = self._network.ask("SELECT pg_blocking_pids(%s) <> '{}'", self._line.pgconn.backend_pid)[0]
            self._patience_ms = 0 if blocked else 5
            if blocked:
                return False
        raise AssertionError("the server does not answer")


@functools.cache
def _heard(query: str) -> tuple[str, bool]:
    """Return the beginning of a statement, and whether it may read the clock: by itself, or by a default."""
    return " ".join(query.split())[:60], any(word in query for word in ("now()", "_1(", "INSERT"))


def _what(gen: Any) -> str:
    name = getattr(gen, "__name__", "")
    return {"_enter_gen": "BEGIN", "_exit_gen": "COMMIT", "_commit_gen": "COMMIT", "_rollback_gen": "ROLLBACK"}.get(
        name, ""
    )
