"""The rules of ``lint``: what is wrong in a step's declaration or in saga code.

Owns the rules and their codes.  Must never run saga code, and never import what it judges.
"""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from orchestrator.cli.source import Source, dotted, helpers, resolve, source_of
from orchestrator.errors import DefinitionError, PayloadError
from orchestrator.machine.policy import Effect
from orchestrator.saga import Saga
from orchestrator.saga import child as saga_child
from orchestrator.saga import map as saga_map
from orchestrator.saga import once as saga_once
from orchestrator.saga import step as saga_step
from orchestrator.step import Step
from orchestrator.step import registry as steps


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule as the help lists it."""

    summary: str
    warning: bool = False


RULES = {
    "SG001": Rule("a declaration that is refused, at import or at its first use"),
    "SG101": Rule("a compensation that is no registered task"),
    "SG102": Rule("a step with neither effect nor compensation declared", warning=True),
    "SG103": Rule("a step after the pivot that can fail for good", warning=True),
    "SG104": Rule("a compensation whose `result` cannot be None", warning=True),
    "SG201": Rule("the wall clock in saga code"),
    "SG202": Rule("randomness in saga code"),
    "SG203": Rule("input or output in saga code"),
    "SG204": Rule("a call of asyncio that is not durable"),
    "SG205": Rule("a step or saga called or sent directly in saga code"),
    "SG206": Rule("a request that is not awaited where it has to be"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One mistake and where it stands; line and column count from 1."""

    path: str
    line: int
    column: int
    code: str
    message: str

    @property
    def warning(self) -> bool:
        """Whether the code may be right after all."""
        return RULES[self.code].warning


def shown_path(path: str) -> str:
    """Return a path relative to here if it is below here."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


# -- declarations ------------------------------------------------------------------------------------------------------
def check_step(step: Step[Any, Any], registered: Collection[str]) -> Iterator[Finding]:
    """Yield what is wrong in a step's own declaration."""
    if (refused := _annotations_of(step)) is not None:
        yield refused  # of such a step little else can be asked
        return
    undo = step.arm(dict.fromkeys(step.codec.parameters)) if step.options.compensate is not None else None
    source = source_of(step.function)
    if undo is not None and undo.task not in registered and source is not None:
        yield from _at(source, source.node, "SG101", _unregistered(step.name, undo.task))
    undoes = step.options.compensate
    if source is not None and isinstance(undoes, Step) and _can_be_unknown(step) and not _takes_none(undoes):
        text = (
            f"step {step.name} is compensated by {undoes.name}, whose `result` cannot be None: where the outcome is "
            "unknown, because a worker died, the undo fails and the run parks. Let it take None, or declare a probe"
        )
        yield from _at(source, source.node, "SG104", text)


def _annotations_of(declared: Step[Any, Any] | Saga[Any, Any]) -> Finding | None:
    """Return what is wrong with its annotations, which are resolved when it is used: that may be after a deploy."""
    try:
        declared.codec.prepare()
    except DefinitionError as error:
        place = inspect.unwrap(declared.function).__code__
        source = source_of(declared.function)
        line = source.node.lineno if source is not None else place.co_firstlineno
        return Finding(shown_path(place.co_filename), line, 1, "SG001", str(error))
    return None


def _can_be_unknown(step: Step[Any, Any]) -> bool:
    """Whether it may be undone without anybody knowing what it returned."""
    decides = step.options.on_unknown or ("probe" if step.probe_step else "compensate")
    return decides == "compensate" and not step.options.transactional


def _takes_none(undo: Step[Any, Any]) -> bool:
    if "result" not in undo.codec.parameters:
        return True
    try:
        undo.codec.decode_arguments({"result": None}, ["result"])
    except PayloadError:
        return False
    return True


def _unregistered(step: str, task: str) -> str:
    return f"step {step} is compensated by {task}, which is no registered task: no worker could undo it"


# -- saga code ---------------------------------------------------------------------------------------------------------
def check_saga(saga: Saga[Any, Any], registered: Collection[str]) -> Iterator[Finding]:
    """Yield what is wrong in a saga function and in the functions of its module that it calls."""
    if (refused := _annotations_of(saga)) is not None:
        yield refused
    seen: set[Callable[..., Any]] = set()
    waiting: list[Callable[..., Any]] = [inspect.unwrap(saga.function)]
    while waiting:
        function = waiting.pop()
        source = None if function in seen else source_of(function)
        seen.add(function)
        if source is not None:
            yield from _check_calls(source, registered)
            yield from _check_awaits(source)
            yield from _Flow(source).check()
            waiting += helpers(source)


