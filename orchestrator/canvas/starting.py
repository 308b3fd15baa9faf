"""`durable`: a Celery canvas that is started like one, and driven by the engine.

Owns the built-in saga that runs a canvas, and the handle that starts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast

from orchestrator.canvas.nodes import Canvas, Node
from orchestrator.canvas.reading import read, read_all
from orchestrator.canvas.walking import walk
from orchestrator.codec import Json, MessageValue, to_message
from orchestrator.declaration import StepOptions
from orchestrator.errors import UsageError
from orchestrator.machine.loop import inside_saga
from orchestrator.machine.policy import RetryPolicy
from orchestrator.options import CanvasOptions, StartOptions
from orchestrator.saga.declare import define

if TYPE_CHECKING:
    from orchestrator.result import SagaResult

WhenUsedUp = Literal["compensate", "park"]
_OPTIONS = frozenset(CanvasOptions.__annotations__)


@define(name="orchestrator.canvas")
async def run_canvas(
    canvas: Canvas, retry: list[Any] | None = None, on_unknown: WhenUsedUp | None = None
) -> MessageValue:
    """Run a canvas; `retry` (in its journal form) and `on_unknown` are those of links that are no declared steps."""
    plain = StepOptions(retry=RetryPolicy.decode(retry) if retry else None, on_unknown=on_unknown)
    return await walk(canvas, [], {}, plain)


class Durable:
    """A canvas to be started; see `durable`.  It can be started any number of times."""

    def __init__(self, canvas: Canvas, options: dict[str, Any]) -> None:
        self.canvas = canvas
        self.options = options

    def __repr__(self) -> str:
        return f"<durable {type(self.canvas).__name__.lower()} of {', '.join(dict.fromkeys(self.canvas.tasks())):.200}>"

    def delay(self, *args: Any, **kwargs: Any) -> SagaResult:
        """Start it with partial arguments; it is committed in Postgres when this returns.

        Raises: as `apply_async`.
        """
        return self.apply_async(args, kwargs)

    def apply_async(
        self, args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None, **options: Unpack[CanvasOptions]
    ) -> SagaResult:
        """Start it with partial arguments and options: `link` and `link_error` (of the canvas as a whole), and those of
        a saga: `task_id` (the run id), `countdown`, `eta`, `priority`, `queue` (of the run; links have their own),
        `deadline`, `transaction`.

        Raises: UsageError, also for a task that neither this app nor a living worker knows; PayloadError,
        ConflictError, StoreUnavailableError.
        """
        canvas, start = self._to_start(args, kwargs, {**options})
        return run_canvas.apply_async((canvas,), self.options, **start)

    async def adelay(self, *args: Any, **kwargs: Any) -> SagaResult:
        """Start it without blocking the event loop; see `delay`."""
        return await self.aapply_async(args, kwargs)

    async def aapply_async(
        self, args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None, **options: Unpack[CanvasOptions]
    ) -> SagaResult:
        """Start it without blocking the event loop; see `apply_async`."""
        canvas, start = self._to_start(args, kwargs, {**options})
        return await run_canvas.aapply_async((canvas,), self.options, **start)

    def AsyncResult(self, task_id: str) -> SagaResult:  # noqa: N802 - Celery's name
        """Return a handle to a run by its id; asks nothing of the database yet."""
        return run_canvas.AsyncResult(task_id)

    @property
    def form(self) -> Json:
        """The stored form of the canvas: the argument with which a message or beat starts `orchestrator.canvas`."""
        return self.canvas.form()

    def with_callbacks(self, link: Any = None, link_error: Any = None) -> Durable:
        """Return it with one more callback or handler, or several, of the canvas as a whole."""
        told = {"link": read_all(link), "link_error": read_all(link_error)}
        update = {name: [*getattr(self.canvas, name), *more] for name, more in told.items()}
        return Durable(self.canvas.model_copy(update=update), self.options)

    def called_with(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Canvas:
        """Return the canvas with partial arguments.  Raises: PayloadError."""
        what = "the arguments of a canvas"
        given: Any = (to_message(list(args), what), to_message(dict(kwargs), what))
        canvas: Canvas = self.canvas.model_copy(update=self.canvas.called_with(*given))
        return canvas

    def _to_start(
        self, args: Iterable[Any], kwargs: dict[str, Any] | None, options: dict[str, Any]
    ) -> tuple[Canvas, StartOptions]:
        """Return the canvas as it is to be started, and how its run is."""
        if inside_saga():
            raise UsageError("a canvas was started in saga code; run it as a step there: `await saga.step(signature)`")
        for name in options.keys() - _OPTIONS:
            raise UsageError(
                f"option {name}= has no meaning for a durable canvas; it has {', '.join(sorted(_OPTIONS))}"
            )
        canvas = self.with_callbacks(options.pop("link", None), options.pop("link_error", None))
        called = canvas.called_with(args or (), kwargs or {})
        _refuse_unknown(called)
        return called, cast(StartOptions, options)


def durable(signature: Any, *, retry: RetryPolicy | None = None, on_unknown: WhenUsedUp | None = None) -> Durable:
    """Make any Celery signature, such as a chain, group or chord, durable: ``durable(chain(a.s(1), b.s())).delay()``.

    `retry` and `on_unknown` are for links that are plain Celery tasks; a declared step has its own.  With
    ``on_unknown="park"`` a link whose attempts are used up waits for a person, who retries, resolves or skips it.
    Raises: UsageError for a signature that makes no sense, or has an option without a meaning here; PayloadError for
    arguments that cannot be stored.
    """
    given: dict[str, Any] = {"retry": retry.encode() if retry else None, "on_unknown": on_unknown}
    return Durable(read(signature), {name: value for name, value in given.items() if value is not None})


def _refuse_unknown(canvas: Node) -> None:
    starter = run_canvas.starter
    unknown = starter.unknown_tasks(set(canvas.tasks())) if starter is not None else []
    if unknown:
        raise UsageError(
            f"no task named {', '.join(unknown)} is registered in this app, and no worker that runs now knows it; "
            "correct the name, or include its module in the app"
        )
