"""Why a run does not move, in words: from its row, its folded journal, its outstanding work and the workers there are.

Owns the diagnosis behind ``explain``.  Must never read the database or print: what it knows it is given.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from orchestrator.cli import words
from orchestrator.errors import as_typed
from orchestrator.machine.fold import Fold
from orchestrator.machine.journal import CancelAsked, Operated, Parked
from orchestrator.machine.record import Step
from orchestrator.machine.states import TERMINAL, Backward, RunState
from orchestrator.store.gates import LINE
from orchestrator.store.pauses import Pause
from orchestrator.store.runs import Inbox, Outstanding, Serving
from orchestrator.store.turns import ANYONE

SILENT = timedelta(seconds=15)  # a worker renews its lease twice a second; this long means that its machine is gone
_MOMENT = timedelta(seconds=2)  # what has been due for less is simply about to happen
_BEGINNING = timedelta(seconds=5)  # the slots of a worker that was just killed, or starts, are drained by nobody yet


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason; `code` is for programs, `hints` are commands that help."""

    code: str
    text: str
    key: str = ""
    hints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """All that is known of a run at one moment."""

    run: dict[str, Any]
    fold: Fold
    work: list[Outstanding]
    inbox: Inbox
    workers: list[Serving]
    pauses: list[Pause] = field(default_factory=list)
    ahead: dict[str, list[str]] = field(default_factory=dict)  # by the key of a lock: runs before this one, in order
    errors: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)  # of last attempts, by key and role

    @property
    def now(self) -> datetime:
        return self.inbox.now

    @property
    def alive(self) -> list[Serving]:
        return [worker for worker in self.workers if self.now - worker.seen_at < SILENT]

    def clock(self, at: datetime) -> str:
        return f"{words.clock(at, self.now)} ({words.ago(at, self.now)})"


def reasons(case: Case) -> list[Reason]:
    """Return why the run stands where it stands, the most telling first; never empty."""
    if case.run["state"] in TERMINAL:
        return list(_ended(case))
    found = [*_paused(case), *_stopped(case), *_parked(case)]
    found += _waiting(case)
    for item in case.work:
        found += _of_turn(case, item, bool(found)) if item.role == "turn" else _of_work(case, item)
    found += _unread(case)
    return found or [
        Reason("between", "Nothing of it is outstanding: a turn of it is being taken right now. Ask again in a moment; "
               "if it stays so, that is a fault of the engine, please report it with `saga history --json`.")
    ]  # fmt: skip


# -- ended, parked -----------------------------------------------------------------------------------------------------
def _ended(case: Case) -> Iterator[Reason]:
    run = case.run
    length = run["finished_at"] - run["started_at"]
    when = f"after {words.duration(length)}"
    if length < timedelta(0):
        when = f"before its start, which was set for {case.clock(run['started_at'])}"
    text = f"It ended {run['state']} at {case.clock(run['finished_at'])}, {when}: nothing of it is outstanding."
    yield Reason("ended", text)
    if run["error"]:
        yield Reason("error", _sentence(f"What ended it: {_unawaited(case.fold)}{_error(run['error'])}"))
    for item in run["left_effects"]:
        yield Reason("left", f"{item['key']} was not undone (its outcome: {item['outcome']}).", item["key"])


def _unawaited(fold: Fold) -> str:
    """Name the step whose failure is the run's because nobody awaited it: its own error says nothing of it."""
    if fold.raised is None or fold.returned is None:
        return ""
    keys = (key for key, step in fold.steps.items() if step.error is fold.raised)
    return next((f"{key}, which the saga asked for and never awaited, failed: " for key in keys), "")


def _error(described: dict[str, Any] | None) -> str:
    return words.error(described, words.ERROR_ROOM)


