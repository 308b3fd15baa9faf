"""Plain Celery tasks as the links of canvases; what they do to the world is in the file of effects."""

from __future__ import annotations

from typing import Any

from celery import Task, chain, chord, group, shared_task

from orchestrator import StepFailed, saga
from tests.acceptance import steps
from tests.acceptance.steps import Plan


@shared_task(name="links.add")
def add(x: int, y: int = 0) -> int:
    return x + y


@shared_task(name="links.total")
def total(numbers: list[int]) -> int:
    return sum(numbers)


@shared_task(name="links.kinds")
def kinds(values: list[Any], **more: Any) -> list[Any]:
    """Return the values, and of what types they are here."""
    return [values, [type(value).__name__ for value in (*values, *more.values())]]


@shared_task(name="links.last")
def last(values: list[Any]) -> Any:
    return values[-1]


@shared_task(name="links.act")
def act(value: Any, name: str, words: list[str]) -> Any:
    """Pass `value` on, after doing what the word for this attempt says."""
    steps.behave(steps.word_of(words), "do", name)
    return value


@shared_task(name="links.plan")
def plan(value: int) -> dict[str, Any]:
    return {"name": str(value)}


@shared_task(name="links.replaced", bind=True)
def replaced(self: Any, value: Any, by: str) -> Any:
    """Let another canvas run in place of this task."""
    canvas: dict[str, Any] = {
        "a task": add.s(value, 1),
        "a chain": chain(add.s(value, 1), add.s(1)),
        "a group": group(add.s(value, 1), add.s(value, 2)),
        "a chord": chord([add.s(value, 1), add.s(value, 2)], total.s()),
        "itself": self.s(value, "a task"),
        "a step": chain(plan.s(value), steps.look.s()),
        "what fails": act.s(value, "bad", ["error"]),
    }
    return self.replace(canvas[by])


@shared_task(name="links.adds_to_chord", bind=True)
def adds_to_chord(self: Any) -> Any:
    return self.add_to_chord(add.s(1, 2))


class OwnQueue(Task):
    queue = "links-elsewhere"


@shared_task(name="links.elsewhere", base=OwnQueue)
def elsewhere() -> None: ...


@shared_task(name="links.hear")
def hear(task_id: str) -> None:
    steps.note("heard", task_id)


@shared_task(name="links.hear_error")
def hear_error(request: Any, error: BaseException, trace: str) -> BaseException:
    steps.note("heard", request.id, [type(error).__name__, str(error), request.task, trace[:9]])
    return error


@shared_task(name="links.hear_slowly")
def hear_slowly(task_id: str) -> None:
    steps.behave("gate", "hear", "handler")


@saga.define
async def canvas_between(first: Plan, words: list[str], last: Plan) -> Any:
    """A step, a canvas with a link that does as `words` say, and another step."""
    await saga.step(steps.act, first)
    canvas = chord([add.s(1, 2), chain(add.s(3, 4), act.s("b", words))], total.s())
    try:
        value = await saga.step(chain([canvas]).on_error(hear.s()))
    except StepFailed as failure:
        value = failure.error_type
    await saga.step(steps.act, last)
    return value
