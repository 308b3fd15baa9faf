"""`saga.map`: a step for each of very many items, page by page.

Owns the paging and the summary.  Each page is a child (saga `orchestrator.map`), so that the history and the memory of
the run that maps grow by one entry a page, whatever becomes of its items; what the items did is undone with the page,
as with any child.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.codec import Json, check, dumps
from orchestrator.errors import DefinitionError, MapFailed, PayloadError, StepFailed, UsageError, describe_exception
from orchestrator.machine.code import Request
from orchestrator.machine.journal import Asked, decode_entry, encode
from orchestrator.machine.policy import Effect, Limit
from orchestrator.saga.declare import define
from orchestrator.saga.family import child_of
from orchestrator.saga.inside import code_of
from orchestrator.saga.steps import LegacyStep, asked_of, decode_result, failure_of, step_of
from orchestrator.step import Step

PAGE = 500  # items in a page
_PAGE_BYTES = 100_000  # of items in a page; half of what an input may have
_TOLD_BY_PAGE, _TOLD = 100, 1000  # failures that are told one by one


@dataclass(frozen=True, slots=True)
class MapSummary:
    """What became of the items of a `saga.map`.

    `failures` tells of the first thousand, as mappings: ``index``, ``outcome``, ``type`` and ``message``.  `results`
    are in the order of the items, None for one that failed; there are none without ``collect=True``.
    """

    total: int = 0
    succeeded: int = 0
    failed: int = 0
    failures: tuple[dict[str, Any], ...] = ()
    results: tuple[Any, ...] = ()


async def map(
    task: Any,
    items: Any,
    *,
    concurrency: int = 100,
    rate: str | None = None,
    tolerate: float = 0,
    page: int = PAGE,
    collect: bool = False,
    args: Sequence[Any] = (),
) -> MapSummary:
    """Run `task` once for each item, with bounded memory and history; tell how many failed, and which.

    `items` is an iterable that is the same on every replay, or a paging step: it takes a cursor (None at first) and
    after it `args`, and returns items and the next cursor (None at the end).  At most `concurrency` of them are under
    way, and `rate` ("100/s") begin over all workers.  `tolerate` is how many may fail: a number, or below 1 a share of
    all.  Pages of `page` items come one after the other.

    Raises: MapFailed if more failed: then the run, unless it catches that, is undone item by item.  UsageError.
    """
    plan = _Plan.of(task, concurrency, rate, tolerate, page, collect)
    tally = _Tally(plan)
    if isinstance(items, Step):
        await _map_pages(plan, tally, items, tuple(args))
    elif args:
        raise UsageError("saga.map: args= are for a paging step; the items here are an iterable")
    elif isinstance(items, str | bytes):
        raise UsageError(f"saga.map: text is one item, not many; for one for each letter write list({items!r:.40})")
    else:
        for first, calls in _batches(plan, items):
            tally.add(await _child(plan, plan.spec(first, calls=calls)))
    return tally.summary()


async def _map_pages(plan: _Plan, tally: _Tally, pages: Step[Any, Any], args: tuple[Any, ...]) -> None:
    cursor: Json = None
    asked = encode(replace(_template(pages), args=pages.codec.encode_call((cursor, *args), {})))
    while True:
        found = await _child(plan, plan.spec(tally.total, pages=asked, cursor=cursor))
        tally.add(found)
        cursor = found.get("cursor")
        if cursor is None:
            return


def _child(plan: _Plan, spec: dict[str, Json]) -> asyncio.Future[dict[str, Any]]:
    encoded = run_page.codec.encode_call((spec,), {})
    return child_of(code_of("map"), run_page, encoded, functools.partial(_same, plan.task, encoded["spec"]))


def _same(task: Step[Any, Any], page: Json, recorded: Asked) -> bool:
    """Tell whether a page was asked for with these items: as for any step, its options of that day count for it."""
    if recorded.kind != "child" or recorded.task != run_page.name:
        return False
    known = recorded.args["spec"]
    return bool(known == page) or _items(task, known) == _items(task, page)


def _items(task: Step[Any, Any], page: Any) -> list[Json]:
    """Return what of a page is compared."""
    calls = [task.codec.canonical(call["a"]) if "a" in call else call for call in page.get("calls") or ()]
    do, paging = decode_entry(page["do"]), decode_entry(page["pages"]) if page.get("pages") else None
    assert isinstance(do, Asked)
    others = None
    if isinstance(paging, Asked):
        others = [paging.task, step_of(paging.task).codec.canonical(paging.args), page.get("cursor")]
    return [do.task, page["first"], calls, others, page.get("collect", False)]


# -- planning ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Plan:
    task: Step[Any, Any]
    template: Asked
    concurrency: int
    tolerate: float
    page: int
    collect: bool

    @classmethod
    def of(cls, task: Any, concurrency: int, rate: str | None, tolerate: float, page: int, collect: bool) -> _Plan:
        declared = step_of(task)
        whole: tuple[Any, ...] = (concurrency, page)
        if any(type(many) is not int or many < 1 for many in whole) or not tolerate >= 0:
            raise UsageError("saga.map: concurrency= and page= must be whole numbers, 1 or more, tolerate= 0 or more")
        if declared.effect == Effect.PIVOT:
            raise UsageError(f"saga.map: {declared.name} is a pivot, and a run has one point of no return")
        if declared.options.key:
            raise UsageError(
                f"saga.map: {declared.name} has a key= of its own, but items are told apart by their index"
            )
        template = _template(declared)
        if rate is not None:
            if declared.limited:
                raise UsageError(f"saga.map: {declared.name} has limits of its own; leave rate= out")
            template = replace(template, limit=_limit(rate))
        return cls(declared, template, concurrency, tolerate, page, collect)

    def spec(self, first: int, **what: Json) -> dict[str, Json]:
        """Return the input of a page."""
        spec = {"do": encode(self.template), "first": first, "concurrency": self.concurrency, **what}
        if "pages" in what and not isinstance(self.task, LegacyStep):
            spec["declared"] = True  # it is to be known where the page is read
        return {**spec, "collect": True} if self.collect else spec


def _template(task: Step[Any, Any]) -> Asked:
    """Return the request for a step before it has a key and arguments."""
    bare = task if not task.limited else task.with_options(rate_limit=None, concurrency=None, limit_key=None)
    asked = asked_of(bare, {}, code_of("map").fold.info.queue, "")
    undo = task.named_undo()
    return replace(asked, undo=undo) if undo is not None else asked


def _limit(rate: str) -> dict[str, Json]:
    code = code_of("map")
    try:
        return Limit(rate).encode(f"map {code.fold.info.id} {code.branch.key('map')}")
    except DefinitionError as error:
        raise UsageError(f"saga.map: {error}") from None


def _batches(plan: _Plan, items: Iterable[Any]) -> Iterator[tuple[int, list[Json]]]:
    """Cut items into pages by number and size."""
    calls: list[Json] = []
    size = first = 0
    for index, item in enumerate(items):
        call, length = _call(plan.task, plan.template, item, from_json=False)
        if calls and (len(calls) >= plan.page or size + length > _PAGE_BYTES):
            yield first, calls
            calls, size, first = [], 0, index
        calls.append(call)
        size += length
    if calls:
        yield first, calls


def _call(task: Step[Any, Any], template: Asked, item: Any, *, from_json: bool) -> tuple[dict[str, Json], int]:
    """Encode one call; an item that cannot be stored takes its place as the error that it makes."""
    try:
        args = task.codec.encode_call((item,), {}, from_json=from_json)
        undo = template.undo
        if undo is not None and undo.args is None:
            args = {**task.codec.encode_defaults([name for name in undo.names if name not in args]), **args}
        call: dict[str, Json] = {"a": args}
        if task.limited and template.limit is None:
            call["limit"] = task.limit(args)
        armed = task.arm(args)
        if armed is not None and armed.limit is not None:
            call["undo_limit"] = armed.limit
        return call, len(dumps(call, what="the item"))
    except (PayloadError, TypeError, UsageError) as error:
        known = describe_exception(error)
        return {"error": {"type": known["type"], "message": known["message"]}}, 500


# -- a page ------------------------------------------------------------------------------------------------------------
@define(name="orchestrator.map")
async def run_page(spec: dict[str, Any]) -> dict[str, Any]:
    """Run one page of a `saga.map`; returns counts, the first failures, and the next cursor."""
    template = decode_entry(spec["do"])
    assert isinstance(template, Asked)
    cursor = None
    calls = spec.get("calls")
    if calls is None:
        calls, cursor = await _read_page(template, spec)
    page = _Page(template, spec["first"], calls, spec.get("collect", False))
    numbers = iter(range(len(calls)))
    await asyncio.gather(*(page.work(numbers) for _ in range(min(spec["concurrency"], len(calls)))))
    told = sorted(page.failures, key=lambda failure: failure["index"])[:_TOLD_BY_PAGE]
    done = {"total": len(calls), "failed": len(page.failures), "failures": told, "cursor": cursor}
    return _that_fits({**done, "results": page.results} if page.collect else done)


def _that_fits(done: dict[str, Any]) -> dict[str, Any]:
    """Return what is told of a page.  Raises: UsageError, which undoes nothing, if it is too large to be stored."""
    try:
        check(done, what=f"what came of the {done['total']} items of this page")
    except PayloadError as error:
        raise UsageError(
            f"{error} All of its items are done: raise the limit in all workers and `saga retry` this run, and map "
            "with a smaller page= from now on"
        ) from None
    return done


async def _read_page(template: Asked, spec: dict[str, Any]) -> tuple[list[dict[str, Any]], Json]:
    pages = decode_entry(spec["pages"])
    assert isinstance(pages, Asked)
    paging, task = step_of(pages.task), step_of(template.task)
    for step in (paging, task) if spec.get("declared") else (paging,):
        if isinstance(step, LegacyStep):
            raise UsageError(
                f"{step.name} is a declared step that this worker does not import, so that it cannot read a page of "
                "items. Include its module in every worker of the run's queue, then `saga retry` the run"
            )
    others = {name: value for name, value in pages.args.items() if name != paging.codec.parameters[0]}
    args = paging.codec.encode_call((spec["cursor"],), others, from_json=True)
    found = await code_of("map").ask(_request(replace(pages, args=args), ""))
    if not isinstance(found, list) or len(found) != 2 or not isinstance(found[0], list):
        raise UsageError(f"{pages.task} is to return items and the next cursor, not {found!r:.80}")
    return [_call(task, template, item, from_json=True)[0] for item in found[0]], found[1]


class _Page:
    """The items of one page, and what became of them."""

    def __init__(self, template: Asked, first: int, calls: list[dict[str, Any]], collect: bool) -> None:
        self.template = template
        self.first = first
        self.calls = calls
        self.collect = collect
        self.failures: list[dict[str, Any]] = []
        self.results: list[Json] = [None] * len(calls) if collect else []

    async def work(self, numbers: Iterator[int]) -> None:
        """Take one item after the other, until none is left."""
        code = code_of("map")
        for number in numbers:
            call = self.calls[number]
            if "error" in call:
                self._failed(number, "rejected", call["error"])
                continue
            try:
                result = await code.ask(_request(self._asked(call), f"[{self.first + number}]"))
            except StepFailed as error:
                self._failed(number, error.outcome, error.error)
            else:
                if self.collect:
                    self.results[number] = result

    def _asked(self, call: dict[str, Any]) -> Asked:
        undo = self.template.undo
        if undo is not None and "undo_limit" in call:
            undo = replace(undo, limit=call["undo_limit"])
        return replace(self.template, args=call["a"], undo=undo, limit=call.get("limit", self.template.limit))

    def _failed(self, number: int, outcome: str, error: dict[str, Any]) -> None:
        told = {"type": error.get("type", ""), "message": str(error.get("message", ""))[:500]}
        self.failures.append({"index": self.first + number, "outcome": outcome, **told})


def _request(template: Asked, key: str) -> Request:
    return Request(
        name=template.task,
        key=key,
        asked=lambda key: replace(template, key=key),
        same=functools.partial(_same_call, template),
        decode=lambda result: result,
        failure=functools.partial(failure_of, code_of("map").fold.info.id),
    )


def _same_call(template: Asked, recorded: Asked) -> bool:
    """Tell whether a recorded request is this one; what a paging step has returned is encoded anew at each replay."""
    if recorded.task != template.task:
        return False
    return bool(recorded.args == template.args) or step_of(template.task).codec.same(recorded.args, template.args)


# -- the summary -------------------------------------------------------------------------------------------------------
class _Tally:
    """Adds pages up; stops the map as soon as more items have failed than may."""

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self.total = self.failed = 0
        self._failures: list[dict[str, Any]] = []
        self._results: list[Any] = []

    def add(self, page: dict[str, Any]) -> None:
        """Add a page.  Raises: MapFailed if a number of failures is tolerated and that is exceeded."""
        self.total += page["total"]
        self.failed += page["failed"]
        self._failures += itertools.islice(page["failures"], max(0, _TOLD - len(self._failures)))
        failed = {failure["index"] for failure in page["failures"]} if page.get("results") else ()
        untold = page["failed"] > len(failed)  # of those the result is None, as of some that have none
        for index, result in enumerate(page.get("results", ()), len(self._results)):
            has_none = index in failed or (untold and result is None)
            self._results.append(None if has_none else decode_result(self._plan.task, result))
        if self._plan.tolerate >= 1 or not self._plan.tolerate:
            self._refuse_beyond(self._plan.tolerate)

    def summary(self) -> MapSummary:
        """Return the sum.  Raises: MapFailed if more items failed than may."""
        if 0 < self._plan.tolerate < 1:
            self._refuse_beyond(self._plan.tolerate * self.total)
        return self._summary()

    def _summary(self) -> MapSummary:
        succeeded = self.total - self.failed
        return MapSummary(self.total, succeeded, self.failed, tuple(self._failures), tuple(self._results))

    def _refuse_beyond(self, limit: float) -> None:
        if self.failed <= limit:
            return
        first = self._failures[0]
        raise MapFailed(
            f"{self.failed} of {self.total} items of {self._plan.task.name} failed, and {limit:g} may; item "
            f"{first['index']}: {first['type']}: {first['message']}",
            summary=self._summary(),
        )
