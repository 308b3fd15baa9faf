"""One request of saga code and all that came of it, as the journal tells it.

Owns what can be read off such a record.  Must never change one: `fold` does, entry by entry.
"""

from __future__ import annotations

from orchestrator.machine.journal import Asked, Error, Json, Late
from orchestrator.machine.policy import COMPENSATION_RETRY, STEP_RETRY, Effect, RetryPolicy
from orchestrator.machine.states import SETTLED, Backward, Forward

WAITS = frozenset({"signal", "lock", "scope"})  # kinds of requests that no work is done for


class Step:
    """One request of saga code and all that came of it."""

    __slots__ = (
        "abandoned", "asked", "attempts", "backward", "budget_from", "details", "doubt", "error", "forgotten",
        "forward", "late", "late_result", "left", "lost", "order", "parked", "partly", "probe_attempts",
        "probe_budget_from", "quiet", "result", "signal_id", "undecided", "undo_attempts", "undo_budget_from",
    )  # fmt: skip

    def __init__(self, asked: Asked, order: int) -> None:
        self.asked = asked
        self.order = order
        self.forward = Forward.ASKED
        self.backward = Backward.NONE
        self.attempts = self.probe_attempts = self.undo_attempts = 0
        self.budget_from = self.probe_budget_from = self.undo_budget_from = 0
        self.doubt = False
        self.abandoned = False
        self.forgotten = False  # it may have been done in the time that a restore of the database forgot
        self.lost = False  # nobody knows what became of its last attempt: it may have ended its process
        self.quiet = ""
        self.details: Json = None
        self.result: Json = None
        self.error: Error | None = None
        self.parked = ""
        self.partly = False  # this child has left something that it declares an undo of
        self.left: tuple[Json, ...] = ()  # of what this child did, although it was undone
        self.undecided: list[Late] = []  # late effects that are known of before its outcome is decided
        self.late = 0  # the attempt whose late effect the undo is for
        self.late_result: Json = None  # of that attempt; what saga code was told stays `result`
        self.signal_id = ""

    @property
    def key(self) -> str:
        return self.asked.key

    @property
    def settled(self) -> bool:
        return self.forward in SETTLED

    @property
    def in_flight(self) -> bool:
        """Whether work of it is outstanding; what only waits for somebody else is not at work."""
        at_work = self.forward is Forward.ASKED and self.asked.kind not in WAITS
        return at_work or self.forward is Forward.PROBING or self.backward is Backward.ASKED

    @property
    def outlives_restore(self) -> bool:
        """Whether what it does stays when the database is set back, and is not to be done twice."""
        asked = self.asked
        return asked.kind == "step" and asked.effect != Effect.NONE and not asked.transactional

    @property
    def is_pivot(self) -> bool:
        return self.asked.effect == Effect.PIVOT

    @property
    def took_effect(self) -> bool:
        """Whether it did something, or may have."""
        return self.forward in (Forward.SUCCEEDED, Forward.UNKNOWN) and self.asked.effect != Effect.NONE

    @property
    def landed_late(self) -> bool:
        """Whether it took effect although it was settled as without, and that is not undone."""
        undone = self.backward in (Backward.NONE, Backward.DONE)
        return self.forward is Forward.REJECTED and not undone

    @property
    def was_skipped(self) -> bool:
        """Whether a person decided that not all of it is undone, in a child perhaps."""
        return self.backward is Backward.SKIPPED or self.partly

    @property
    def owes_undo(self) -> bool:
        return self.took_effect and self.asked.undo is not None and self.backward is Backward.NONE

    @property
    def owes_late_undo(self) -> bool:
        """Whether an effect that shows up now has to be undone, because its outcome was decided without it."""
        decided = self.backward is not Backward.NONE or self.forward in (Forward.UNKNOWN, Forward.REJECTED)
        return decided and self.asked.undo is not None

    @property
    def retry(self) -> RetryPolicy:
        return RetryPolicy.decode(self.asked.retry) if self.asked.retry else STEP_RETRY

    @property
    def undo_retry(self) -> RetryPolicy:
        form = self.asked.undo.retry if self.asked.undo else None
        return RetryPolicy.decode(form) if form else COMPENSATION_RETRY
