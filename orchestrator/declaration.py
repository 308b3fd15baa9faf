"""What may be declared about a step, and what is refused at import; must never register or run a step."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, get_args

from orchestrator.codec import is_name
from orchestrator.errors import DefinitionError
from orchestrator.machine.policy import (
    LONGEST_TIMEOUT,
    START_TO_CLOSE,
    Effect,
    Limit,
    RetryPolicy,
    is_priority,
    must_be_timedelta,
)

if TYPE_CHECKING:
    from orchestrator.step import Step

OnUnknown = Literal["compensate", "probe", "park"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """Everything that is declared about a step; see `step` for the meaning of each."""

    queue: str = ""
    priority: int = 0
    effect: Effect | None = None
    compensate: Any = None
    on_unknown: OnUnknown | None = None
    retry: RetryPolicy | None = None
    start_to_close_timeout: timedelta = START_TO_CLOSE
    heartbeat_timeout: timedelta | None = None
    transactional: bool = False
    local: bool = False
    rate_limit: str | None = None
    concurrency: int | None = None
    limit_key: str | Callable[..., Any] | None = None
    key: str = ""
    celery: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # None is Celery's way to leave it to the app's routes, and one of kombu's queues stands for its name.
        object.__setattr__(self, "queue", getattr(self.queue, "name", self.queue or ""))


def check_options(step: Step[Any, Any]) -> None:
    """Refuse what makes no step.  Raises: DefinitionError."""
    options = step.options
    if options.transactional and options.local:
        raise DefinitionError(f"step {step.name}: local=True and transactional=True exclude each other")
    if options.transactional:
        _check_connection(step)
    _check_choices(step.name, options)
    if options.effect is Effect.NONE and options.compensate is not None:
        raise DefinitionError(f"step {step.name}: Effect.NONE says there is nothing to undo, yet compensate= is given")
    if options.effect is Effect.PIVOT and options.compensate is not None:
        raise DefinitionError(f"step {step.name}: a pivot is the point of no return and cannot have compensate=")
    if not is_name(step.name):
        raise DefinitionError(f"step {step.name!r:.80}: its name must be text of 1 to 500 printable bytes")
    for option in ("key", "queue"):
        value = getattr(options, option)
        if value and not is_name(value):
            raise DefinitionError(f"step {step.name}: {option}= must be text of at most 500 printable bytes")
    _check_limit(step)


def _check_connection(step: Step[Any, Any]) -> None:
    """What is certainly not handed in: with the types of SQLAlchemy this could be told better, but not be imported."""
    first = next(iter(inspect.signature(step.function).parameters.values()), None)
    kind: Any = first.annotation if first is not None else None
    named = str(getattr(kind, "__name__", kind))
    if first is None or "Async" in named or (named != "object" and hasattr(builtins, named)):
        takes = f"{first.name}: {named}" if first is not None else "nothing"
        raise DefinitionError(
            f"step {step.name}: transactional=True hands it a Connection of SQLAlchemy, or a Session, as its first "
            f"parameter, which callers leave out; it takes {takes}"
        )


def _check_choices(name: str, options: StepOptions) -> None:
    """What is none of the choices there are would be taken for another one, or make work that nobody ever takes."""
    must_be_timedelta(f"step {name}: start_to_close_timeout", options.start_to_close_timeout)
    if not timedelta(0) < options.start_to_close_timeout <= LONGEST_TIMEOUT:
        years = LONGEST_TIMEOUT.days // 365
        raise DefinitionError(
            f"step {name}: start_to_close_timeout must be positive and at most {years} years; it is never unlimited"
        )
    if options.heartbeat_timeout is not None:
        must_be_timedelta(f"step {name}: heartbeat_timeout", options.heartbeat_timeout)
        if options.heartbeat_timeout <= timedelta(0):
            raise DefinitionError(f"step {name}: heartbeat_timeout must be positive, or None")
    if options.retry is not None and not isinstance(options.retry, RetryPolicy):
        raise DefinitionError(f"step {name}: retry= takes a RetryPolicy(...), not {options.retry!r:.80}")
    for error in options.retry.non_retryable_error_types if options.retry is not None else ():
        # Not the policy's own business: it reads what journals have, too.
        if isinstance(error, str) and not error.isidentifier():
            raise DefinitionError(
                f"step {name}: non_retryable_error_types has {error!r:.80}, which is no class's name: that is without "
                "its module, such as 'CardDeclined'"
            )
    if not is_priority(options.priority):
        raise DefinitionError(f"step {name}: priority must be a whole number from 0 to 9 (higher first)")
    if options.effect is not None and not isinstance(options.effect, Effect):
        raise DefinitionError(f"step {name}: effect= takes an Effect, such as Effect.PIVOT, not {options.effect!r:.80}")
    if options.on_unknown not in (None, *get_args(OnUnknown)):
        raise DefinitionError(
            f"step {name}: on_unknown= is one of {', '.join(get_args(OnUnknown))}, not {options.on_unknown!r:.80}"
        )


def _check_limit(step: Step[Any, Any]) -> None:
    options = step.options
    try:
        Limit(options.rate_limit, options.concurrency)
    except DefinitionError as error:
        raise DefinitionError(f"step {step.name}: {error}") from None
    if options.limit_key is None:
        return
    if not step.limited:
        raise DefinitionError(
            f"step {step.name}: @step(key=...) says whom a limit counts for, and there is neither rate_limit= nor "
            "concurrency=; to name a call, use with_options(key=...)"
        )
    unknown = [name for name in key_names(options.limit_key) if name not in step.codec.parameters]
    if unknown:
        raise DefinitionError(
            f"step {step.name}: the key of its limit takes {', '.join(unknown)}, which is no parameter of it "
            f"(it has {', '.join(step.codec.parameters) or 'none'})"
        )


def key_names(key: str | Callable[..., Any]) -> list[str]:
    """Return the parameters by which the key of a limit is told."""
    return [key] if isinstance(key, str) else list(inspect.signature(key).parameters)


def check_parameters(other: Step[Any, Any], step: Step[Any, Any], what: str, also: tuple[str, ...]) -> None:
    """Refuse a compensation or probe of parameters that its step has not, or has as well.  Raises: DefinitionError."""
    for name in also:
        if name in other.codec.parameters and name in step.codec.parameters:
            raise DefinitionError(
                f"step {step.name}: its {what} {other.name} takes `{name}`, which is what the step returned, but the "
                "step has a parameter of that name, too; rename that one"
            )
    unknown = [name for name in other.codec.parameters if name not in (*step.codec.parameters, *also)]
    if unknown:
        raise DefinitionError(
            f"the {what} {other.name} takes {', '.join(unknown)}, which step {step.name} does not have "
            f"(it has {', '.join(step.codec.parameters) or 'no parameters'}"
            f"{', and ' + ', '.join(also) if also else ''}); rename the parameter, or give full arguments"
        )


def refuse_or_keep(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the Celery task options that have a meaning here.  Raises: DefinitionError for one that has none."""
    for option, instead in REFUSED_OPTIONS.items():
        if option in options:
            raise DefinitionError(f"step {name}: Celery's {option}= does not apply to a step; {instead}")
    return options


REFUSED_OPTIONS = {
    "bind": "use `step.current()` for the attempt and `celery.current_task` for the request",
    "time_limit": "use start_to_close_timeout=",
    "soft_time_limit": "use start_to_close_timeout=",
    "acks_late": "doorbells carry no work, so there is nothing to acknowledge late",
    "base": "a step subclasses the app's own task class; set `Celery(task_cls=...)`",
    "autoretry_for": "use retry=RetryPolicy(...): every error is tried again unless it is non-retryable",
    "dont_autoretry_for": "use retry=RetryPolicy(non_retryable_error_types=...)",
    "retry_kwargs": "use retry=RetryPolicy(...)",
    "retry_backoff": "use retry=RetryPolicy(backoff_coefficient=...)",
    "retry_backoff_max": "use retry=RetryPolicy(maximum_interval=...)",
    "retry_jitter": "use retry=RetryPolicy(...)",
    "max_retries": "use retry=RetryPolicy(maximum_attempts=...)",
    "default_retry_delay": "use retry=RetryPolicy(initial_interval=...)",
    "serializer": "payloads are JSON, encoded from the annotations",
}