def _at(source: Source, node: ast.AST, code: str, message: str) -> Iterator[Finding]:
    line, column = getattr(node, "lineno", 1), getattr(node, "col_offset", 0) + 1
    if not source.ignores(line, code):
        yield Finding(shown_path(source.path), line, column, code, message)


def _check_calls(source: Source, registered: Collection[str]) -> Iterator[Finding]:
    for call in _calls(source, source.node.body):
        used = _used_step(source, call)
        uses = [used] if used is not None else _mapped_steps(source, call)
        for use in uses:
            yield from _check_use(source, call, use, registered)
        if not uses and (problem := _misused(source, call)) is not None:
            yield from _at(source, call, *problem)


def _calls(source: Source, nodes: list[ast.stmt]) -> Iterator[ast.Call]:
    return (node for node in _nodes(source, nodes) if isinstance(node, ast.Call))


def _nodes(source: Source, nodes: list[ast.stmt]) -> Iterator[ast.AST]:
    """Yield what is run in saga code, in the order of the text; what ``saga.once`` runs may do anything."""
    waiting: list[ast.AST] = list(reversed(nodes))
    while waiting:
        node = waiting.pop()
        yield node
        if not (isinstance(node, ast.Call) and dotted(source, node.func) == "orchestrator.saga.once"):
            waiting.extend(reversed(list(ast.iter_child_nodes(node))))


@dataclass(frozen=True, slots=True)
class _Use:
    """A step as a saga uses it; a plain Celery task declares nothing."""

    name: str
    effect: str
    compensated: bool
    undo: str = ""


def _used_step(source: Source, call: ast.Call) -> _Use | None:
    """Return the step that ``saga.step(...)`` asks for, if this is such a call and the step can be told."""
    if resolve(source, call.func) is not saga_step or not call.args:
        return None
    return _use_of(source, call.args[0])


def _mapped_steps(source: Source, call: ast.Call) -> list[_Use]:
    """Return the steps that ``saga.map(...)`` asks for: that of the items, and the one that pages, if it has one."""
    if resolve(source, call.func) is not saga_map:
        return []
    return [use for node in call.args[:2] if (use := _use_of(source, node)) is not None]


def _use_of(source: Source, node: ast.expr) -> _Use | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        inner = _use_of(source, node.func.value)
        if inner is not None and node.func.attr == "with_options":
            return _changed(source, inner, node)
        return inner if node.func.attr in ("s", "si", "signature") else None
    found = resolve(source, node)
    name = getattr(found, "name", None)
    if not isinstance(found, Step) and isinstance(name, str) and hasattr(found, "run"):
        found = steps.steps.get(name)
        return _Use(name, "", False) if found is None else _declared(found)
    return _declared(found) if isinstance(found, Step) else None


def _declared(step: Step[Any, Any]) -> _Use:
    return _Use(step.name, step.effect, step.options.compensate is not None)


