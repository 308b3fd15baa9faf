"""One order for many runs: those that a filter finds, page by page, told first what will come of it.

Owns which runs an order makes sense for.  A dry run goes the same way and leaves nothing; what was found may move on
before it is told, and then an order that comes too late changes nothing, as always.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, get_args

from orchestrator.codec import Json, check, dumps
from orchestrator.errors import UsageError
from orchestrator.failpoints import failpoint
from orchestrator.machine.journal import Arrival, Cancel, Operate, Terminate, encode
from orchestrator.machine.states import TERMINAL, RunState
from orchestrator.store import arrivals, filters, pauses, runs
from orchestrator.store.connection import Connection
from orchestrator.store.filters import Found

Action = Literal["cancel", "terminate", "pause", "resume", "retry", "skip"]
ACTIONS: tuple[Action, ...] = get_args(Action)
_PAGE = 500  # runs that are told with one commit
_EXAMPLES = 5
_OPEN = frozenset(state.value for state in RunState) - TERMINAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which of the runs that have not ended: all that is said must hold.

    `step` is a key that is parked, or the name of its step or the last part of it; `tags` are compared as text;
    `started_after` and `started_before` are aware; `limit` takes the oldest.
    Raises: UsageError for a state that no such run has: nothing would be found, and nobody would know why.
    """

    saga: str = ""
    states: Sequence[str] = ()
    step: str = ""
    started_after: datetime | None = None
    started_before: datetime | None = None
    tags: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.states, str) or not {*self.states} <= _OPEN:
            raise UsageError(f"bulk: states= lists some of {', '.join(sorted(_OPEN))}, not {self.states!r:.80}")

    @property
    def takes_all(self) -> bool:
        """Whether nothing is said about the runs."""
        return not (self.saga or self.states or self.step or self.started_after or self.started_before or self.tags)

    def texts(self) -> dict[str, str]:
        """Return the tags as they are compared."""
        return {name: value if isinstance(value, str) else dumps(value) for name, value in self.tags.items()}


@dataclass(slots=True)
class Effects:
    """What an order came to, or would: runs found, by saga and state; how many are told; who is refused, and why."""

    action: str
    dry_run: bool
    found: Counter[tuple[str, str]] = field(default_factory=Counter)
    told: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many runs the filter found."""
        return self.found.total()

    def as_json(self) -> dict[str, Any]:
        """Return it for programs."""
        found = [{"saga": saga, "state": state, "runs": many} for (saga, state), many in sorted(self.found.items())]
        return {
            "action": self.action, "dry_run": self.dry_run, "found": found, "total": self.total, "told": self.told,
            "refused": dict(self.refused), "examples": self.examples,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be done, by whom and why."""

    action: Action
    by: str
    reason: str
    step: str = ""

    def refusal(self, run: Found, held: Collection[str] = (), done: Collection[str] = ()) -> str:
        """Say why it makes no sense for a run; the empty string if it does.

        `held` are the sagas that are paused, `done` the children that are done.
        """
        if run.id in done:
            return "done, and completed or undone with the run above only"
        if self.action == "cancel" and run.past_pivot:
            return "past its point of no return"
        if self.action == "pause" and runs.goes_back(run.state, run.error, run.past_pivot):
            return "being undone"
        if self.action == "resume" and run.state != RunState.PAUSED:
            return "not paused"
        if self.action == "resume" and run.saga in held:
            return "paused with its saga: resume that"
        if self.action in ("retry", "skip") and not self._keys(run):
            return "parked as a whole" if run.parked else "not parked"
        return ""

    def arrivals(self, run: Found) -> Iterator[tuple[Arrival, bool]]:
        """Yield what is left for a run, and whether anyone can take it: only to resume its code takes its code."""
        if self.action == "cancel":
            yield Cancel(self.by, self.reason), True
        elif self.action == "terminate":
            yield Terminate(self.by, self.reason), True
        elif self.action in ("pause", "resume"):
            yield Operate(self.action, "", self.by, self.reason), self.action == "pause"
        else:
            for key in self._keys(run):
                yield Operate(self.action, key, self.by, self.reason), bool(key)

    def _keys(self, run: Found) -> list[str]:
        keys = [str(item["key"]) for item in run.parked]
        return [key for key in keys if (key or self.action == "retry") and (not self.step or fits(key, self.step))]


def fits(key: str, step: str) -> bool:
    """Tell whether a key is the one that is meant: itself, or by the name of its step or the last part of it."""
    name = key.rpartition("/")[2].partition("#")[0]
    return step in (key, name, name.rpartition(".")[2])


def give(
    connection: Connection,
    order: Order,
    chosen: Filter,
    *,
    dry_run: bool = False,
    everything: bool = False,
    ring: Callable[[str, int], None] = lambda queue, rows: None,
) -> Effects:
    """Leave an order for all runs that a filter finds, the oldest first; each page is a transaction.

    Raises: UsageError for an action that there is not, or a filter that says nothing, unless `everything` is meant.
    """
    if order.action not in ACTIONS:
        raise UsageError(f"{order.action!r} cannot be ordered for many runs; these can: {', '.join(ACTIONS)}")
    if chosen.takes_all and not everything:
        raise UsageError("the filter says nothing, and would take every run; say everything=True if that is meant")
    check({"by": order.by, "reason": order.reason}, what="the order")
    effects = Effects(order.action, dry_run)
    held = {each.name for each in pauses.listed(connection) if each.kind == "saga" and not each.lifted}
    for page in _pages(connection, chosen):
        told = []
        done = runs.done_children(connection, [run.id for run in page]) if order.action in ("cancel", "pause") else {}
        for run in page:
            effects.found[run.saga, run.state] += 1
            if refusal := order.refusal(run, held, done):
                effects.refused[refusal] += 1
            else:
                told.append(run)
        effects.examples += [run.id for run in told[: _EXAMPLES - len(effects.examples)]]
        effects.told += len(told)
        if told and not dry_run:
            for queue, rows in _tell(connection, order, told).items():
                ring(queue, rows)
    return effects


def _pages(connection: Connection, chosen: Filter) -> Iterator[list[Found]]:
    """Yield what the filter finds, bounded pages at a time."""
    left, last = chosen.limit, None
    while left is None or left > 0:
        size = _PAGE if left is None else min(_PAGE, left)
        query = filters.unfinished(
            saga=chosen.saga, states=chosen.states, started_after=chosen.started_after, tags=chosen.texts(),
            started_before=chosen.started_before, parked=bool(chosen.step), after=last, limit=_PAGE,
        )  # fmt: skip
        rows = filters.found(connection, query)
        if not rows:
            return
        last = rows[-1]
        fit = [
            run for run in rows if not chosen.step or any(fits(str(item["key"]), chosen.step) for item in run.parked)
        ]
        fit = fit[:size]
        left = None if left is None else left - len(fit)
        yield fit


def _is_parked_at(run: Found, step: str) -> bool:
    return any(fits(str(item["key"]), step) for item in run.parked)


def _tell(connection: Connection, order: Order, told: list[Found]) -> Counter[str]:
    left: dict[bool, list[tuple[str, Json]]] = {True: [], False: []}
    for run in told:
        for arrival, anyone in order.arrivals(run):
            left[anyone].append((run.id, encode(arrival)))
    queues: Counter[str] = Counter()
    failpoint("bulk.before", connection)
    with connection.transaction():
        failpoint("bulk.begun", connection)
        for anyone, these in left.items():
            if these:
                queues.update(arrivals.leave_many(connection, these, anyone=anyone))
        failpoint("bulk.left", connection)
    failpoint("bulk.after", connection)
    return queues
