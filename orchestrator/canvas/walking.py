"""The saga code that runs a canvas: walks its nodes and asks for a step for each link.

Owns what follows what, with Celery's argument passing, and when a handler hears of a failure.  Must never look at
anything but the canvas and what its steps returned: it is replayed like any saga code.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeAlias

from orchestrator.canvas.nodes import Canvas, Chain, Each, Group, Link
from orchestrator.canvas.reading import read
from orchestrator.canvas.telling import arguments_of_handler, failure_of
from orchestrator.codec import Json, from_message, to_message, without_envelopes
from orchestrator.declaration import StepOptions
from orchestrator.errors import PayloadError, StepFailed, UsageError
from orchestrator.machine.code import RequestFuture
from orchestrator.saga.inside import code_of
from orchestrator.saga.steps import LegacyStep, decode_result, request_of
from orchestrator.saga.timing import sleep_until
from orchestrator.step import Step
from orchestrator.step import registry as declared_steps

FAILURES = (StepFailed, PayloadError)
"""What makes a link fail; any other error says that code is wrong, and parks the run as in any saga."""
Args: TypeAlias = list[Json]
Kwargs: TypeAlias = dict[str, Json]


def ask(signature: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> asyncio.Future[Any]:
    """Run a Celery signature as a branch of the running saga.

    The future has its result as Celery would bring it back; that of a single declared step is decoded.
    Raises: UsageError, PayloadError, as `read`.
    """
    canvas = read(signature)
    what = f"the arguments of {signature['task']}"
    given: Any = (to_message(list(args), what), to_message(kwargs, what))
    return code_of("step").run_beside(_decoded(canvas, *given))


async def _decoded(canvas: Canvas, args: Args, kwargs: Kwargs) -> Any:
    value = await walk(canvas, args, kwargs)
    declared = declared_steps.steps.get(canvas.task) if isinstance(canvas, Link) else None
    return decode_result(declared, without_envelopes(value)) if declared else from_message(value)


async def walk(canvas: Canvas, args: Args, kwargs: Kwargs, plain: StepOptions | None = None) -> Json:
    """Run `canvas` and its callbacks to their end; `plain` are the options of links that are no declared steps.

    Raises: StepFailed of the link that failed; of several in a group, of the first in its order.
    """
    value: Json = None
    failure: Exception | None = None
    async with asyncio.TaskGroup() as aside:
        try:
            value = await _Walk(plain or StepOptions(), aside).run(canvas, args, kwargs)
        except Exception as error:
            failure = error  # not before the callbacks have ended, and as it is, not in a group
    if failure is not None:
        raise failure
    return value


class _Walk:
    """One walk over a canvas; what runs beside it, its callbacks, is in the task group `aside`."""

    def __init__(self, plain: StepOptions, aside: asyncio.TaskGroup) -> None:
        self._plain = plain
        self._aside = aside

    async def run(self, node: Canvas, args: Args, kwargs: Kwargs) -> Json:
        """Run a node with partial arguments, tell its callbacks or its handlers, and return its value."""
        if node.countdown:
            await asyncio.sleep(node.countdown)
        if node.eta is not None:
            await sleep_until(node.eta)
        try:
            value = await self._value(node, **node.called_with(args, kwargs))
        except FAILURES as error:
            await self._tell(node, error)
            raise
        for callback in node.link:
            self._aside.create_task(self._to_its_end(callback, [value]))
        return value

    async def _value(self, node: Canvas, args: Args, kwargs: Kwargs) -> Json:
        match node:
            case Link():
                value: Json = await self._ask(node, args, kwargs)
                return value
            case Chain():
                return await self._in_a_row(node.chain, args, kwargs)
            case Group():
                return await self._side_by_side(node.group, args, kwargs)
            case Each():
                return [await self.run(part, [], {}) for part in node.each]

    async def _in_a_row(self, links: list[Canvas], args: Args, kwargs: Kwargs) -> Json:
        value: Json = None
        for link in links:
            value = await self.run(link, args, kwargs)
            args, kwargs = [value], {}
        return value

    async def _side_by_side(self, members: list[Canvas], args: Args, kwargs: Kwargs) -> Json:
        """Run all members to their end, also if one fails: Celery does not stop the others either."""
        running = (self.run(member, args, kwargs) for member in members)
        values: list[Any] = await asyncio.gather(*running, return_exceptions=True)
        for value in values:
            if isinstance(value, BaseException):
                raise value
        results: list[Json] = []
        for member, value in zip(members, values, strict=True):
            results.extend(value if isinstance(member, Group) else [value])  # Celery's rule: groups in a group are one
        return results

    async def _tell(self, node: Canvas, error: Exception) -> None:
        """Run the handlers of a node that failed, each at most once for one failure, however often it is attached."""
        told: list[Canvas] = vars(error).setdefault("told", [])
        handlers = [handler for handler in node.link_error if _as_attached(handler) not in told]
        told.extend(map(_as_attached, handlers))
        form = failure_of(error)
        await asyncio.gather(*(self._to_its_end(handler, [form]) for handler in handlers))

    async def _to_its_end(self, node: Canvas, args: Args) -> None:
        """Run a callback or a handler: its failure is on record, and changes nothing for the canvas."""
        with suppress(*FAILURES):
            await self.run(node, args, {})

    def _ask(self, link: Link, args: Args, kwargs: Kwargs) -> RequestFuture:
        step = _step_of(link, self._plain)
        if link.task in declared_steps.steps:
            args = [without_envelopes(arg) for arg in arguments_of_handler(args, len(step.codec.parameters))]
            kwargs = {name: without_envelopes(value) for name, value in kwargs.items()}
        try:
            encoded = step.codec.encode_call(tuple(args), kwargs, from_json=True)
        except TypeError as error:
            raise PayloadError(f"link {link.task} cannot be called like that: {error}") from error
        code = code_of("step")
        request = request_of(step, encoded, code)
        request.decode = lambda result: to_message(decode_result(step, result))
        return code.ask(request)


def _as_attached(handler: Canvas) -> Canvas:
    """Celery clones a handler that it hands on to the header of a chord, and makes the clone immutable."""
    return handler.model_copy(update={"immutable": False})


def _step_of(link: Link, plain: StepOptions) -> Step[Any, Any]:
    given: dict[str, Any] = {"queue": link.queue, "priority": link.priority}
    options = {name: value for name, value in given.items() if value is not None}
    declared = declared_steps.steps.get(link.task)
    if declared is None and link.declared:
        raise UsageError(
            f"{link.task} is a declared step that this worker does not import: as a plain task it would have neither "
            "undo nor policy. Include its module in every worker of the run's queue, then `saga retry` the run"
        )
    if declared is None:
        return LegacyStep(link.task, replace(plain, **options) if options else plain)
    return declared.with_options(**options) if options else declared