def _changed(source: Source, use: _Use, call: ast.Call) -> _Use | None:
    """Return a step with the options of one call; None if they cannot be told."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if None in given:
        return None
    effect, compensated, undo = use.effect, use.compensated, ""
    if "compensate" in given:
        none = isinstance(given["compensate"], ast.Constant) and given["compensate"].value is None
        compensated, effect = not none, "" if none else Effect.COMPENSATABLE
        undo = "" if none else _task_of(source, given["compensate"])
    if "effect" in given:
        found = resolve(source, given["effect"])
        effect = str(found) if isinstance(found, Effect) else Effect.NONE
    return _Use(use.name, effect, compensated, undo)


def _task_of(source: Source, node: ast.expr) -> str:
    target = node.func.value if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else node
    name = getattr(resolve(source, target), "name", "")
    return name if isinstance(name, str) else ""


def _check_use(source: Source, call: ast.Call, use: _Use, registered: Collection[str]) -> Iterator[Finding]:
    if use.undo and use.undo not in registered:
        yield from _at(source, call, "SG101", _unregistered(use.name, use.undo))
    if not use.effect and not use.compensated:
        text = (
            f"step {use.name} declares neither compensate= nor effect=: if the saga fails, what it did stays. "
            "Say compensate=..., or effect=Effect.NONE, PIVOT or RETRIABLE"
        )
        yield from _at(source, call, "SG102", text)


# -- calls that do not replay ------------------------------------------------------------------------------------------
_CLOCK = "use saga.now(), or saga.sleep() to wait"
_CHANCE = "use saga.random() or saga.uuid4(), or record it with `await saga.once(name, fn)`"
_OUTSIDE = "do it in a step, or record it with `await saga.once(name, fn)`"
_HARM = {
    "SG201": "is not the same on every replay of a saga",
    "SG202": "is not the same on every replay of a saga",
    "SG203": "happens again on every replay of a saga",
    "SG204": "does not work on a saga's deterministic loop",
}
_UNORDERED = "use saga.wait(), which returns lists in request order"
_ONE_LOOP = "a saga has no threads and one loop; do it in a step"


def _table(*groups: tuple[str, str, str]) -> dict[str, tuple[str, str]]:
    return {name: (code, instead) for code, instead, names in groups for name in names.split()}


_CALLS = _table(
    ("SG201", _CLOCK, "datetime.datetime.now datetime.datetime.utcnow datetime.datetime.today datetime.date.today"),
    ("SG201", _CLOCK, "time.time time.time_ns time.monotonic time.monotonic_ns time.perf_counter time.sleep"),
    ("SG201", _CLOCK, "time.localtime time.gmtime time.strftime time.ctime"),
    ("SG202", _CHANCE, "uuid.uuid1 uuid.uuid4 uuid.uuid6 uuid.uuid7 os.urandom os.getrandom posix.urandom"),
    ("SG203", _OUTSIDE, "io.open _io.open builtins.open builtins.input os.system os.popen os.getenv socket.socket"),
    ("SG203", _OUTSIDE, "socket.create_connection asyncio.open_connection asyncio.streams.open_connection"),
    ("SG203", _OUTSIDE, "asyncio.create_subprocess_exec asyncio.create_subprocess_shell"),
    ("SG204", _UNORDERED, "asyncio.wait asyncio.tasks.wait"),
    ("SG204", "use saga.as_completed()", "asyncio.as_completed asyncio.tasks.as_completed"),
    (
        "SG204",
        _ONE_LOOP,
        "asyncio.to_thread asyncio.threads.to_thread asyncio.run threading.Thread",
    ),
)
_PACKAGES = _table(
    ("SG202", _CHANCE, "random secrets numpy.random"),
    ("SG203", _OUTSIDE, "requests httpx aiohttp urllib urllib3 http.client subprocess smtplib ftplib shutil"),
    ("SG203", _OUTSIDE, "redis psycopg psycopg2 asyncpg sqlite3 boto3 pymongo"),
)
_PURE = frozenset({"urllib.parse"})


def _misused(source: Source, call: ast.Call) -> tuple[str, str] | None:
    """Return rule and message of a call that saga code must not make."""
    name = dotted(source, call.func)
    found = _CALLS.get(name) or _of_package(name)
    if found is not None:
        written = ast.unparse(call.func)
        return found[0], f"{written}() {_HARM[found[0]]}; {found[1]}"
    return _direct(source, call)


def _of_package(name: str) -> tuple[str, str] | None:
    parts = name.split(".")
    prefixes = [".".join(parts[:length]) for length in range(1, len(parts))]
    if any(prefix in _PURE for prefix in prefixes):
        return None
    return next((_PACKAGES[prefix] for prefix in prefixes if prefix in _PACKAGES), None)


_SENDING = frozenset({"delay", "apply_async", "apply", "adelay", "aapply_async"})


def _direct(source: Source, call: ast.Call) -> tuple[str, str] | None:
    """Return rule and message of a step or saga that is called or sent instead of asked for."""
    func = call.func
    sent = isinstance(func, ast.Attribute) and func.attr in _SENDING
    node = func.value if isinstance(func, ast.Attribute) and sent else func
    verb = f"sent with {ast.unparse(func).rpartition('.')[2]}()" if sent else "called"
    found = resolve(source, node)
    written = ast.unparse(node)
    if isinstance(found, Saga):
        return "SG205", f"saga {written} is {verb} directly in saga code; use saga.child(...), or start it in a step"
    celery_task = hasattr(found, "apply_async") and hasattr(found, "run") and not inspect.isclass(found)
    if isinstance(found, Step) or (celery_task and sent):
        return "SG205", f"step {written} is {verb} directly in saga code; write `await saga.step({written}, ...)`"
    return None


# -- what is not awaited -----------------------------------------------------------------------------------------------
_FUTURES = (saga_step, saga_child, saga_once)  # under way as soon as they are asked for: they may be awaited later


def _check_awaits(source: Source) -> Iterator[Finding]:
    """Yield what is no result yet where only a result makes sense: a future is true, whatever comes of it."""
    for node in _nodes(source, source.node.body):
        for operand in _operands(node):
            if isinstance(operand, ast.Call) and _is_awaitable(source, operand):
                written = ast.unparse(operand.func)
                text = f"{written}(...) is not awaited: this is a future, not its result; write `await {written}(...)`"
                yield from _at(source, operand, "SG206", text)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _is_coroutine(source, node.value):
            written = ast.unparse(node.value.func)
            text = f"{written}(...) is not awaited, and does nothing without; write `await {written}(...)`"
            yield from _at(source, node.value, "SG206", text)


def _operands(node: ast.AST) -> list[ast.expr]:
    """Return the expressions in a node whose value it looks at."""
    match node:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) | ast.Assert(test=test):
            return [test]
        case ast.BoolOp(values=values):
            return values[:-1]  # the last one is handed on
        case ast.UnaryOp(operand=value) | ast.FormattedValue(value=value) | ast.Subscript(value=value):
            return [value]
        case ast.Compare(left=left, comparators=others):
            return [left, *others]
        case ast.BinOp(left=left, right=right):
            return [left, right]
    return []


def _is_awaitable(source: Source, call: ast.Call) -> bool:
    found = resolve(source, call.func)
    return any(found is each for each in _FUTURES) or inspect.iscoroutinefunction(found)


def _is_coroutine(source: Source, call: ast.Call) -> bool:
    return inspect.iscoroutinefunction(resolve(source, call.func))


# -- after the pivot ---------------------------------------------------------------------------------------------------
class _Flow:
    """Follows a function statement by statement: which steps can come after a pivot."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._found: list[Finding] = []

    def check(self) -> list[Finding]:
        """Return the steps after a pivot that are neither retriable nor without effect."""
        self._block(self._source.node.body, "")
        return self._found

    def _block(self, statements: list[ast.stmt], pivot: str) -> str:
        for statement in statements:
            pivot = self._statement(statement, pivot)
        return pivot

    def _statement(self, statement: ast.stmt, pivot: str) -> str:
        """Judge a statement after `pivot` (the name of one, or empty); return the pivot after it."""
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self._block(statement.body, pivot)
            return pivot
        for inner in ast.iter_child_nodes(statement):
            if isinstance(inner, ast.expr | ast.withitem):
                pivot = self._expression(inner, pivot)
        branches = _branches(statement)
        ends = [self._block(branch, pivot) for branch in branches if branch]
        after = next((end for end in ends if end), pivot)
        final = getattr(statement, "finalbody", None)
        return self._block(final, after) if final else after

    def _expression(self, node: ast.AST, pivot: str) -> str:
        for call in _calls(self._source, [node]):  # type: ignore[list-item]
            use = _used_step(self._source, call)
            if use is None:
                continue
            if use.effect == Effect.PIVOT:
                pivot = pivot or use.name
            elif pivot and use.effect not in (Effect.RETRIABLE, Effect.NONE):
                text = (
                    f"step {use.name} comes after the pivot {pivot} and can fail for good: the run could then "
                    "neither go on nor back and would park. Declare it effect=Effect.RETRIABLE, or move it to before "
                    "the pivot"
                )
                self._found += _at(self._source, call, "SG103", text)
        return pivot


def _branches(statement: ast.stmt) -> list[list[ast.stmt]]:
    """Return the blocks of a statement of which one at most is run, or which are run one by one."""
    if isinstance(statement, ast.Try | ast.TryStar):
        return [statement.body + statement.orelse, *(handler.body for handler in statement.handlers)]
    if isinstance(statement, ast.Match):
        return [case.body for case in statement.cases]
    return [getattr(statement, "body", []), getattr(statement, "orelse", [])]
