"""A canvas on a real Postgres, with a failure and a crash at every link and boundary."""

from __future__ import annotations

from typing import Any

from celery import chain, chord

from orchestrator import RetryPolicy, durable, testing
from orchestrator.machine.journal import Asked, Raised
from orchestrator.testing import Environment
from tests.canvas.tasks import Order, note, price, put_back, take


def said_by(run: Any) -> list[Asked]:
    return [entry for entry in run.entries if isinstance(entry, Asked) and entry.task == note.name]


def handled_once(run: Any) -> bool:
    """Its handler was asked for once if a link failed, and never if none did."""
    failed = any(isinstance(entry, Raised) for entry in run.entries)
    return len(said_by(run)) == failed or run.state == "cancelled"


def test_wherever_a_canvas_fails_or_crashes_it_ends_and_its_handler_fires_once(database_url: str) -> None:
    orders = [Order(id=str(number), cents=number) for number in range(2)]
    canvas = chord([chain(take.s(orders[0]), price.s()), take.s(orders[1])], price.si(orders[0]))
    with Environment(database_url) as environment:
        found = testing.explore(
            durable(chain([canvas]).on_error(note.s())), (),
            invariant=handled_once, may_leave=[price, note, put_back], pairs=5, environment=environment,
        )  # fmt: skip
    assert found.tried > 60


def test_an_environment_runs_a_canvas(database_url: str) -> None:
    order = Order(id="7", cents=100)
    with Environment(database_url) as environment:
        assert environment.run(durable(chain(take.s(), price.s(more=5))), order, task_id="canvas").get() == 105
        run = environment.start(durable(price.s(), retry=RetryPolicy(maximum_attempts=1)), order, kwargs={"more": 7})
        assert (run.get(), run.history["input"]["retry"][3]) == (107, 1)