def _parked(case: Case) -> Iterator[Reason]:
    run_id = case.run["id"]
    if case.fold.parked is not None:
        forward = case.fold.parked.role == "pivot" or case.run["past_pivot"]
        text = _parked_run(case.fold.parked, forward)
        yield Reason("parked", text, "", _run_hints(run_id, forward, case.fold.parked.role == "drift"))
    for key, entry in case.fold.parked_keys.items():
        what = {"undo": f"the undo of {key}", "probe": f"the probe of {key}"}.get(entry.role, f"step {key}")
        said = f" (last error: {_error(entry.error)})" if entry.error else ""
        text = f"Parked at {what}, because {entry.why}{said}. It waits for a person to decide."
        yield Reason("parked", text, key, _key_hints(entry, run_id))


def _paused(case: Case) -> Iterator[Reason]:
    for pause in case.pauses:
        if pause.kind == "saga" and case.fold.rollback is not None:
            continue
        then = "nothing of it is taken" if pause.kind == "queue" else "its runs ask for nothing new"
        text = f"{_capital(pause.kind)} {pause.name} is paused by {_who(pause)}: {then} until it is resumed."
        yield Reason("paused", text, "", (f"saga resume --{pause.kind} {as_typed(pause.name)}",))
    if case.fold.rollback is None and "" in case.fold.pauses:
        text = f"Paused by {_who(case.fold.pauses[''])}. It asks for nothing new until it is resumed."
        yield Reason("paused", text, "", (f"saga resume {as_typed(str(case.run['id']))}",))


def _stopped(case: Case) -> Iterator[Reason]:
    """A decision to go back is put off for as long as nobody knows whether its pivot has succeeded."""
    fold = case.fold
    if isinstance(fold.stop, CancelAsked) and fold.rollback is None and fold.pivots_in_flight:
        told = f"It was told to stop by {_who(fold.stop)}."
        text = f"{told} That is decided by what becomes of its pivot, which is under way."
        yield Reason("stopped", text)


def _who(paused: Pause | Operated | CancelAsked) -> str:
    return (paused.by or "an unnamed caller") + (f" ({paused.reason})" if paused.reason else "")


def _waiting(case: Case) -> Iterator[Reason]:
    """What it waits for that is no work of its own."""
    fold, run_id = case.fold, case.run["id"]
    if fold.reported and not fold.revoked:
        parent = fold.info.parent
        text = f"It is done, and stays revocable until its parent {parent} has ended."
        yield Reason("reported", text, "", (f"saga explain {as_typed(parent)}",))
    for key, step in fold.waiting.items():
        if step.asked.kind == "signal":
            hint = f"saga signal {as_typed(run_id)} {as_typed(step.asked.task)} PAYLOAD"
            yield Reason("signal", f"It waits for signal {step.asked.task}.", key, (hint,))
        elif step.asked.kind == "lock":
            ahead = case.ahead.get(key, [])
            behind = f", behind {', '.join(ahead)}" if ahead else ""
            hints = (f"saga explain {as_typed(ahead[0])}",) if ahead else ()
            yield Reason("lock", f"It waits for lock {step.asked.task}{behind}.", key, hints)
    for key, step in fold.steps.items() if fold.info.parent else ():
        if step.is_pivot and not step.settled and key not in fold.granted:
            yield Reason("pivot", f"{key} is a pivot of a child and waits for its root to grant it.", key)
    for step in fold.children:
        if step.in_flight:
            child = fold.info.child(step.key)
            doing = "is undone" if step.backward is Backward.ASKED else "ends"
            yield Reason(
                "child", f"It waits until its child {child} {doing}.", step.key, (f"saga explain {as_typed(child)}",)
            )


