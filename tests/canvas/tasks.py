"""Plain Celery tasks, such as a user has had for years, and a few steps."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from celery import shared_task
from pydantic import BaseModel

from orchestrator import Rejected, RetryPolicy, step

SAID: list[Any] = []
"""What the tasks of this process were told, in order."""
AT_ONCE = RetryPolicy(initial_interval=timedelta(0), maximum_interval=timedelta(0), maximum_attempts=2)


@shared_task(name="canvas.add")
def add(x: Any, y: Any = 0) -> Any:
    return x + y


@shared_task(name="canvas.total")
def total(numbers: list[int]) -> int:
    return sum(numbers)


@shared_task(name="canvas.same")
def same(value: Any) -> Any:
    return value


@shared_task(name="canvas.call")
def call(*args: Any, **kwargs: Any) -> Any:
    """Answer what it was called with."""
    return [list(args), kwargs]


@shared_task(name="canvas.fail")
def fail(*args: Any) -> None:
    raise ValueError("boom")


@shared_task(name="canvas.say")
def say(*args: Any) -> None:
    SAID.append(args[0] if len(args) == 1 else args)


@shared_task(name="canvas.hear")
def hear(task_id: str) -> None:
    """An error handler of the old style."""
    SAID.append(task_id)


@shared_task(name="canvas.hear_error")
def hear_error(request: Any, error: BaseException, trace: str, *more: Any) -> BaseException:
    """An error handler of the new style; returns what cannot be stored."""
    SAID.append((request.id, type(error), str(error), "Traceback" in trace, *more))
    return error


@shared_task(name="canvas.hear_bound", bind=True)
def hear_bound(self: Any, task_id: str) -> None:
    SAID.append(task_id)


class Order(BaseModel):
    id: str
    cents: int


@step(name="canvas.put_back", retry=AT_ONCE)
def put_back(order: Order, result: Order | None) -> None:
    SAID.append(f"put back {order.id}, {result.cents if result else '?'} cents")


@step(name="canvas.take", compensate=put_back, retry=AT_ONCE)
def take(order: Order) -> Order:
    SAID.append(f"take {order.id}")
    return order


@step(name="canvas.price", retry=AT_ONCE)
def price(order: Order, more: int = 0) -> int:
    return order.cents + more


@step(name="canvas.double", retry=AT_ONCE)
def double(amount: Decimal, since: datetime | None = None) -> Decimal:
    return 2 * amount


@step(name="canvas.refuse", retry=AT_ONCE)
def refuse(order: Any) -> None:
    raise Rejected("not today")


@step(name="canvas.note", retry=AT_ONCE)
def note(key: str) -> None:
    SAID.append(f"note {key}")


@step(name="canvas.note_error", retry=AT_ONCE)
def note_error(request: dict[str, str], error: dict[str, Any], trace: str) -> None:
    SAID.append((request["task"], error["type"], error["message"]))
