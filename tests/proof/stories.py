"""Stories of what may happen to a run: doorbells lost, workers killed, late and hung.

Owns them.  Each ends well with the engine as it is, and shows what a rule is good for when it is taken out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from orchestrator import Rejected, RetryPolicy, saga, step
from orchestrator.machine.journal import AttemptEnded, Cancel, encode
from orchestrator.store import arrivals, attempts
from orchestrator.store.turns import Taken
from tests.engine.stage import Child
from tests.proof import effects
from tests.proof.company import Company
from tests.proof.effects import EffectLog
from tests.proof.town import give_back, order, take, visit

TIMEOUT_S = 310  # a little more than an attempt may take: only then its undo may begin, if its process may live


@step(compensate=give_back, retry=RetryPolicy(timedelta(0), 1.0, timedelta(0), 2))
def pay(name: str) -> str:
    """Pay all that there is: who pays again is refused for lack of funds, and does not know that it was itself."""
    log = EffectLog.of_environment()
    if effects.read(log.path):
        raise Rejected("no funds")
    log.effect()
    return "paid"


@saga.define(name="tests.purchase")
async def purchase(name: str) -> None:
    await saga.step(pay, name)


@saga.define(name="tests.errands")
async def errands(names: list[str]) -> list[str]:
    return list(await asyncio.gather(*(saga.step(take, name) for name in names)))


def a_doorbell_is_lost(company: Company) -> None:
    company.hire()
    company.start(visit, ["a"])
    company.lose_the_bells()
    company.work()


def a_worker_dies_in_a_step(company: Company) -> None:
    company.kill_at(company.hire(), "take")
    company.start(visit, ["a"])
    company.work(2)
    company.hire()
    company.work()


def a_step_kills_each_worker(company: Company) -> None:
    """Until its attempts are used up."""
    for _ in range(6):
        company.kill_at(company.hire(), "take#0")
    company.start(visit, ["a"])
    company.work()
    company.pass_time(TIMEOUT_S)
    company.work()


def a_worker_is_late(company: Company) -> None:
    slow, quick = company.hire(), company.hire()
    company.overtake(slow, "take#0", quick.drain)
    company.start(visit, ["a", "b"])
    slow.drain()
    company.work()


def a_worker_is_late_in_the_middle(company: Company) -> None:
    slow, quick = company.hire(), company.hire()
    company.start(visit, ["a", "b"])
    company.overtake_in_the_middle(slow, quick, "take#0")
    company.work()


def _cancel(company: Company) -> None:
    """Stop the run, and let the time pass after which nothing of an attempt can land."""
    order(company.connection, "run", Cancel("ann", ""))
    company.pass_time(TIMEOUT_S)


def an_effect_comes_while_it_is_undone(company: Company) -> None:
    slow, quick = company.hire(), company.hire()
    company.start(visit, ["a"])
    company.overtake_in_the_middle(slow, quick, "take#0", "undo", first=lambda: _cancel(company))
    company.work()


def an_effect_comes_after_the_end(company: Company) -> None:
    slow, quick = company.hire(), company.hire()

    def cancel() -> None:
        _cancel(company)
        quick.drain()

    company.overtake(slow, "take#0", cancel)
    company.start(visit, ["a"])
    slow.drain()
    company.work()


def a_transaction_is_late(company: Company) -> None:
    slow, quick = company.hire(), company.hire()
    company.start(visit, ["w"])
    company.overtake_in_the_middle(slow, quick, "write_down")
    company.work()


def a_worker_dies_after_the_effect(company: Company) -> None:
    company.kill_at(company.hire(), "pay", after=True)
    company.start(purchase, "a")
    company.work(2)
    company.hire()
    company.work()
    company.pass_time(TIMEOUT_S)
    company.work()


def a_worker_dies_at_an_outcome(company: Company) -> None:
    company.kill_at_commit(company.hire(), "take")
    company.start(visit, ["a"])
    company.work(2)
    company.hire()
    company.work()


def two_outcomes_meet(company: Company) -> None:
    """Two steps of a run end at once, in two workers; what each makes of it does not know of the other."""
    one, other = company.hire(), company.hire()

    def meet(taken: Taken) -> None:
        one.runner.after = lambda taken: None
        other.drain()

    one.runner.after = meet
    company.start(errands, ["a", "b"])
    one.drain()
    company.work()


def a_workers_clock_is_ahead(company: Company) -> None:
    company.set_wall_clock(company.hire(), 7200)
    company.start(visit, ["a", "wait", "b"])
    company.work(4)
    company.pass_time(3600)
    company.work()


def a_workers_clock_is_behind(company: Company) -> None:
    company.set_wall_clock(company.hire(), -7200)
    company.start(visit, ["a"])
    company.work()


def a_step_stays_in_doubt(company: Company) -> None:
    company.hire()
    company.start(visit, ["silent", "a"])
    company.work()


def a_run_goes_back(company: Company) -> None:
    company.hire()
    company.start(visit, ["a", "w", "b", "bad"])
    company.work()


def _begin(company: Company, child: Child) -> Taken:
    """Take the first turn and begin the step that it asks for, and do no more."""
    child.runner.before = _stop
    with pytest.raises(KeyboardInterrupt):
        child.drain()
    child.runner.before = lambda taken: None
    (taken,) = attempts.held(company.connection, child.incarnation, child.number)
    return taken


def _stop(taken: Taken) -> None:
    raise KeyboardInterrupt


def a_step_hangs(company: Company) -> None:
    """In a worker that lives: its companion renews the lease for ever."""
    hung = company.hire()
    company.start(visit, ["a"])
    _begin(company, hung)
    company.hung.append(hung)
    company.hire()
    company.pass_time(TIMEOUT_S)
    company.work()


def the_author_of_an_arrival_dies(company: Company) -> None:
    """An outcome that could not be taken into a turn at once, and whoever left it is gone."""
    author = company.hire()
    company.start(visit, ["a"])
    taken = _begin(company, author)
    company.log.append("run", taken.key, 1)
    outcome = AttemptEnded(taken.key, "do", 1, "succeeded", "a!", worker="gone", began=datetime.now(UTC).isoformat())
    assert taken.fence is not None
    assert arrivals.arrive(company.connection, "run", [(taken.lane, taken.fence, encode(outcome))])
    author.close()
    company.living.remove(author)
    company.hire()
    company.work()


Story = Callable[[Company], None]
STORIES: list[Story] = [
    a_doorbell_is_lost,
    a_worker_dies_in_a_step,
    a_step_kills_each_worker,
    a_worker_is_late,
    a_worker_is_late_in_the_middle,
    an_effect_comes_while_it_is_undone,
    an_effect_comes_after_the_end,
    a_transaction_is_late,
    a_worker_dies_after_the_effect,
    a_worker_dies_at_an_outcome,
    two_outcomes_meet,
    a_workers_clock_is_ahead,
    a_workers_clock_is_behind,
    a_step_stays_in_doubt,
    a_run_goes_back,
    a_step_hangs,
    the_author_of_an_arrival_dies,
]