def _parked_run(entry: Parked, forward: bool) -> str:
    detail = f" ({_error(entry.error)})" if entry.error and not words.says(entry.why, entry.error) else ""
    only_forward = "It is past its point of no return and cannot be undone: mend the code and retry, or resolve it."
    then = {
        "drift": "Its saga code no longer asks for what its journal recorded: mend the code, deploy, and retry.",
        "code": "Mend the code, deploy, and retry; or cancel the run, which undoes what it did.",
    }.get(entry.role, "It waits for a person to decide.")
    then = only_forward if forward else then
    why = words.cut(entry.why, 0 if entry.role == "drift" else words.ERROR_ROOM)  # a drift's end says what to do
    return f"{_sentence(f'Parked as a whole: {why}{detail}')} {then}"


def _run_hints(run_id: str, forward: bool, drifted: bool) -> tuple[str, ...]:
    run_id = as_typed(run_id)
    last = f"saga resolve {run_id} --result JSON" if forward else f"saga cancel {run_id}"
    difference = (f"saga replay {run_id}    # the difference",) if drifted else ()
    return (f"saga retry {run_id}", last, *difference, f"saga history {run_id} --traceback")


def _key_hints(entry: Parked, run_id: str) -> tuple[str, ...]:
    target = f"{as_typed(run_id)} {shlex.quote(entry.key)}"
    if entry.role == "undo":
        return (
            f"saga retry {target}      # try the undo again",
            f"saga resolve {target}    # you undid it yourself",
            f"saga skip {target}       # leave the effect",
        )
    return (
        f"saga retry {target}",
        f"saga resolve {target} --result JSON    # it happened",
        f"saga resolve {target} --no-effect      # it did not happen",
    )


# -- the next turn -----------------------------------------------------------------------------------------------------
def _of_turn(case: Case, item: Outstanding, waits: bool) -> Iterator[Reason]:
    if item.due_at - case.now > LINE / 2:
        return  # put aside, because its saga is paused
    if item.due_at > case.now:
        yield from _sleeping(case, item, waits)
        return
    soon = Reason("turn", "Its next turn is due right now and about to be taken.")
    yield from _due(case, item, "its next turn", soon)


def _sleeping(case: Case, item: Outstanding, waits: bool) -> Iterator[Reason]:
    """Say when its turn is due; `waits` tells that something else is known for which it stands there."""
    due, deadline = item.due_at, case.run["deadline_at"]
    if case.run["state"] == RunState.PENDING:
        yield Reason("start", f"It has not started: its start is set for {case.clock(due)}, by eta or countdown.")
        return
    if case.run["started_at"] > case.now:  # it was paused before its start
        start = case.clock(case.run["started_at"])
        yield Reason("start", f"It has not started: its start is set for {start}, by eta or countdown.")
    if deadline is not None and due >= deadline and not case.fold.deadline_passed:
        if case.fold.rollback is not None:
            return  # it is being undone already: the deadline changes nothing
        others = waits or any(other.role != "turn" for other in case.work)
        after = "nothing changes, because it is past its pivot" if case.run["past_pivot"] else "it is undone"
        text = f"Its deadline is {case.clock(deadline)}; then {after}."
        yield Reason("deadline", text if others else f"It waits for nothing but its deadline. {text}")
    else:
        yield Reason("timer", f"It sleeps: a timer wakes it at {case.clock(due)}.")


# -- steps, undos, probes ----------------------------------------------------------------------------------------------
def _of_work(case: Case, item: Outstanding) -> Iterator[Reason]:
    step = case.fold.steps.get(item.key)
    if item.begun:
        yield _running(case, item, step)
    elif item.in_line or (item.limit and item.due_at > case.now):
        yield _in_line(item)
        if problem := _taker_problem(case, item, _name(item)):
            yield problem
    elif item.due_at > case.now:
        yield _later(case, item, step)
    else:
        soon = Reason("due", f"{_capital(_name(item))} is due right now and about to begin.", item.key)
        yield from _due(case, item, _name(item), soon)


def _due(case: Case, item: Outstanding, what: str, soon: Reason) -> Iterator[Reason]:
    if problem := _taker_problem(case, item, what):
        yield problem
    elif any(pause.kind == "queue" and pause.name == item.queue for pause in case.pauses):
        return  # that has been told
    else:
        yield soon if case.now - item.due_at <= _MOMENT else _waiting_its_turn(case, item, _capital(what), soon)


