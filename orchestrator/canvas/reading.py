"""Celery's signatures, read: what they ask for becomes nodes, and what would be lost is refused by name.

Owns every quirk of Celery that is kept: a group of one in a chain is its member, groups in groups are one list, a
chord's handler hears of its header.  Must never import Celery, nor ignore anything silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, TypeAlias

from pydantic import ValidationError

from orchestrator.canvas.nodes import Canvas, Chain, Each, Group, Link
from orchestrator.codec import to_message
from orchestrator.codec.values import explain
from orchestrator.errors import PayloadError, UsageError
from orchestrator.step import registry as declared_steps

Form: TypeAlias = Mapping[str, Any]
_HONOURED = ("queue", "priority", "countdown", "eta", "link", "link_error")
_INSTEAD = {
    "expires": "give the run a deadline: durable(...).apply_async(deadline=timedelta(...))",
    "time_limit": "declare the task as a step, with start_to_close_timeout=",
    "soft_time_limit": "declare the task as a step, with start_to_close_timeout=",
    "task_id": "give the run its id: durable(...).apply_async(task_id=...); a link has the id of its run and its key",
    "routing_key": "name a queue",
    "exchange": "name a queue",
    "ignore_result": "results stay in Postgres, and the next link wants them",
}


def read(signature: Any) -> Canvas:
    """Return what a Celery signature (or a dict of its shape) asks for.

    Raises: UsageError for one that makes no sense, or has an option without a meaning here; PayloadError for arguments
    that cannot be stored.
    """
    try:
        node = _unwrapped_group(_read(signature, {}))
    except RecursionError:
        raise PayloadError("the signature nests too deep, or contains itself; flatten it.") from None
    except ValidationError as error:
        raise UsageError(f"the signature cannot be read: {explain(error)}") from None
    if _is_nothing(node):
        raise UsageError("an empty chain has nothing to run")
    return node


def read_all(signatures: Any) -> list[Canvas]:
    """Return what one signature, or each of a list of them, asks for; None is an empty list.  Raises: as `read`."""
    if signatures is None:
        return []
    return [read(each) for each in ([signatures] if isinstance(signatures, Mapping) else signatures)]


def kind_of(signature: Form) -> str:
    """Return the type of a signature; those of map and starmap have none, but tasks of Celery's own."""
    name = signature["task"]
    return str(signature.get("subtask_type") or (name if name.startswith("celery.") else "task"))


def _read(signature: Any, inherited: dict[str, Any]) -> Canvas:
    if not isinstance(signature, Mapping) or not isinstance(signature.get("task"), str):
        raise UsageError(f"a canvas is made of signatures, like add.s(1, 2), not of {type(signature).__name__}")
    kind = kind_of(signature)
    reader = _READERS.get(kind)
    if reader is None:
        raise UsageError(f"a signature of type {kind!r:.80} cannot be run durably; chain, group and chord can")
    for name in ("kwargs", "options"):
        if not isinstance(signature.get(name) or {}, Mapping):
            raise UsageError(f"the {name} of {signature['task']!r:.80} must be a mapping")
    return reader(signature, signature.get("kwargs") or {}, inherited)


# -- kinds of signatures -----------------------------------------------------------------------------------------------
def _link(form: Form, kwargs: Form, inherited: dict[str, Any]) -> Canvas:
    name = form["task"]
    common, inherited = _common(form, inherited)
    given: Any = to_message(dict(kwargs), f"the kwargs of {name}")
    return Link(task=name, declared=name in declared_steps.steps, kwargs=given, **inherited, **common)


def _chain(form: Form, kwargs: Form, inherited: dict[str, Any]) -> Canvas:
    common, inherited = _common(form, inherited)
    links: list[Canvas] = []
    empty: Canvas | None = None
    for each in _parts(kwargs, "tasks", "chain"):
        node = _read(each, inherited)
        while isinstance(node, Group) and node.is_bare and len(node.group) == 1:
            node = node.group[0]  # Celery's rule: in a chain, a group of one is no group
        if isinstance(node, Group) and node.is_bare and not node.group:
            empty = node  # ... and an empty one is not there, unless there is nothing else
        else:
            links += _spliced(node)
    return _whole(links or ([empty] if empty else []), common)


def _group(form: Form, kwargs: Form, inherited: dict[str, Any]) -> Canvas:
    common, inherited = _common(form, inherited)
    return Group(group=_members(_parts(kwargs, "tasks", "group"), inherited), **common)


def _chord(form: Form, kwargs: Form, inherited: dict[str, Any]) -> Canvas:
    common, inherited = _common(form, inherited)
    header = kwargs.get("header")
    if isinstance(header, Mapping):  # one signature instead of a list of them
        group = _read(header, inherited)
        group = group if isinstance(group, Group) else Group(group=[group])
    else:
        group = Group(group=_members(_parts(kwargs, "header", "chord"), inherited))
    if kwargs.get("body") is None:
        raise UsageError("a chord without a body cannot be run; give it one: chord(header, body)")
    body = _read(kwargs["body"], inherited)
    if _is_nothing(body):
        raise UsageError("the body of a chord is an empty chain; give it a task")
    given = to_message(dict(kwargs.get("kwargs") or {}), "the kwargs of the header of a chord")
    # What cannot begin because its header failed has failed, too.
    handlers = _distinct([*group.link_error, *_handlers(body)])
    header = group.model_copy(update={"kwargs": given or group.kwargs, "link_error": handlers})
    return _whole([header, *_spliced(body)], common)


