"""What a canvas gives is what Celery's would give."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from celery import chain, chord, group
from celery.canvas import Signature
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kombu.utils import json as kombu_json

from orchestrator import durable, saga, testing
from orchestrator.canvas.starting import run_canvas
from tests.canvas.tasks import Order, add, call, double, price, same, take, total

CASES: dict[str, tuple[Callable[[], Any], Any]] = {
    "one task": (lambda: add.s(3, 4), 7),
    "a chain": (lambda: add.s(4, 4) | add.s(8) | add.s(16), 32),
    "a chain of one": (lambda: chain(add.s(3, 4)), 7),
    "a chain in a chain": (lambda: chain(add.s(1, 1), chain(add.s(1), add.s(1)), add.s(1)), 5),
    "an immutable link": (lambda: chain(add.s(1, 1), add.si(5, 5), add.s(1)), 11),
    "None is passed on": (lambda: chain(same.s(None), call.s(1)), [[None, 1], {}]),
    "keyword arguments": (lambda: chain(same.s(1), call.s(2, a=3)), [[1, 2], {"a": 3}]),
    "a group": (lambda: group(add.s(n, n) for n in range(4)), [0, 2, 4, 6]),
    "an empty group": (lambda: group([]), []),
    "a group in a group is one list": (lambda: group(same.s(1), group(same.s(2), group(same.s(3), same.s(4)))),
                                       [1, 2, 3, 4]),
    "a chain in a group": (lambda: group(add.s(1, 1) | add.s(1), same.s(9)), [3, 9]),
    "a chain that ends in a group, in a group": (
        lambda: group(same.s(1), same.s(2), chain(same.s(5), group(same.s(), same.s()))), [1, 2, [5, 5]]),
    "nothing but that in a group": (lambda: group(add.s(1, 2) | group(add.s(1), add.s(2))), [4, 5]),
    "a group at the end of a chain": (lambda: add.s(1, 1) | group(add.s(1), add.s(2)), [3, 4]),
    "a group in a chain is a chord": (lambda: chain(same.s(4), group(add.s(1), add.s(2)), total.s()), 11),
    "a group of one in a chain is its member": (lambda: chain(same.s(4), group(add.s(1)), same.s()), 5),
    "an empty group in a chain is not there": (lambda: chain(same.s(4), group([]), add.s(1)), 5),
    "two groups in a row": (lambda: chain(same.s(1), group(add.s(1), add.s(1)), group(total.s(), total.s()), total.s()),
                            8),
    "chain inside group receives arguments": (lambda: add.s(5, 6) | group(add.s(1) | add.s(2), add.s(3)), [14, 14]),
    "a chord": (lambda: chord([add.s(1, 2), add.s(3, 4)], total.s()), 10),
    "a chord of one": (lambda: chord([add.s(2, 5)], same.s()), [7]),
    "a group of one and a body": (lambda: group([add.s(2, 5)]) | same.s(), [7]),
    "an empty header": (lambda: chord([], same.s()), []),
    "a body with arguments": (lambda: chord([same.s(1), same.s(2)], call.s(3, a=4)), [[[1, 2], 3], {"a": 4}]),
    "an immutable body": (lambda: chord([same.s(1)], same.si(8)), 8),
    "a body that is a chain": (lambda: chord([same.s(1), same.s(2)], chain(total.s(), add.s(10))), 13),
    "a body that is a group": (lambda: chord([same.s(1), same.s(2)], group(total.s(), same.s())), [3, [1, 2]]),
    "a chord in a chain": (lambda: chain(same.s(1), chord([add.s(1), add.s(2)], total.s()), add.s(1)), 6),
    "a chord in a chord": (lambda: chord([chord([add.s(1, 2), add.s(3, 4)], total.s()), same.s(1)], total.s()), 11),
    "a group in a header is one list": (lambda: chord([same.s(1), group(same.s(2), same.s(3))], same.s()), [1, 2, 3]),
    "a chain that ends in a group, in a header": (
        lambda: chord(group(chain(same.s(42), group(same.s(), same.s()))), same.s()), [[42, 42]]),
    "chords in a group": (lambda: group(chord([same.s(1)], total.s()), chord([same.s(2)], total.s())), [1, 2]),
    "a map": (lambda: total.map([[1, 2], [3]]), [3, 3]),
    "a starmap": (lambda: add.starmap([(1, 2), (3, 4)]), [3, 7]),
    "a map in a chain": (lambda: chain(same.s(0), total.map([[1], [2]]), total.s()), 3),
    "chunks": (lambda: add.chunks(zip(range(5), range(5), strict=True), 2), [[0, 2], [4, 6], [8]]),
    "deep chords": (lambda: group([group([group([same.s(1)]) | same.s()]) | same.s()]) | same.s(), [[[1]]]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_result_is_that_of_celery(name: str) -> None:
    make, expected = CASES[name]
    assert testing.run(durable(make())).result() == expected


@pytest.mark.parametrize("name", CASES)
def test_a_signature_that_went_through_json_gives_the_same(name: str) -> None:
    make, expected = CASES[name]
    assert testing.run(durable(_through_json(make()))).result() == expected


def _through_json(signature: Any) -> Any:
    """Return it as a message has it: plain dicts and lists."""
    if isinstance(signature, dict):
        return {name: _through_json(value) for name, value in signature.items()}
    if isinstance(signature, (str, int, type(None))):
        return signature
    return [_through_json(item) for item in signature]


def test_partial_arguments_go_to_the_first_links() -> None:
    assert testing.run(durable(add.s(1) | add.s(2)), 10).result() == 13
    assert testing.run(durable(group(add.s(1), add.s(2))), 10).result() == [11, 12]
    assert testing.run(durable(chord([add.s(1), add.s(2)], total.s())), 10).result() == 23
    assert testing.run(durable(chain(call.s(1), same.s())), 0, kwargs={"a": 2}).result() == [[0, 1], {"a": 2}]
    assert testing.run(durable(chain(group(call.s(), call.s()), same.s())), kwargs={"a": 2}).result() == [
        [[], {"a": 2}],
        [[], {"a": 2}],
    ]


def test_an_immutable_link_takes_no_partial_arguments() -> None:
    assert testing.run(durable(call.si(1)), 10, kwargs={"a": 2}).result() == [[1], {}]
    assert testing.run(durable(group(call.si(1), call.s(1))), 10).result() == [[[1], {}], [[10, 1], {}]]


def test_a_canvas_can_be_started_twice_also_one_of_a_generator() -> None:
    canvas = durable(group(same.s(n) for n in range(3)))
    assert [testing.run(canvas).result() for _ in range(2)] == [[0, 1, 2], [0, 1, 2]]


def test_steps_in_a_canvas_get_typed_arguments_and_give_typed_results() -> None:
    order = Order(id="7", cents=100)
    run = testing.run(durable(chain(take.s(order), price.s(more=5), add.s(1))))
    assert run.result() == 106
    assert run.calls[0].args == (order,) and run.calls[1].args[0] == order


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: price.signature((Order(id="7", cents=5),), {"more": 2}, priority=3), 7),
        (lambda: price.map([Order(id="7", cents=5), Order(id="8", cents=6)]), [5, 6]),
        (lambda: price.starmap([(Order(id="7", cents=5), 1)]), [6]),
        (lambda: price.chunks([(Order(id="7", cents=n), 1) for n in range(3)], 2), [[1, 2], [3]]),
    ],
    ids=["signature", "map", "starmap", "chunks"],
)
def test_a_step_makes_the_signatures_that_a_task_of_celery_makes(make: Callable[[], Any], expected: Any) -> None:
    assert testing.run(durable(make())).result() == expected


def test_what_json_has_no_word_for_comes_as_celery_would_send_it() -> None:
    assert testing.run(durable(same.s((1, {2, 1})))).result() == [1, [1, 2]]


MOMENT = datetime(2026, 1, 31, 23, 59, 59, 5, tzinfo=timezone(timedelta(hours=2)))
PRICE = Decimal("9.90")


@pytest.mark.parametrize(
    "value",
    [PRICE, MOMENT, MOMENT.date(), MOMENT.time(), UUID(int=7), b"text", b"\xff\0", {"of": [PRICE, (MOMENT, None)]}],
    ids=repr,
)
def test_a_plain_task_gets_and_gives_what_a_message_of_celery_would_carry(value: Any) -> None:
    sent = kombu_json.loads(kombu_json.dumps(value))

    @saga.define
    async def ask() -> bool:
        given = [
            await saga.step(same, value),
            await saga.step(same.s(value)),
            await saga.step(chain(same.s(value), same.s())),
        ]
        return given == [sent] * 3

    run = testing.run(ask)
    assert [call.args for call in run.calls] == [(sent,)] * 4 and run.result()
    assert testing.run(durable(group(same.s(value), call.s(it=value)))).result() == [sent, [[], {"it": sent}]]
    assert testing.run(durable(same.map([value]))).result() == [sent]


def test_what_a_plain_task_gives_fits_a_step_and_the_other_way_round() -> None:
    run = testing.run(durable(chain(same.s(PRICE), double.s(since=MOMENT), add.s(PRICE))))
    assert run.result() == 3 * PRICE
    assert run.calls[1].args == (PRICE, MOMENT)


# -- any canvas at all -------------------------------------------------------------------------------------------------
_tasks = st.sampled_from([call.s, call.si]).map(lambda make: make()) | st.integers(0, 9).map(lambda n: call.s(n))


def _nested(canvases: st.SearchStrategy[Signature]) -> st.SearchStrategy[Signature]:
    some = st.lists(canvases, min_size=1, max_size=3)
    return st.one_of(some.map(chain), some.map(group), st.tuples(some, canvases).map(lambda parts: chord(*parts)))


@settings(max_examples=100, deadline=None)
@given(st.recursive(_tasks, _nested, max_leaves=8))
def test_every_canvas_gives_what_celery_gives_when_it_runs_it_here(signature: Signature) -> None:
    assume(not (isinstance(signature, group) and len(signature.tasks) == 1))  # only workers unwrap such a group
    expected = signature.clone().apply().get()
    assert testing.run(durable(signature)).result() == expected


@settings(max_examples=60, deadline=None)
@given(st.recursive(_tasks, _nested, max_leaves=6), st.lists(st.integers(0, 9), min_size=1, max_size=2))
def test_partial_arguments_go_where_celery_puts_them(signature: Signature, args: list[int]) -> None:
    assume(not (isinstance(signature, group) and len(signature.tasks) == 1))
    expected = signature.clone().apply(args=args).get()
    assert testing.run(durable(signature), *args).result() == expected


@settings(max_examples=60, deadline=None)
@given(st.recursive(_tasks, _nested, max_leaves=8))
def test_a_canvas_is_the_same_after_it_was_stored(signature: Signature) -> None:
    canvas = durable(signature).canvas
    stored = run_canvas.codec.encode_call((canvas,), {})
    assert run_canvas.codec.decode_call(stored)[0] == (canvas,)
