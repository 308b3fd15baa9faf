"""What a canvas is in a journal: links, chains, groups, in few words of JSON.

Owns the stored form.  Must never know what Celery calls these things.

    {"task": "shop.add", "args": [1]}     one link
    {"chain": [...]}                      one after the other, each gets the result of the one before
    {"group": [...]}                      side by side; a list of the results
    {"each": [...]}                       one after the other, each on its own; a list of the results

A chord is a chain that begins with its group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_serializer,
)

from orchestrator.codec import Json, is_name


def _named(name: str) -> str:
    if not is_name(name):
        raise ValueError("must be text of 1 to 500 printable bytes")
    return name


def _task(name: str) -> str:
    if name.startswith(("celery.", "orchestrator.")):
        raise ValueError("is a task of Celery's or of this package, and no link")
    return _named(name)


Name: TypeAlias = Annotated[str, AfterValidator(_named)]
TaskName: TypeAlias = Annotated[str, AfterValidator(_task)]


class Node(BaseModel):
    """What every part of a canvas may say: its own arguments, when it starts, and who is told how it went."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    parts_in: ClassVar[str] = ""

    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    immutable: bool = False
    countdown: float = Field(default=0.0, ge=0.0, le=1e9)
    eta: AwareDatetime | None = None
    link: list[Canvas] = []
    link_error: list[Canvas] = []

    @model_serializer(mode="plain")
    def _form(self) -> dict[str, Any]:
        return self.form()

    def form(self) -> dict[str, Any]:
        """Return the stored form, which leaves out what is so by default.

        By hand, because pydantic tries each kind of node at every level when one nests too deep to be written.
        """
        kept = (self.parts_in, "priority")  # an empty list and a zero that say something
        given = {name: getattr(self, name) for name in type(self).model_fields}
        form = {name: value for name, value in given.items() if value or (name in kept and value is not None)}
        for name in form.keys() & {"link", "link_error", self.parts_in}:
            form[name] = [node.form() for node in form[name]]
        return {**form, "eta": self.eta.isoformat()} if self.eta else form

    @property
    def parts(self) -> list[Canvas]:
        """The canvases that this one consists of."""
        found: list[Canvas] = getattr(self, self.parts_in) if self.parts_in else []
        return found

    @property
    def is_bare(self) -> bool:
        """Whether there is nothing but its parts."""
        given = (self.args, self.kwargs, self.immutable, self.countdown, self.eta, self.link, self.link_error)
        return not any(given)

    def tasks(self) -> Iterator[str]:
        """Yield the name of every task that may be run, those of callbacks too."""
        for part in (*self.parts, *self.link, *self.link_error):
            yield from part.tasks()

    def called_with(self, args: list[Json], kwargs: dict[str, Json]) -> dict[str, Any]:
        """Return `args` and `kwargs` as they are after a call with these partial ones; immutable takes none."""
        if self.immutable:
            return {"args": self.args, "kwargs": self.kwargs}
        return {"args": [*args, *self.args], "kwargs": {**self.kwargs, **kwargs}}


class Link(Node):
    """One task; `declared` if it is a declared step where the canvas was read, and so has an undo and a policy."""

    task: TaskName
    declared: bool = False
    queue: Name | None = None
    priority: Annotated[int, Field(ge=0, le=9)] | None = None

    def tasks(self) -> Iterator[str]:
        yield self.task
        yield from super().tasks()


class Chain(Node):
    """One after the other: the first gets the arguments, each further one the result before it."""

    parts_in: ClassVar[str] = "chain"
    chain: list[Canvas]


class Group(Node):
    """Side by side, all with the same arguments; a list of the results in their order."""

    parts_in: ClassVar[str] = "group"
    group: list[Canvas]


class Each(Node):
    """One after the other without anything of each other; a list of the results."""

    parts_in: ClassVar[str] = "each"
    each: list[Canvas]


_KINDS = ("task", "chain", "group", "each")


def _kind(form: Any) -> str | None:
    if isinstance(form, Node):
        return form.parts_in or "task"
    return next((kind for kind in _KINDS if kind in form), None) if isinstance(form, dict) else None


Canvas: TypeAlias = Annotated[
    Annotated[Link, Tag("task")]
    | Annotated[Chain, Tag("chain")]
    | Annotated[Group, Tag("group")]
    | Annotated[Each, Tag("each")],
    Discriminator(
        _kind, custom_error_type="canvas", custom_error_message="must be an object with task, chain, group or each"
    ),
]
for _model in (Node, Link, Chain, Group, Each):
    _model.model_rebuild()