def _map(form: Form, kwargs: Form, inherited: dict[str, Any]) -> Canvas:
    return _calls(form, kwargs, inherited, lambda item: [item])


def _starmap(form: Form, kwargs: Form, inherited: dict[str, Any]) -> Canvas:
    return _calls(form, kwargs, inherited, lambda item: _parts({"items": item}, "items", form["task"]))


def _calls(form: Form, kwargs: Form, inherited: dict[str, Any], args_of: Callable[[Any], list[Any]]) -> Canvas:
    common, inherited = _common(form, inherited)
    task = _read(kwargs.get("task"), inherited)
    calls: list[Canvas] = []
    for item in _parts(kwargs, "it", form["task"]):
        args = to_message(args_of(item), f"an item of {form['task']}")
        calls.append(task.model_copy(update=task.called_with(args, {})))  # type: ignore[arg-type]
    return Each(each=calls, **{**common, "immutable": True})


def _chunks(form: Form, kwargs: Form, inherited: dict[str, Any]) -> Canvas:
    common, inherited = _common(form, inherited)
    size = kwargs.get("n")
    if not isinstance(size, int) or size < 1:
        raise UsageError("chunks: n must be a whole number, 1 or more")
    items = iter(_parts(kwargs, "it", "chunks"))
    parts: list[Canvas] = []
    while part := list(islice(items, size)):
        starmap = {"task": "celery.starmap", "kwargs": {"task": kwargs.get("task"), "it": part}}
        parts.append(_starmap(starmap, starmap["kwargs"], inherited))  # type: ignore[arg-type]
    return Group(group=parts, **common)


_READERS: dict[str, Callable[[Form, Form, dict[str, Any]], Canvas]] = {
    "task": _link, "chain": _chain, "group": _group, "chord": _chord,
    "celery.map": _map, "celery.starmap": _starmap, "celery.chunks": _chunks,
}  # fmt: skip


# -- what they have in common ------------------------------------------------------------------------------------------
def _common(form: Form, inherited: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what every node may have, and the queue and priority of this one and what it consists of."""
    common: dict[str, Any] = {}
    if form.get("args"):
        common["args"] = to_message(_parts(form, "args", form["task"]), f"the arguments of {form['task']}")
    if form.get("immutable"):
        common["immutable"] = True
    options = {name: value for name, value in (form.get("options") or {}).items() if value is not None}
    for name in options:
        if name not in _HONOURED:
            instead = _INSTEAD.get(name, f"it has {', '.join(_HONOURED)}")
            raise UsageError(f"option {name}= of {form['task']} has no meaning in a durable canvas; {instead}")
    for name in ("link", "link_error"):
        if options.get(name):
            common[name] = read_all(options[name])
    if options.get("countdown"):
        countdown = options["countdown"]
        common["countdown"] = countdown.total_seconds() if isinstance(countdown, timedelta) else countdown
    if options.get("eta"):
        common["eta"] = _instant(options["eta"])
    routed = {name: options[name] for name in ("queue", "priority") if name in options}
    if "queue" in routed:
        routed["queue"] = getattr(routed["queue"], "name", routed["queue"])
    return common, {**inherited, **routed}


def _instant(eta: Any) -> Any:
    if isinstance(eta, datetime) and eta.tzinfo is None:
        raise UsageError("eta must be an aware datetime; say which time zone it is in")
    return eta


def _parts(kwargs: Form, name: str, what: str) -> list[Any]:
    found = kwargs.get(name)
    if found is None or isinstance(found, (str, bytes, Mapping)) or not isinstance(found, Iterable):
        raise UsageError(f"a {what} signature needs a list of {name}")
    return list(found)


def _members(forms: list[Any], inherited: dict[str, Any]) -> list[Canvas]:
    return [node for node in (_read(form, inherited) for form in forms) if not _is_nothing(node)]


def _is_nothing(node: Canvas) -> bool:
    return isinstance(node, Chain) and not node.chain


def _spliced(node: Canvas) -> list[Canvas]:
    return node.chain if isinstance(node, Chain) and node.is_bare else [node]


def _whole(links: list[Canvas], common: dict[str, Any]) -> Canvas:
    return links[0] if len(links) == 1 and not common else Chain(chain=links, **common)


def _handlers(node: Canvas) -> list[Canvas]:
    """Return the handlers that hear of a node that cannot even begin."""
    firsts = node.chain[:1] if isinstance(node, Chain) else node.group if isinstance(node, Group) else []
    return [*node.link_error, *(handler for first in firsts for handler in _handlers(first))]


def _distinct(nodes: list[Canvas]) -> list[Canvas]:
    return [node for index, node in enumerate(nodes) if node not in nodes[:index]]


def _unwrapped_group(node: Canvas) -> Canvas:
    """Celery's rule for what is started: a group of nothing but one chain that ends in a group is that chain."""
    if isinstance(node, Group) and node.is_bare and len(node.group) == 1 and _ends_in_group(node.group[0]):
        return node.group[0]
    return node


def _ends_in_group(node: Canvas) -> bool:
    return isinstance(node, Group) or (isinstance(node, Chain) and bool(node.chain) and _ends_in_group(node.chain[-1]))