def _running(case: Case, item: Outstanding, step: Step | None) -> Reason:
    name, nth = _name(item), _attempt(item, step, item.attempt)
    lives = [worker for worker in case.workers if worker.node == item.node]
    worker = max(lives, key=lambda life: life.seen_at, default=None)
    if item.node_dead or item.node is None:
        text = f"The worker that ran {name} ({nth}) is dead; a living worker gives the attempt back within seconds."
        hint = "" if case.alive else " But no worker is running at all: start one."
        return Reason("worker lost", text + hint, item.key)
    since = case.clock(item.begun_at or item.due_at)
    if worker is not None and worker not in case.alive:
        silent = words.duration(case.now - worker.seen_at)
        text = f"{_capital(name)} ({nth}) began on {item.node} at {since}, but that worker is silent for {silent}."
        return Reason(
            "worker silent", f"{text} The next worker that runs notices and gives the attempt back.", item.key
        )
    stop = " It was told to stop at its next heartbeat." if item.stop else ""
    ends = f", times out at {case.clock(item.deadline_at)}" if item.deadline_at else ""
    beat = ""
    if item.expires_at and item.deadline_at and item.expires_at < item.deadline_at:
        beat = f", is given up without a heartbeat before {case.clock(item.expires_at)}"
    return Reason("running", f"Running {name} ({nth}) on {item.node} since {since}{ends}{beat}.{stop}", item.key)


def _in_line(item: Outstanding) -> Reason:
    """A step that has to pass a gate, and was not let in yet."""
    limit = item.limit or {}
    most = limit.get("most")
    if most is not None and item.let_in >= most:
        slots = "for the only slot" if most == 1 else f"for one of {most} slots"
        return Reason("concurrency", f"{_capital(_name(item))} waits {slots} of {limit['gate']}.", item.key)
    rate = f" under rate limit {limit['rate']}" if "rate" in limit else ""
    return Reason("rate limit", f"{_capital(_name(item))} waits for its turn{rate} of {limit.get('gate')}.", item.key)


def _later(case: Case, item: Outstanding, step: Step | None) -> Reason:
    due = case.clock(item.due_at)
    last = case.errors.get((item.key, "do" if item.role == "once" else item.role))
    if step is not None and step.quiet and item.role in ("undo", "probe"):
        quiet = datetime.fromisoformat(step.quiet)
        if abs(quiet - item.due_at) < _MOMENT:
            text = (
                f"{_capital(_name(item))} waits until {due}: until then an attempt that was lost may still take effect."
            )
            return Reason("quiet", text, item.key)
    nth = _attempt(item, step, item.attempt + 1)
    said = f" {_sentence(f'The last attempt failed: {_error(last)}')}" if last else ""
    left = words.duration(item.due_at - case.now)
    problem = _taker_problem(case, item, _name(item))
    more = f" Then: {problem.text[0].lower()}{problem.text[1:]}" if problem else ""
    return Reason(
        "retry",
        f"{_capital(_name(item))}: {nth} in {left}, at {words.clock(item.due_at, case.now)}.{said}{more}",
        item.key,
    )


def _attempt(item: Outstanding, step: Step | None, attempt: int) -> str:
    if step is None or item.role == "probe":
        return f"attempt {attempt}"
    policy = step.undo_retry if item.role == "undo" else step.retry
    budget_from = step.undo_budget_from if item.role == "undo" else step.budget_from
    word = "retry" if attempt - budget_from > 1 else "attempt"
    return f"{word} {attempt - budget_from} of {policy.maximum_attempts}"


def _name(item: Outstanding) -> str:
    of = "" if item.task in item.key else f" ({item.task})"  # an item of a map, or a call with a key of its own
    names = {"undo": f"the undo of {item.key}", "probe": f"the probe of {item.key}"}
    return names.get(item.role, f"step {item.key}{of}")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


