"""What follows from an arrival, and how a run goes back: outcomes, undo, pivot, parking.

Owns the rules of chapter "outcomes and undo" of docs/concepts.md.  Must never run saga code: it works from the journal
alone, so that a run can be undone when its code is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import assert_never

from orchestrator.machine import blocks, family, restore
from orchestrator.machine.fold import Fold
from orchestrator.machine.journal import (
    Abandoned,
    Arrival,
    Attempted,
    AttemptEnded,
    Cancel,
    CancelAsked,
    CancelRefused,
    Cleared,
    Conclude,
    Ended,
    Entry,
    Json,
    Late,
    LateSuccess,
    NewChild,
    Operate,
    Operated,
    Parked,
    PivotNews,
    Post,
    ProbeAsked,
    Restore,
    Returned,
    Revoke,
    RollbackBegan,
    Settled,
    Signal,
    Signalled,
    Terminate,
    UndoAsked,
    Undone,
    Withdrawn,
    Work,
)
from orchestrator.machine.policy import COMPENSATION_RETRY, START_TO_CLOSE, Effect
from orchestrator.machine.record import WAITS, Step
from orchestrator.machine.states import Backward, Forward, RunState


class Decisions:
    """What one turn decides: entries to append, work to schedule, keys whose work is to be taken back."""

    def __init__(self, fold: Fold, now: datetime) -> None:
        self.fold = fold
        self.now = now
        self.entries: list[Entry] = []
        self.work: list[Work] = []
        self.withdraw: list[str] = []
        self.corrections: list[Late] = []
        self.children: list[NewChild] = []
        self.posts: list[Post] = []
        self.locks: list[Step] = []
        self.unlocks: list[str] = []  # handles of locks

    def record(self, entry: Entry) -> None:
        """Append `entry` and fold it."""
        self.fold.apply(entry)
        self.entries.append(entry)
        if type(entry) is Settled and entry.key in self.fold.granted:
            family.pivot_settled(self, entry.key)

    # -- arrivals ------------------------------------------------------------------------------------------------------
    def take(self, arrival: Arrival) -> None:
        """Decide what follows from `arrival`; one that comes too late to matter changes nothing."""
        match arrival:
            case LateSuccess() if arrival.link != self.fold.info.link:
                # The link that asked for it has ended; its own journal takes it in.
                self.posts.append(Post(f"{self.fold.info.id}~{arrival.link + 1}", arrival, anyone=True))
            case LateSuccess():
                self._take_late(arrival)
            case Revoke():
                family.take_revoke(self)
            case PivotNews():
                family.take_pivot(self, arrival)
            case _ if self.fold.ended:
                pass
            case AttemptEnded():
                self._take_attempt(arrival)
            case Withdrawn():
                self._take_withdrawn(self.fold.steps[arrival.key])
            case Cancel():
                if self.fold.reported:
                    self.record(CancelRefused("reported"))
                elif self.fold.rollback is None and self.fold.stop is None:
                    self.record(CancelAsked(arrival.by, arrival.reason))
            case Conclude():
                family.take_conclude(self)
            case Restore():
                restore.take(self, arrival)
            case Terminate():
                self.record(Operated("terminate", "", arrival.by, arrival.reason))
                self.end(RunState.TERMINATED)
            case Operate():
                self._take_operator(arrival)
            case Signal():
                if (arrival.name, arrival.id) not in self.fold.signal_ids:
                    self.record(Signalled(arrival.name, arrival.id, arrival.payload))
            case _:
                assert_never(arrival)

    def _take_attempt(self, ended: AttemptEnded) -> None:
        step = self.fold.steps.get(ended.key)
        if step is None or ended.child not in ("", self.fold.info.child(ended.key)):
            return
        if ended.role == "undo":
            if step.backward is Backward.ASKED:
                self._undo_ended(step, ended)
        elif ended.role == "probe":
            if step.forward is Forward.PROBING:
                self._probe_ended(step, ended)
        elif step.forward is Forward.ASKED:
            self._do_ended(step, ended)

    def _do_ended(self, step: Step, ended: AttemptEnded) -> None:
        if ended.verdict == "succeeded":
            self._settle(step, "succeeded", ended)
        elif ended.verdict == "rejected" and not step.doubt:
            if step.asked.effect == Effect.RETRIABLE and self.fold.past_pivot and not step.abandoned:
                self._attempt_failed(step, ended)
                self.park(step, "do", "it was rejected after the point of no return")
            else:
                self._settle(step, "rejected", ended)
        else:
            self._attempt_failed(step, ended)
            tries = step.attempts - step.budget_from
            final = ended.verdict == "rejected" or tries >= step.retry.maximum_attempts
            if final or step.abandoned or self.fold.rollback:
                self.settle_unknown(step)
            else:
                pause = step.retry.delay(tries) if ended.pause is None else timedelta(seconds=ended.pause)
                self.work.append(self.do_work(step, self.now + pause))

    def _attempt_failed(self, step: Step, ended: AttemptEnded) -> None:
        self.record(
            Attempted(
                step.key, ended.attempt, ended.error or {}, ended.role, ended.verdict == "doubt", ended.worker,
                ended.began, ended.quiet, ended.details,
            )
        )  # fmt: skip

    def _settle(self, step: Step, outcome: str, ended: AttemptEnded, result: Json = None, by: str = "") -> None:
        value = ended.result if outcome == "succeeded" else result
        self.record(
            Settled(
                step.key,
                outcome,
                step.attempts if by else ended.attempt,
                value,
                ended.error,
                ended.worker,
                ended.began,
                by,
            )
        )

    def settle_unknown(self, step: Step) -> None:
        """A step ended in doubt: settle it as its author declared, or ask a person; never guess."""
        asked = step.asked
        goes_back = bool(self.fold.rollback or step.abandoned)
        only_forward = not goes_back and (self.fold.past_pivot or asked.effect == Effect.RETRIABLE)
        if not (step.doubt or only_forward):
            self._settle_by(step, "rejected")  # every attempt of it is known to have had no effect
        elif asked.effect == Effect.NONE or asked.kind == "once":
            self._settle_by(step, "failed")
        elif asked.effect == Effect.PIVOT and not asked.probe:
            self.park(step, "do", "its outcome is unknown and it is the point of no return, so nothing may be guessed")
        elif asked.probe and (asked.on_unknown == "probe" or asked.effect == Effect.PIVOT):
            self.ask_provider(step)
        elif asked.on_unknown == "park":
            self.park(step, "do", "its outcome is unknown, and it is declared on_unknown='park'")
        elif goes_back:
            self._settle_by(step, "unknown")  # the rollback undoes it when its turn comes
        elif only_forward:
            self.park(step, "do", "it keeps failing after the point of no return, so that the run can only go forward")
        elif asked.undo is not None:
            self.begin_undo(step)
        else:
            self._settle_by(step, "unknown")

    def _settle_by(self, step: Step, outcome: str, by: str = "", result: Json = None) -> None:
        error = None if outcome == "succeeded" else step.error
        self.record(Settled(step.key, outcome, step.attempts, result, error, by=by))

    def ask_provider(self, step: Step) -> None:
        """Ask the probe of a step what became of it."""
        self.record(ProbeAsked(step.key))
        self.work.append(self.probe_work(step))

    def park(self, step: Step, role: str, why: str) -> None:
        """Leave a step to a person."""
        self.record(Parked(step.key, role, why, step.error))

    def _take_withdrawn(self, step: Step) -> None:
        if step.forward is not Forward.ASKED:
            return
        if step.attempts == 0 and not step.doubt:
            self.record(Settled(step.key, "withdrawn"))
        else:
            self.settle_unknown(step)

    def _probe_ended(self, step: Step, ended: AttemptEnded) -> None:
        if ended.verdict == "succeeded" and ended.result is not None:
            self._settle_by(step, "succeeded", "probe", ended.result)
        elif ended.verdict == "succeeded" and step.forgotten and not (step.abandoned or self.fold.rollback):
            self.record(Cleared(step.key))
            self.work.append(self.do_work(step))
        elif ended.verdict == "succeeded":
            self._settle_by(step, "rejected", "probe")
        else:
            self._attempt_failed_aside(step, ended)
            tries = step.probe_attempts - step.probe_budget_from
            if tries >= COMPENSATION_RETRY.maximum_attempts:
                self.record(
                    Parked(step.key, "probe", "its probe keeps failing, so that its outcome stays unknown", ended.error)
                )
            else:
                self.work.append(self.probe_work(step, self.now + COMPENSATION_RETRY.delay(tries)))

    def _attempt_failed_aside(self, step: Step, ended: AttemptEnded) -> None:
        """Record a failed undo or probe, which says nothing about the step's own outcome."""
        self.record(Attempted(step.key, ended.attempt, ended.error or {}, ended.role, True, ended.worker, ended.began))

    def _undo_ended(self, step: Step, ended: AttemptEnded) -> None:
        if ended.verdict == "succeeded":
            told = ended.error or {}  # by a child
            how, left = "partly" if told.get("partly") else "done", tuple(told.get("left", ()))
            self._undo_done(step, Undone(step.key, ended.attempt, how, ended.worker, ended.began, left))
            return
        self._attempt_failed_aside(step, ended)
        policy = step.undo_retry
        tries = step.undo_attempts - step.undo_budget_from
        if ended.verdict == "rejected" or tries >= policy.maximum_attempts:
            why = "its undo was rejected" if ended.verdict == "rejected" else f"its undo failed {tries} times"
            self.record(Parked(step.key, "undo", why, ended.error))
        else:
            pause = policy.delay(tries) if ended.pause is None else timedelta(seconds=ended.pause)
            self.work.append(self.undo_work(step, self.now + pause))

    def _undo_done(self, step: Step, undone: Undone) -> None:
        self.record(undone)
        if step.forward is Forward.UNDOING:
            self._settle_by(step, "unknown", "undo")

    def _take_late(self, late: LateSuccess) -> None:
        step = self.fold.steps.get(late.key)
        if late.role != "do" or step is None:
            return
        entry = Late(late.key, late.attempt, late.result, late.worker)
        self.record(entry)
        if self.fold.ended and step.owes_late_undo:
            self.corrections.append(entry)

    # -- operators -----------------------------------------------------------------------------------------------------
    def _take_operator(self, order: Operate) -> None:
        if order.action in ("pause", "resume"):
            self._hold_or_let_go(order)
            return
        if not order.key:
            self._operate_run(order)
            return
        step = self.fold.steps.get(order.key)
        if step is None or not step.parked:
            return
        role = step.parked
        self.record(Operated(order.action, order.key, order.by, order.reason))
        if order.action == "retry":
            if role == "undo":
                self._order_undo(step)
            else:
                self.work.append(self.probe_work(step) if role == "probe" else self.do_work(step))
        elif role == "undo":
            how = "skipped" if order.action == "skip" else "resolved"
            told = self.fold.parked_keys[step.key].error or {}
            left = tuple(told.get("left", ())) if order.action == "skip" else ()
            self._undo_done(step, Undone(step.key, step.undo_attempts, how, left=left))
        elif order.action == "skip":
            self._settle_by(step, "unknown", order.by)
        elif order.no_effect:
            self._settle_by(step, "rejected", order.by)
        else:
            self._settle_by(step, "succeeded", order.by, order.value)

    def _hold_or_let_go(self, order: Operate) -> None:
        """Pause or resume, each cause by itself and once, and the children too; a run that goes back is not held up.

        Nor is a child that is done: its parent, which knows it as done by then, would not let it go.
        """
        held = order.cause in self.fold.pauses
        if (order.action == "resume") is held and self.fold.rollback is None and not self.fold.reported:
            self.record(Operated(order.action, "", order.by, order.reason, order.cause))
            family.pass_on(self, order)

    def _operate_run(self, order: Operate) -> None:
        if self.fold.parked is None:
            return
        if order.action == "retry":
            self.record(Operated("retry", "", order.by, order.reason))
            blocks.take_back(self)
        elif order.action == "resolve":
            self.record(Operated("resolve", "", order.by, order.reason))
            for step in list(self.fold.waiting.values()):
                if step.asked.kind != "scope" or not blocks.can_be_undone(self.fold, step):
                    self.give_up(step)
            self.record(Returned(order.value))  # and it ends as if its function had, once nothing is outstanding

    # -- requests that wait for somebody else --------------------------------------------------------------------------
    def answer(self) -> None:
        """Give those who wait what has come for them, the oldest request first."""
        if self.fold.ended:
            return  # somebody terminated it in this very turn
        for step in list(self.fold.waiting.values()):
            if step.settled:
                continue  # a scope within one that was looked at just before, and which gave it up
            if step.asked.kind == "signal" and self.fold.signals.get(step.asked.task):
                signal = self.fold.signals[step.asked.task][0]
                self.record(Settled(step.key, "succeeded", result=signal.payload, by=signal.id))
            elif step.asked.kind == "scope":
                blocks.undo_scope(self, step)

    def give_up(self, step: Step) -> None:
        """Note that nobody waits for `step` any more; what has not begun is taken back, what has is told to stop."""
        self.record(Abandoned(step.key))
        if step.asked.kind == "lock":
            blocks.unlock(self, step.key)
        if step.forward is not Forward.ASKED:
            return
        if step.asked.kind in WAITS:
            self.record(Settled(step.key, "withdrawn"))
        elif step.asked.kind == "child":
            family.give_up(self, step)
        elif not family.waits_for_grant(self.fold, step):
            self.withdraw.append(step.key)

    # -- going back ----------------------------------------------------------------------------------------------------
    def conclude(self) -> None:
        """Decide on stopping, roll back what is due, end the run when nothing is left to do."""
        if self.fold.ended:
            return
        self._undo_late_effects()
        self._decide_stop()
        if self.fold.rollback:
            self._roll_back()
        elif self.fold.returned and not (self.fold.raised or self.fold.paused or self._busy):
            self._undo_abandoned()
            if not self._busy:
                self._end_well()
        else:
            self._undo_abandoned()

    def _end_well(self) -> None:
        """A child only reports that it is done: it ends with its root."""
        fold = self.fold
        if not fold.info.parent or fold.concluded:
            self.end(RunState.COMPLETED)
        elif not fold.reported:
            family.report(self)

    @property
    def outstanding(self) -> bool:
        """Whether anything that the run asked for is not done with."""
        return self._busy or bool(self.fold.abandoned_effects or self.fold.late_effects)

    @property
    def _busy(self) -> bool:
        return bool(self.fold.unsettled or self.fold.in_flight or self.fold.parked_keys)

    def _decide_stop(self) -> None:
        fold = self.fold
        if not (fold.stop or fold.raised or fold.revoked) or fold.rollback or fold.pivots_in_flight:
            return
        if fold.revoked and not fold.past_pivot:
            self._begin_rollback(RollbackBegan("parent", family.error_of_revoke()))
        elif fold.past_pivot:
            if fold.stop:
                self.record(CancelRefused("cancel" if isinstance(fold.stop, CancelAsked) else "deadline"))
            if fold.raised and not fold.parked:
                why = "the saga raised after its point of no return, so that it can only go forward"
                self.record(Parked("", "pivot", why, fold.raised))
        elif isinstance(fold.stop, CancelAsked):
            self._begin_rollback(RollbackBegan("cancel"))
        elif fold.stop:
            error = {"type": "DeadlineExceeded", "message": f"the run's deadline {fold.info.deadline} has passed"}
            self._begin_rollback(RollbackBegan("deadline", error))
        else:
            self._begin_rollback(RollbackBegan("error"))  # the error is in the entry before

    def _begin_rollback(self, entry: RollbackBegan) -> None:
        """Decide to undo; what has not begun is taken back, what has begun is told to stop."""
        self.record(entry)
        for step in self.fold.steps.values():
            if not step.abandoned and step.forward is Forward.ASKED:
                self.give_up(step)

    def _roll_back(self) -> None:
        """Undo the youngest effect: one at a time, so that the order is exactly reversed; end after the last."""
        if self._busy:
            return
        step = self.fold.next_undo()
        if step is None:
            self._end_rolled_back()
        else:
            self.begin_undo(step)

    def _undo_abandoned(self) -> None:
        for step in list(self.fold.abandoned_effects.values()):
            self.begin_undo(step)

    def _undo_late_effects(self) -> None:
        for late in list(self.fold.late_effects):
            step = self.fold.steps[late.key]
            if step.backward not in (Backward.ASKED, Backward.PARKED):
                self.record(UndoAsked(step.key, late.attempt, late.result))
                self._order_undo(step)

    def begin_undo(self, step: Step) -> None:
        """Order the compensation of a step: from here on no forward attempt of it can start."""
        self.record(UndoAsked(step.key))
        self._order_undo(step)

    def _order_undo(self, step: Step) -> None:
        if step.asked.kind == "child":
            family.revoke(self, step)
        else:
            self.work.append(self.undo_work(step))

    def _end_rolled_back(self) -> None:
        steps = self.fold.steps.values()
        assert self.fold.rollback is not None
        if self.fold.rollback.cause == "cancel":
            self.end(RunState.CANCELLED)
        elif any(s.backward is Backward.DONE for s in steps) and not any(s.was_skipped for s in steps):
            self.end(RunState.COMPENSATED)
        else:
            self.end(RunState.CANCELLED if self.fold.revoked else RunState.FAILED)

    def end(self, state: RunState) -> None:
        """End the run and list what is left of it; what this very turn wanted done is not begun any more."""
        self.work.clear()
        self.record(Ended(state.value, tuple(self._left(state))))
        family.ended(self, state)
        if state is RunState.CONTINUED:
            blocks.unlock_doubles(self)
        else:
            blocks.unlock_all(self)

    def _left(self, state: RunState) -> Iterator[Json]:
        for step in self.fold.steps.values():
            possible = not step.settled and state is RunState.TERMINATED and step.asked.effect != Effect.NONE
            took = step.took_effect and step.backward is not Backward.DONE
            if state in (RunState.COMPLETED, RunState.CONTINUED):  # it stays, as it was meant to
                meant = step.backward is Backward.NONE and not step.abandoned and step.forward is Forward.SUCCEEDED
                took = took and not meant
            if (took or possible or step.landed_late) and step.asked.kind == "step":
                outcome = "succeeded" if step.landed_late else step.forward if step.settled else "unknown"
                yield {"key": step.key, "task": step.asked.task, "outcome": str(outcome)}
            for item in (*(step.error or {}).get("left", ()), *step.left) if step.asked.kind == "child" else ():
                yield {**item, "key": f"{step.key}/{item['key']}"}

    # -- work ----------------------------------------------------------------------------------------------------------
    def do(self, step: Step) -> None:
        """Have a step done, unless it may have been done already in a time that is forgotten."""
        if step.forgotten:
            restore.find_out(self, step)
        else:
            self.work.append(self.do_work(step))

    def do_work(self, step: Step, due: datetime | None = None) -> Work:
        """Return the next forward attempt of `step`."""
        asked = step.asked
        call = self._call(step, asked.args, asked.timeout)
        if asked.heartbeat:
            call["h"] = asked.heartbeat
        if asked.retry and asked.retry[4]:
            call["x"] = asked.retry[4]
        if asked.transactional:
            call["n"] = 1
        if asked.limit:
            call["g"] = asked.limit
        if step.details is not None:
            call["d"] = step.details
        role = "once" if asked.kind == "once" else "do"
        return Work(step.key, role, asked.task, asked.queue, call, due, step.attempts, asked.local, asked.priority)

    def probe_work(self, step: Step, due: datetime | None = None) -> Work:
        """Return the next attempt of asking what became of `step`."""
        call = self._call(step, step.asked.args, step.asked.timeout)
        due = self._not_before_quiet(step, due)
        return Work(step.key, "probe", step.asked.probe, step.asked.queue, call, due, step.probe_attempts)

    def undo_work(self, step: Step, due: datetime | None = None) -> Work:
        """Return the next attempt of the compensation of `step`."""
        undo = step.asked.undo
        assert undo is not None
        args = (
            dict(undo.args)
            if undo.args is not None
            else {n: step.asked.args[n] for n in undo.names if n in step.asked.args}
        )
        if undo.result:
            args["result"] = step.late_result if step.late else step.result
        call = self._call(step, args, undo.timeout)
        if step.late:
            call["l"] = step.late
        if self.fold.rollback and self.fold.rollback.undoes:
            call["u"] = self.fold.rollback.undoes
        if undo.retry and undo.retry[4]:
            call["x"] = undo.retry[4]
        if undo.limit:
            call["g"] = undo.limit
        due = self._not_before_quiet(step, due)
        return Work(step.key, "undo", undo.task, undo.queue or step.asked.queue, call, due, step.undo_attempts)

    def _call(self, step: Step, args: Json, timeout: float) -> dict[str, Json]:
        call: dict[str, Json] = {"a": args, "t": timeout or START_TO_CLOSE.total_seconds()}
        if self.fold.info.link:
            call["k"] = self.fold.info.link
        if step.lost:
            call["w"] = 1
        if self.fold.restored:
            call["r"] = self.fold.restored.by
        return call

    def _not_before_quiet(self, step: Step, due: datetime | None) -> datetime | None:
        """An undo or a probe must not overtake an attempt whose process may still be at work."""
        if not step.quiet:
            return due
        quiet = datetime.fromisoformat(step.quiet)
        return quiet if due is None or quiet > due else due
