"""A company without Celery: children that drain when a bell rings, a pump, and a clock that a test moves.

Owns what stands between the parts of the engine in these tests: the bells (they may be lost), and who is alive.  The
children, the pump and the database are the real ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from orchestrator.engine import pump as pumping
from orchestrator.engine.pump import Pump
from orchestrator.failpoints import failpoint
from orchestrator.saga import Saga
from orchestrator.store import liveness, turns
from orchestrator.store.connection import Connection
from orchestrator.store.turns import Taken
from tests.engine.stage import Child, start
from tests.proof import effects
from tests.proof.checker import NOTHING, Report, check, refused_in
from tests.proof.effects import EffectLog

LEASE = timedelta(seconds=2)
_CLOCK = """
CREATE TABLE orchestrator_clock AS SELECT interval '0' AS ahead;
CREATE OR REPLACE FUNCTION orchestrator.now() RETURNS timestamptz LANGUAGE sql STABLE
    AS 'SELECT statement_timestamp() + ahead FROM public.orchestrator_clock';
CREATE TABLE wall_clocks (session text, ahead interval)
"""


class Killed(BaseException):
    """What a process that gets SIGKILL would raise, if it could."""


class Company:
    """Workers, a pump and a broker that a test has in hand."""

    def __init__(self, url: str, connection: Connection, log: Path, patch: pytest.MonkeyPatch) -> None:
        self.url = url
        self.connection = connection
        self.log = EffectLog(log)
        self.log.path.touch()
        self.living: list[Child] = []
        self.hung: list[Child] = []  # they live, and answer no bell
        self.started: list[str] = []
        self.bells = 0
        self.lost = 0
        self._made: list[Child] = []
        self._seconds = 0.0
        self._patch = patch
        patch.setenv(effects.VARIABLE, str(log))
        patch.setattr(pumping, "monotonic", lambda: self._seconds)
        connection.execute(effects.TABLE)
        connection.execute(_CLOCK)
        self.pump = Pump(self._ring, lease=LEASE, reservation=timedelta(milliseconds=100))

    def _ring(self, queue: str, times: int) -> None:
        self.bells += times

    # -- people --------------------------------------------------------------------------------------------------------
    def hire(self) -> Child:
        child = Child(self.url)
        self.living.append(child)
        self._made.append(child)
        return child

    def kill_at(self, child: Child, key: str, *, after: bool = False) -> None:
        """Let `child` die when it runs the step of this key: before its code, or after it and before its outcome."""

        def die(taken: Taken) -> None:
            if key in taken.key and taken.role == "do":
                self.living.remove(child)
                raise Killed

        if after:
            child.runner.after = die
        else:
            child.runner.before = die

    def kill_at_commit(self, child: Child, key: str) -> None:
        """Let `child` die when it commits the outcome of the step of this key, before anything is written."""

        def die(name: str, connection: Any = None) -> None:
            if name == "commit.before":
                self._patch.setattr(turns, "failpoint", failpoint)
                self.living.remove(child)
                raise Killed

        def await_commit(taken: Taken) -> None:
            if key in taken.key:
                child.runner.after = lambda taken: None
                self._patch.setattr(turns, "failpoint", die)

        child.runner.after = await_commit

    def set_wall_clock(self, child: Child, seconds: float) -> None:
        """Let the machine that `child` runs on have another idea of the time than the database has.

        Nothing of the engine looks at it: it is the clock that a mutation goes by.
        """
        values = [f"%child of {child.runner.worker}", seconds]
        self.connection.execute("INSERT INTO wall_clocks VALUES (%s, make_interval(secs => %s))", values)

    def overtake(self, slow: Child, key: str, meanwhile: Callable[[], object]) -> None:
        """Let `slow` stand still with a step of this key while its lease runs out, and go on after `meanwhile`."""

        def stand_still(taken: Taken) -> None:
            if key in taken.key:
                slow.runner.before = lambda taken: None
                self.living.remove(slow)
                while slow.incarnation in [row[0] for row in liveness.alive(self.connection)]:
                    self.tick()
                meanwhile()
                slow.reborn()
                self.living.append(slow)

        slow.runner.before = stand_still

    def overtake_in_the_middle(
        self, slow: Child, quick: Child, key: str, role: str = "do", first: Callable[[], object] = lambda: None
    ) -> None:
        """Let `slow` go on with its attempt while `quick` is in the middle of the next one, or of its undo."""
        go_on, background = threading.Event(), threading.Thread(target=slow.drain, daemon=True)

        def let_go(taken: Taken) -> None:
            if key in taken.key and taken.role == role and background.is_alive():
                quick.runner.before = lambda taken: None
                go_on.set()
                background.join(60)

        def meanwhile() -> None:
            first()
            standing.set()
            assert go_on.wait(60)

        standing = threading.Event()
        self.overtake(slow, key, meanwhile)
        quick.runner.before = let_go
        background.start()
        while not standing.wait(0.05):
            assert background.is_alive()
        quick.drain()
        background.join(60)
        assert not background.is_alive()

    # -- time ----------------------------------------------------------------------------------------------------------
    def start(self, saga: Saga[Any, Any], *args: Any, run_id: str = "run") -> None:
        self.started.append(start(self.connection, saga, *args, run_id=run_id))
        self.bells += 1

    def lose_the_bells(self) -> None:
        self.lost += self.bells
        self.bells = 0

    def pass_time(self, seconds: float) -> None:
        """Move the database's clock, and the one by which leases are judged."""
        self._seconds += seconds
        self.connection.execute("UPDATE orchestrator_clock SET ahead = ahead + make_interval(secs => %s)", [seconds])

    def tick(self) -> None:
        """Half a second: who lives renews its lease, the pump looks."""
        self.pass_time(0.5)
        for child in self.living:
            liveness.renew(self.connection, child.incarnation)
        self.pump.run_once(self.connection)

    def work(self, rounds: int = 40) -> None:
        """Let everybody work until nothing is outstanding, or for as many rounds: then something never comes."""
        for _ in range(rounds):
            for child in list(self.living):
                if self.bells and child not in self.hung:
                    self.bells -= 1
                    with suppress(Killed):
                        child.drain()
                self.bells += len(child.rings)
                child.rings.clear()
            self.tick()
            if not self._outstanding():
                return

    def _outstanding(self) -> bool:
        row = self.connection.execute(
            "SELECT EXISTS (SELECT FROM orchestrator.runs WHERE finished_at IS NULL) "
            "OR EXISTS (SELECT FROM orchestrator.work) OR EXISTS (SELECT FROM orchestrator.arrivals)"
        ).fetchone()
        return row == (True,)

    def check(self, log: str = "") -> Report:
        """Let the checker judge; these short stories are about promises, not about coverage."""
        return check(
            self.url,
            effect_log=self.log.path,
            acknowledged=self.started,
            refused=refused_in(log),
            demand=NOTHING,
        )

    def close(self) -> None:
        for child in self._made:
            child.close()
