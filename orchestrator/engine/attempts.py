"""One attempt: run its code, say what came of it, record that whatever happens to the connection.

Owns what a child knows of the attempts that it has run.  Must never decide what is taken, or when a drain ends.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

from orchestrator.codec import Json, check, copied, encode_any
from orchestrator.engine.advance import Advancer, AfterCommit
from orchestrator.engine.commit import new_fence
from orchestrator.engine.session import DeclaredDeadError, OrphanedError, Session
from orchestrator.engine.worker import Invocation, StepRunner
from orchestrator.errors import PayloadError, Rejected, StoreUnavailableError, describe_exception, message_of
from orchestrator.failpoints import failpoint
from orchestrator.machine.journal import AttemptEnded
from orchestrator.machine.policy import is_among
from orchestrator.step import NOT_ITS_OWN, StepContext, StepStopped
from orchestrator.store import attempts, liveness
from orchestrator.store.connection import UNAVAILABLE, CommitUnknown, Connection, TransactionEnded
from orchestrator.store.turns import Taken

logger = logging.getLogger(__name__)
_TOGETHER_S = 0.01  # steps shorter than this may share a commit
_SHORT_S = 0.02  # opening a connection takes about half of this
_NOT_ITS_OWN = (*NOT_ITS_OWN, CommitUnknown, TransactionEnded)
_RECORDING_S = 600.0  # how long a child tries to record an outcome before it leaves it in doubt


class _LostFence(Exception):
    """The transaction of a transactional step is to be rolled back: its attempt was taken away."""


class _NotStored(Exception):
    """The transaction of a transactional step is to be rolled back: what it returned cannot be stored."""

    def __init__(self, outcome: AttemptEnded) -> None:
        super().__init__(outcome.key)
        self.outcome = outcome


class Attempts:
    """Runs and records the attempts of one child."""

    def __init__(self, session: Session, runner: StepRunner, in_hand: Callable[[], Iterable[Taken]]) -> None:
        self._session, self._runner = session, runner
        self._in_hand = in_hand  # what this child is about, and what that has begun so far
        self._run_already: set[tuple[str, int, str, str, int]] = set()  # what this drain has run, or tried to
        # How long each task took, the shorter of its last two times: a short one is interrupted now and then.
        self.recent_s: dict[str, float] = {}
        self._last_s: dict[str, float] = {}

    def forget(self) -> None:
        """Forget what was run: nothing is begun for this child any more."""
        self._run_already.clear()

    def is_short(self, task: str) -> bool:
        """Whether a task lately took so little time that others may wait for it."""
        return self.recent_s.get(task, 1.0) < _TOGETHER_S and not self._runner.is_transactional(task)

    # -- running -------------------------------------------------------------------------------------------------------
    def run(self, taken: Taken) -> list[Taken]:
        """Run the code of one attempt and record its outcome; returns the work that was begun by it."""
        runner = self._runner
        if taken.role in ("do", "undo") and runner.is_transactional(taken.task):
            return self._run_in_transaction(taken, self._context(taken))
        outcome = self.attempt(taken)
        begun = self.record(taken, outcome)
        runner.finished(taken, outcome)
        return begun

    def attempt(self, taken: Taken, hangs: Callable[[], None] | None = None) -> AttemptEnded:
        """Run the code of one attempt; if it takes long, `hangs` is called in its midst."""
        if taken.role == "once":
            connection, advancer = self._session.ready()
            function = advancer.function_of(connection, taken)
            self._run_already.add(_attempt_of(taken))
            failpoint("once.before", connection)
            invocation = _run_once(function)
            failpoint("once.after", connection)
            return self._outcome(taken, invocation)
        self._run_already.add(_attempt_of(taken))
        if self.recent_s.get(taken.task, 1.0) > _SHORT_S:
            self._session.lend()
        began = time.monotonic()
        failpoint("effect.before", self._session.connection)
        context = self._context(taken)
        context.hangs = hangs
        invocation = self._runner.invoke(taken, context)
        failpoint("effect.after", self._session.connection)
        took = time.monotonic() - began
        self.recent_s[taken.task] = min(took, self._last_s.get(taken.task, took))
        self._last_s[taken.task] = took
        return self._outcome(taken, invocation)

    def _run_in_transaction(self, taken: Taken, context: StepContext) -> list[Taken]:
        after: list[AfterCommit] = []
        reported: list[AttemptEnded] = []
        _, advancer = self._session.ready()
        self._run_already.add(_attempt_of(taken))
        self._session.lend()

        def settle(connection: Connection, invocation: Invocation) -> None:
            outcome = self._outcome(taken, invocation, harmless=True)
            if outcome.verdict != "succeeded":  # its result cannot be stored: its rows must not stay without it
                raise _NotStored(outcome)
            found = advancer.record_within(connection, taken, outcome)
            if found is None:
                raise _LostFence
            after.append(found)
            reported.append(outcome)

        try:
            invocation = self._runner.invoke_in_transaction(taken, context, settle)
        except CommitUnknown as error:
            # The outcome counts only if the commit did not happen; recording finds out.
            outcome = self._outcome(taken, Invocation(error=error), harmless=True)
            return self.record(taken, outcome, broken=True)
        except TransactionEnded as error:
            return self._recorded_after_rollback(taken, self._outcome(taken, Invocation(error=error)))
        except _NotStored as refused:
            return self._recorded_after_rollback(taken, refused.outcome)
        except _LostFence:
            logger.warning(
                "run %s step %s: attempt %s to %s has lost its fence, its transaction is rolled back",
                taken.run_id, taken.key, taken.attempt, taken.role,
            )  # fmt: skip
            return []
        if invocation.error is None and after:
            self._runner.finished(taken, reported[0])
            return self._after_transaction(taken, reported[0], after[0])
        return self._recorded_after_rollback(taken, self._outcome(taken, invocation, harmless=True))

    def _recorded_after_rollback(self, taken: Taken, outcome: AttemptEnded) -> list[Taken]:
        begun = self.record(taken, outcome)
        self._runner.finished(taken, outcome)
        return begun

    def _after_transaction(self, taken: Taken, outcome: AttemptEnded, after: AfterCommit) -> list[Taken]:
        """Go on after the commit; if the connection breaks now, what was begun with it is found as after any other."""
        try:
            return after(self._session.ready()[0])
        except (*UNAVAILABLE, StoreUnavailableError):
            self._session.drop()
            return self.record(taken, outcome, broken=True)

    def _context(self, taken: Taken) -> StepContext:
        call = taken.call or {}
        suffix = {"undo": ":undo", "probe": ":probe"}.get(taken.role, "")
        if taken.role == "undo" and call.get("l"):
            suffix += f":{call['l']}"
        deadline = taken.deadline or taken.now + timedelta(seconds=call.get("t", 300))
        run = f"{taken.run_id}~{call['k']}" if call.get("k") else taken.run_id
        key = f"{run}:{taken.key}"
        return StepContext(
            run_id=taken.run_id,
            key=taken.key,
            attempt=taken.attempt,
            idempotency_key=key if taken.role == "probe" else key + suffix,
            deadline=deadline,
            heartbeat_details=copied(call.get("d")),
            undoes=call.get("u", key) if taken.role == "undo" else "",
            beat=lambda details: self._beat(taken, details),
            restored_by=call.get("r"),
        )

    def _beat(self, taken: Taken, details: Json) -> None:
        if details is not None:
            what = f"the heartbeat details of {taken.task}"
            details = encode_any(details, what)
            check(details, what=what)
            taken.call["d"] = details
        stop = self._heard(taken, details)
        if stop is None:
            raise StepStopped(
                f"attempt {taken.attempt} of {taken.key} was given up: its lease or its heartbeat was missed"
            )
        if stop:
            raise StepStopped(f"run {taken.run_id} does not want the result of {taken.key} any more")

    def _heard(self, taken: Taken, details: Json) -> bool | None:
        """Tell the database of a heartbeat; one that cannot reach it is lost, as the next one is about to come."""
        assert taken.fence is not None
        for _ in range(2):  # the connection may be broken since long
            try:
                connection, _ = self._session.ready()
                return attempts.heartbeat(connection, taken.run_id, taken.lane, taken.fence, details)
            except (DeclaredDeadError, OrphanedError):
                raise
            except StoreUnavailableError:
                break
            except UNAVAILABLE:
                self._session.let_go()
        return False

    def _outcome(self, taken: Taken, invocation: Invocation, harmless: bool = False) -> AttemptEnded:
        began = taken.now.isoformat()
        worker = self._runner.worker
        role = "do" if taken.role == "once" else taken.role
        error = invocation.error
        if error is None:
            try:
                check(invocation.result, what=f"the result of {taken.task}")
                return AttemptEnded(taken.key, role, taken.attempt, "succeeded", invocation.result, None, worker, began)
            except PayloadError as refused:
                error = refused
        described = describe_exception(error, invocation.trace)
        described["message"] = message_of(described)  # as recorded, it is what saga code is told at every replay
        verdict = "failed" if harmless or invocation.harmless else "doubt"
        if isinstance(error, Rejected) or (not isinstance(error, _NOT_ITS_OWN) and self._refused(taken, described)):
            verdict = "rejected"
        return AttemptEnded(
            taken.key, role, taken.attempt, verdict, None, described, worker, began, pause=invocation.pause,
            details=(taken.call or {}).get("d"),
        )  # fmt: skip

    def _refused(self, taken: Taken, described: dict[str, Any]) -> bool:
        policy = self._runner.non_retryable(taken.task)
        names = set(described.get("mro") or ())
        return bool(policy and policy.refuses(names)) or is_among((taken.call or {}).get("x", ()), names)

    # -- recording -----------------------------------------------------------------------------------------------------
    def record(self, taken: Taken, outcome: AttemptEnded, broken: bool = False) -> list[Taken]:
        """Record an outcome; if the connection breaks, find out what became of it and go on."""
        pause, until = 0.05, time.monotonic() + _RECORDING_S
        assert taken.fence is not None
        fences = [taken.fence]
        while True:
            try:
                connection, advancer = self._session.ready()
                if broken:
                    found = self._recover(connection, advancer, taken, outcome, fences)
                    if found is not None:
                        return found
                return advancer.record(connection, taken, outcome)
            except (*UNAVAILABLE, StoreUnavailableError) as error:
                broken = True
                self._session.drop()
                if isinstance(error, OrphanedError) or time.monotonic() > until:
                    raise
                time.sleep(pause)
                pause = min(pause * 2, 1.0)

    def _recover(
        self, connection: Connection, advancer: Advancer, taken: Taken, outcome: AttemptEnded, fences: list[int]
    ) -> list[Taken] | None:
        """After a connection was lost at a commit: None if the outcome can still be recorded, else what to do next."""
        fences.append(new_fence())
        if attempts.refence(connection, taken.run_id, taken.lane, fences, fences[-1]):
            taken.fence = fences[-1]
            return None
        link = _link_of(taken)
        if not attempts.recorded(
            connection, taken.run_id, taken.key, outcome.role, taken.attempt, outcome.worker, link
        ):
            return None  # taken away meanwhile: recording it again reports a late effect
        identity = advancer.identity
        held = attempts.held(connection, identity.incarnation, identity.child)
        in_hand = {item.fence for item in self._in_hand()}
        return [item for item in held if item.run_id == taken.run_id and item.fence not in in_hand]

    def still_held(self, items: Sequence[Taken]) -> list[Taken]:
        """Return those that are begun for this child, in case they were left to others and nobody answered."""
        connection, advancer = self._session.ready()
        identity = advancer.identity
        fences = {item.fence for item in attempts.held(connection, identity.incarnation, identity.child)}
        return [item for item in items if item.fence in fences]

    def take_up(self, owes: bool) -> list[Taken]:
        """Return what was begun for this child in a commit whose answer was lost; what it has run is in doubt.

        So is what was begun for another process, whose number this one has been given.
        """
        connection, advancer = self._session.ready()
        incarnation, child = advancer.identity.incarnation, advancer.identity.child
        held = attempts.held(connection, incarnation, child) if owes else []
        begun = [item for item in held if _attempt_of(item) not in self._run_already]
        keep = [item.fence for item in begun if item.fence is not None]
        for queue in liveness.give_back_child(connection, incarnation, child, keep):
            self._session.ring(connection, queue, 1)
        return begun


def _attempt_of(taken: Taken) -> tuple[str, int, str, str, int]:
    """Return what names an attempt for good; its fence may change, and a change may go unanswered."""
    return taken.run_id, _link_of(taken), taken.key, taken.role, taken.attempt


def _link_of(taken: Taken) -> int:
    return int((taken.call or {}).get("k", 0))


def _run_once(function: Callable[[], Any] | None) -> Invocation:
    if function is None:
        return Invocation(error=LookupError("the saga does not ask for this any more"), harmless=True)
    try:
        return Invocation(function())
    except BaseException as error:  # SystemExit too is a failed attempt, not the end of this process
        if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            raise  # a person's, who interrupts a test; a worker has other handlers
        return Invocation(error=error)