# -- who could take it -------------------------------------------------------------------------------------------------
def _taker_problem(case: Case, item: Outstanding, what: str) -> Reason | None:
    """Return why no worker can take this, None if one can."""
    if not case.alive:
        return Reason("no worker", f"No worker is running: {what} waits for one. Start one that serves queue "
                      f"{item.queue!r}.", item.key, (f"celery -A <app> worker -Q {item.queue}",))  # fmt: skip
    serving = [worker for worker in case.alive if item.queue in worker.queues]
    if not serving:
        known = ", ".join(sorted({queue for worker in case.alive for queue in worker.queues}))
        text = f"No worker serves queue {item.queue!r}, where {what} waits (workers serve: {known})."
        return Reason("no queue", text, item.key, (f"celery -A <app> worker -Q {item.queue}",))
    if any(_takes(worker, item) for worker in serving):
        return None
    nodes = ", ".join(worker.node for worker in serving)
    saga, at, version = item.target.rpartition("@")
    if at:
        return _pinned(case, item, saga, version, serving)
    elsewhere = sorted({worker.node for worker in case.alive if item.target in worker.targets})
    else_ = f" ({', '.join(elsewhere)} knows it, but does not serve that queue)" if elsewhere else ""
    text = f"Queue {item.queue!r} is served by {nodes}, but none of them knows task {item.target}{else_}."
    return Reason("no task", f"{text} Deploy it there.", item.key)


def _takes(worker: Serving, item: Outstanding) -> bool:
    """Tell whether a worker takes this: a turn that resumes no saga code is for anyone who serves the queue."""
    return item.queue in worker.queues and (item.target == ANYONE or item.target in worker.targets)


def _pinned(case: Case, item: Outstanding, saga: str, version: str, serving: list[Serving]) -> Reason:
    others = sorted(
        {t.rpartition("@")[2] for worker in serving for t in worker.targets if t.startswith(f"{saga}@")}, key=_number
    )
    nodes = ", ".join(worker.node for worker in serving)
    if others:
        text = (
            f"The run is pinned to version {version} of {saga}, which no worker of queue {item.queue!r} has "
            f"(they have version {', '.join(others)}). Deploy code that still registers version {version}."
        )
        return Reason("no version", text, item.key)
    text = f"Queue {item.queue!r} is served by {nodes}, but none of them knows saga {saga}. Deploy its code there."
    return Reason("no saga", text, item.key)


def _number(version: str) -> tuple[int, str]:
    return (int(version) if version.isdigit() else 0, version)


def _waiting_its_turn(case: Case, item: Outstanding, what: str, soon: Reason) -> Reason:
    fit = [worker for worker in case.alive if _takes(worker, item)]
    slots, busy = sum(worker.slots for worker in fit), sum(min(worker.draining, worker.slots) for worker in fit)
    waited = words.duration(case.now - item.due_at)
    nodes = ", ".join(worker.node for worker in fit)
    if busy >= slots:
        text = f"{what} has been due for {waited}: all {slots} slots of {nodes} are busy. It is taken in its turn."
        return Reason("busy", text, item.key)
    if case.now - item.due_at <= _BEGINNING:
        return soon
    text = (
        f"{what} has been due for {waited} though {slots - busy} of {slots} slots of {nodes} are free: is the "
        "broker up? The pump rings again every second."
    )
    return Reason("not taken", text, item.key, ("celery -A <app> status",))


def _unread(case: Case) -> Iterator[Reason]:
    if case.inbox.unread and case.inbox.since is not None:
        some = "1 arrival waits" if case.inbox.unread == 1 else f"{case.inbox.unread} arrivals wait"
        yield Reason("arrivals", f"{some} to be read by its next turn, since {case.clock(case.inbox.since)}.")
