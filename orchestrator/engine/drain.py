"""The loop of a worker's child: hold what is due, do it, commit outcome and next begin together, go on.

Owns what is taken, in what waves, and when a drain ends.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

from orchestrator.engine.advance import Advancer
from orchestrator.engine.attempts import Attempts
from orchestrator.engine.commit import new_fence
from orchestrator.engine.session import DeclaredDeadError, Session
from orchestrator.engine.wave import Wave
from orchestrator.engine.worker import Worker
from orchestrator.errors import StoreUnavailableError
from orchestrator.store import liveness, pauses, turns
from orchestrator.store.connection import UNAVAILABLE, Connection, unavailable
from orchestrator.store.turns import Taken

logger = logging.getLogger(__name__)
_GATHER_S = 0.012  # how long to let short work gather where it comes fast: a wave of 16 costs half of four of 4
_IN_VAIN, _TRY_AGAIN = 2, 16  # after so many times in vain one look has to do, but each so many-th time
_LEAD_S, _LEADS_FROM = 0.06, 12  # how long others stand by for a child that took so many at once, until it looks again
_STAND_BY_S = 0.004  # between looks whether it still takes all that comes
_LEFT_S = 0.03  # how long an outcome may be unread that was left for another process, unless that moves the run
_LOOK_S = 0.004  # between looks whether it was read
_SLACK_S = 1.0  # what is committed so much later than it was due is left to the last look, or to the next drain
_BATCH = 8
_LARGEST_BATCH = 32
_WAVE_S = 0.02
_LONGEST_WAVE_S = 0.1  # a wave that turns out to take longer is committed so far
_TO_ITS_END_S = 0.05  # how much longer than a second steps may follow, so that a short run is not cut by its end
_PERIODS = 10  # that a drain may last while nobody waits for its child: Celery may want to replace it
_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, *[1.0] * 30)  # between looks whether the database is back


class Drainer:
    """Drains the queues of one worker in one child; keeps its connection and its coroutines between drains."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._settings = worker.settings
        scope = replace(worker.scope, may_begin=self._may_go_on, is_short=lambda task: self._attempts.is_short(task))
        self._session = Session(worker, scope)
        self._attempts = Attempts(self._session, worker.runner, lambda: (*self._wave, *self._begun))
        self._queues = deque(sorted(worker.scope.queues))
        self._until = self._at_last = math.inf
        self._steps = self._most = 0
        self._together = False  # whether the steps of the last take shared commits, and whether it left some behind
        self._more_due = False
        self._leads = False  # whether it took several at once, and all that there were
        self._took_at = -math.inf  # when it looked the last time
        self._took_all_at: float | None = None  # when this drain left nothing behind that was due
        self._in_vain = 1  # how often in a row nothing came while it lingered
        self._looking = False  # whether the last look found nothing, so that others left it work without a ring
        self._unheard = False  # whether there may be more of that than it has taken
        self._others_look = False  # whether another child of this worker lingers as well
        self._owes = False  # whether something may be begun for this child that nobody else will do
        self._wave: list[Taken] = []  # the attempts that this child is about, and what they have begun so far
        self._waiting: deque[Taken] = deque()  # those of the wave that have not been run yet
        self._begun: list[Taken] = []

    # -- the loop ------------------------------------------------------------------------------------------------------
    def drain(self) -> int:
        """Work until nothing is due, or for about a second if other tasks wait; returns how many steps were run.

        None are run if connections are scarce and others have them all.
        Raises: StoreUnavailableError if the database cannot be reached; what was begun is reported before.
        """
        self._steps = 0
        self._begin_period()
        self._at_last = self._until + (_PERIODS - 1) * self._settings.drain_seconds
        try:
            if not self._owes and not self._session.has_room():
                return 0
            self._drain_on()
            self._session.lend()
            return self._steps
        except UNAVAILABLE as error:
            self._session.drop()
            raise unavailable(error) from error
        except BaseException:
            self._session.drop()  # what is still begun is given back when the next drain connects
            raise
        finally:
            self._session.leave_for_sure()

    def _drain_on(self) -> None:
        """Drain; go on after a connection broke, for what was begun for this child waits for nobody else."""
        for pause in _PAUSES:
            try:
                return self._drain()
            except (*UNAVAILABLE, StoreUnavailableError) as error:
                self._session.drop()
                if not self._owes or self._worker.stopping() or isinstance(error, DeclaredDeadError):
                    raise
                time.sleep(pause)
        return self._drain()

    def _drain(self) -> None:
        self._took_all_at = None
        self._perform(self._enter())
        while True:
            self._session.refresh()
            full = not self._may_begin()
            taken = ([] if full else self._linger()) or self._look_after()
            if not taken:
                self._session.leave()
                self._owes = False
                self._attempts.forget()
                if self._session.advancer is not None:
                    self._session.advancer.forget_others()
                if full or self._worker.stopping():
                    # One that waits is for this child.  Were it rung for as well, those that came while another task
                    # had it would never get fewer, and tasks that come after them wait for a drain of each.
                    rung = self._worker.rung() and not self._worker.stopping()
                    if not (self._ring_if_due(rung) or rung or self._in_vain or self._worker.stopping()):
                        # More is about to come: some child is to be there for it, after other tasks had their turn.
                        self._worker.ring(self._queues[0], 1)
                    return
                # Look once more after the mark is gone: who added work before that saw the mark and did not ring.
                self._took_all_at = None
                taken = self._take()
                if not taken:
                    self._owes = False
                    return
                self._session.enter()
            self._perform(taken)

    def _enter(self) -> list[Taken]:
        """Mark that this child drains, and return what it has begun and not run.

        If its incarnation was declared dead meanwhile, the mark is under the next one, which has begun nothing.
        """
        self._session.ready()
        begun: list[Taken] = []
        if self._session.is_new:
            begun = self._attempts.take_up(self._owes)
            self._session.is_new = False
        return begun if self._session.enter() else []

    def _linger(self) -> list[Taken]:
        """Take what is due; after work, wait a moment for more of it, which is cheaper than a doorbell for each.

        It looks at once, for then it is known to be looking, and nobody rings.  But where short steps come several at
        once the wait comes first: the more are taken together, the less each costs, and whoever starts them gets the
        CPU meanwhile.  Where nothing came the last times, or another child of this worker looks as well, it is short.
        """
        if not self._stand_by():
            return []
        pauses = list(self._worker.linger) if self._steps or not self._in_vain else []
        if self._in_vain % _TRY_AGAIN >= _IN_VAIN:
            del pauses[:-1]
        if pauses and self._together and not self._more_due:
            pauses.insert(0, _GATHER_S)
            self._lead(2 * _GATHER_S)
        else:
            pauses.insert(0, 0.0)
        self._others_look = False
        taken: list[Taken] = []
        waited = False
        for pause in pauses:
            if pause:
                if self._others_look or not self._may_begin():
                    break
                waited = True
                time.sleep(pause)
            taken = self._take()
            if taken:
                break
        if waited:
            self._in_vain = 0 if taken else self._in_vain + 1
        return taken

    def _stand_by(self) -> bool:
        """Leave what comes to a child of this worker that takes all of it in short waves; tells whether to look then.

        Two that share it make waves half as large, which cost half as much again.
        """
        while not self._has_left and (seconds := self._worker.lead.others_s()) > 0.0:
            if self._is_waited_for() or not self._may_begin():
                return False
            time.sleep(min(seconds, _STAND_BY_S))
        self._session.refresh()
        return True

    def _lead(self, seconds: float, wave: Sequence[Taken] = ()) -> None:
        """Promise the others to look again within `seconds`, unless this child cannot keep up or has more in hand."""
        recent = self._attempts.recent_s
        needed = sum(recent.get(item.task, 1.0) for item in wave if item.role != "turn")
        if self._leads and seconds > 0.0 and needed <= _WAVE_S:
            self._worker.lead.promise(seconds)
        else:
            self._worker.lead.release()

    @property
    def _has_left(self) -> bool:
        return self._session.advancer is not None and self._session.advancer.has_left

    def _look_after(self) -> list[Taken]:
        """With nothing else to do, see to outcomes that were left for another process which drives their run.

        Returns what that began, or what has become due meanwhile.  A drain that is over waits for nobody.
        """
        taken: list[Taken] = []
        while not taken and self._has_left:
            connection, advancer = self._session.ready()
            taken = advancer.look_after(connection, _LEFT_S if self._may_begin() else 0.0)
            if not taken and advancer.has_left:
                time.sleep(_LOOK_S)
                taken = self._take() if self._may_begin() else []
        return taken

    def _may_begin(self) -> bool:
        """Whether this drain goes on: other tasks of this worker get their turn, a worker that stops begins nothing.

        Where no other waits, a doorbell for the same child or another one, which knows less of the runs, would be all
        that comes of its end.  Where connections are scarce, others wait for that of this child.
        """
        if self._worker.stopping():
            return False
        waited_for = self._is_waited_for()
        if time.monotonic() < self._until and (self._steps < self._most or not waited_for):
            return True
        if waited_for or time.monotonic() >= self._at_last:
            return False
        self._begin_period()
        return True

    def _may_follow(self) -> bool:
        """Whether a step may follow another one of its run at once; each second what is due is compared again.

        A long run would keep out what is more urgent or longer due, and hear of no pause, for as long as the drain.
        Where nobody waits for this child, a short one is brought to its end before, however many steps that were:
        whoever takes the next one has to read the run first.
        """
        if self._worker.stopping():
            return False
        if self._is_waited_for():
            return time.monotonic() < self._until and self._steps < self._most
        return time.monotonic() < self._until + _TO_ITS_END_S

    def _is_waited_for(self) -> bool:
        """Whether others wait for this child, or for its connection where those are scarce."""
        return self._worker.waited_for() or self._worker.permits is not None

    def _may_go_on(self) -> bool:
        """Whether a step may be begun here: not if it would wait behind one that can take long."""
        ahead = (*self._waiting, *self._begun)
        return self._may_follow() and all(self._attempts.is_short(item.task) for item in ahead)

    def _begin_period(self) -> None:
        """Begin a drain, or go on with it as if it were another: what is committed long after it was due is found."""
        self._until = time.monotonic() + self._settings.drain_seconds
        self._most = self._steps + self._settings.drain_steps
        self._took_all_at = None

    def _ring_if_due(self, rung: bool = False) -> bool:
        """Ring for what this child leaves to others, or to itself but if it was `rung`; tells whether there is any."""
        self._unheard = False
        connection, _ = self._session.ready()
        due = liveness.due(connection, self._settings.reservation)
        for queue in sorted(due.keys() & set(self._worker.scope.queues)):
            self._session.ring(connection, queue, due[queue], rung)
        return bool(due)

    def _take(self) -> list[Taken]:
        connection, advancer = self._session.ready()
        scope, identity = self._worker.scope, advancer.identity
        self._queues.rotate(1)  # within a priority every queue comes first in its turn, so that none starves
        short = {task: seconds for task, seconds in self._attempts.recent_s.items() if self._attempts.is_short(task)}
        batch = _batch(max(short.values(), default=0.0))
        if self._is_waited_for():
            batch = min(batch, max(1, self._most - self._steps))
        queues = [queue for queue in self._queues if queue not in self._session.paused.queues]
        if not queues:
            return []
        self._owes = True
        self._took_at = time.monotonic()
        # What was due before is gone, but for what comes late (of a long transaction): the next drain finds that.
        back = None if self._took_all_at is None else timedelta(seconds=self._took_at - self._took_all_at + _SLACK_S)
        found = turns.take(
            connection,
            queues=queues,
            targets=[*scope.targets, turns.ANYONE],
            incarnation=identity.incarnation,
            child=identity.child,
            fences=[new_fence() for _ in range(batch)],
            short=list(short),
            reservation=self._settings.reservation,
            back=back,
        )
        taken = found or []
        self._others_look = found is None
        self._more_due = len(taken) == batch
        self._leads = _LEADS_FROM <= len(taken) < batch
        if not self._more_due and not any(self._comes_alone(item) for item in taken):
            self._took_all_at = self._took_at
        if self._more_due:
            self._session.ring(connection, taken[-1].queue, len(taken))
        self._unheard = bool(taken) and (self._unheard or self._looking)
        self._looking = not taken
        return taken

    def _comes_alone(self, item: Taken) -> bool:
        """Whether nothing was taken after it, though there may be more."""
        if item.role == "turn":
            return item.attempt > 1
        return not self._attempts.is_short(item.task) or "w" in (item.call or {})

    def _perform(self, taken: list[Taken]) -> None:
        """Do what is held, and what that begins in turn.

        In waves: first turns share a commit, and so do the outcomes of steps that are known to be short.
        """
        self._begun = taken
        self._waiting.clear()
        self._together = False
        while self._begun:
            wave, self._begun = self._begun, []
            self._lead(self._took_at + _LEAD_S - time.monotonic(), wave)
            firsts = [item for item in wave if item.role == "turn"]
            if firsts and self._worker.stopping():
                self._give_back(firsts)
                firsts = []
            attempts = self._wave = [item for item in wave if item.role != "turn"]
            self._waiting = deque(attempts)
            self._steps += len(attempts)
            self._begun.extend(self._start_turns(firsts))
            short, others = self._split(attempts)
            if len(short) > 1:
                self._together = True
                attempts, self._waiting = others, deque(others)
                self._begun.extend(self._run_together(short))
            long = not all(self._attempts.is_short(item.task) for item in attempts)
            if self._has_left:
                connection, advancer = self._session.ready()
                self._begun.extend(advancer.look_after(connection, 0.0 if long else _LEFT_S))
            if self._unheard and long:
                self._ring_if_due()
            while self._waiting:
                self._begun.extend(self._attempts.run(self._waiting.popleft()))

    def _split(self, attempts: list[Taken]) -> tuple[list[Taken], list[Taken]]:
        """Return those that may share a commit, for they are known to be short, and the others."""
        short: list[Taken] = []
        others: list[Taken] = []
        for item in attempts:
            alike = item.role in ("do", "undo") and self._attempts.is_short(item.task)
            (short if alike else others).append(item)
        return short, others

    def _put_aside(self, items: list[Taken]) -> list[Taken]:
        """Leave runs alone whose saga is paused; orders for one that has not begun are heard all the same."""
        held = [item for item in items if item.run and item.run.saga in self._session.paused.sagas]
        if not held:
            return items
        heard = [item.run_id for item in held if item.target == turns.ANYONE]
        connection, advancer = self._session.ready()
        sagas, identity = list(self._session.paused.sagas), advancer.identity
        ids = [item.run_id for item in held]
        aside = pauses.put_aside(connection, ids, sagas, identity.incarnation, identity.child, heard)
        return [item for item in items if item.run_id not in aside]

    def _start_turns(self, items: list[Taken]) -> list[Taken]:
        items = self._put_aside(items)
        if not items:
            return []
        connection, advancer = self._session.ready()
        if len(items) == 1:
            return self._start_turn(connection, advancer, items[0])
        try:
            return advancer.start_turns(connection, items, self._attempts.is_short)
        except (*UNAVAILABLE, StoreUnavailableError):
            raise
        except Exception:
            logger.exception("the turns of %s runs failed together; each is tried alone", len(items))
        begun: list[Taken] = []
        for item in items:
            begun += self._start_turn(connection, advancer, item)
        return begun

    def _run_together(self, items: list[Taken]) -> list[Taken]:
        """Run short steps one after the other and record their outcomes with one commit.

        Where one took long all the same, what has ended is recorded before the others are run, as steps by themselves
        if they are of the same task.  Where one hangs, others get all the rest.
        """
        wave = Wave(self._session, items)
        began = time.monotonic()
        while wave.waiting and not wave.unsure and not (wave.ended and time.monotonic() - began > _LONGEST_WAVE_S):
            item = wave.waiting.popleft()
            wave.ended.append((item, self._attempts.attempt(item, wave.leave_to_others)))
        self._steps -= len(wave.waiting)  # they are counted again
        self._begun.extend(wave.waiting)
        begun: list[Taken] = []
        broken = wave.unsure
        try:
            if not broken:
                connection, advancer = self._session.ready()
                begun = advancer.record_together(connection, wave.ended, self._attempts.is_short)
        except (*UNAVAILABLE, StoreUnavailableError):
            broken = True
        if broken:
            self._session.drop()
            for item, outcome in wave.ended:
                self._begun.extend(self._attempts.record(item, outcome, broken=True))
        if wave.unsure:
            self._begun = self._attempts.still_held(self._begun)
        for item, outcome in (*wave.ended, *wave.left):
            self._worker.runner.finished(item, outcome)
        return begun

    def _start_turn(self, connection: Connection, advancer: Advancer, item: Taken) -> list[Taken]:
        """A turn that fails for a reason nobody foresaw must neither stop the others nor be tried in a tight loop."""
        try:
            return advancer.start_turn(connection, item)
        except (*UNAVAILABLE, StoreUnavailableError):
            raise
        except Exception:
            logger.exception("run %s: its turn failed and is tried again in 30 s; please report this", item.run_id)
            turns.postpone(connection, item.run_id, timedelta(seconds=30))
            return []

    def _give_back(self, items: list[Taken]) -> None:
        connection, advancer = self._session.ready()
        reserved = [item.run_id for item in items if item.role == "turn"]
        turns.give_back(connection, reserved, advancer.identity.incarnation, advancer.identity.child)

    def close(self) -> None:
        """Close the connection and drop the coroutines."""
        self._session.drop()


def _batch(seconds: float) -> int:
    """Return how much to take at once where a step takes so long: what is begun waits for no more than a moment.

    Where none is known to be short, one step at most is begun, and turns take no time to speak of.
    """
    return min(_LARGEST_BATCH, max(_BATCH, int(_WAVE_S / max(seconds, 1e-6))))
