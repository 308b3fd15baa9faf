"""Values of many types, to JSON and back by their annotation or without one."""

from __future__ import annotations

import asyncio
import enum
import math
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    Secret,
    SecretBytes,
    SecretStr,
    computed_field,
    field_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import TypedDict

from orchestrator.codec import Json, ValueCodec, dumps, encode_any, loads
from orchestrator.errors import DefinitionError, PayloadError

T = TypeVar("T")


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Line(BaseModel):
    model_config = ConfigDict(frozen=True)
    sku: str
    price: Decimal


class Order(BaseModel):
    id: UUID
    lines: list[Line]
    placed: datetime
    color: Color = Color.RED
    tags: set[str] = set()


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)
    at: datetime
    amount: Decimal
    pair: tuple[int, str]


class Page(BaseModel, Generic[T]):
    items: list[T]
    cursor: str | None = None


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")
    data: Any = None
    by_name: dict[str, Any] = {}


@dataclass
class Point:
    x: float
    raw: bytes = b""
    labels: frozenset[str] = field(default_factory=frozenset)


class Row(TypedDict):
    id: int
    raw: bytes


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
floats = st.floats(allow_nan=False, allow_infinity=False)
decimals = st.decimals(allow_nan=False, allow_infinity=False)
instants = st.datetimes(timezones=st.just(UTC))
durations = st.timedeltas(timedelta(days=-10_000), timedelta(days=10_000))
lines = st.builds(Line, sku=texts, price=decimals)
orders = st.builds(Order, id=st.uuids(), lines=st.lists(lines, max_size=3), placed=instants, tags=st.sets(texts))

TYPED: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (bool, st.booleans()),
    (int, st.integers()),
    (float, floats),
    (str, texts),
    (bytes, st.binary()),
    (Decimal, decimals),
    (datetime, instants | st.datetimes()),
    (date, st.dates()),
    (time, st.times()),
    (timedelta, durations),
    (UUID, st.uuids()),
    (Path, st.just(Path("/tmp/a b/ü"))),
    (Color, st.sampled_from(Color)),
    (Level, st.sampled_from(Level)),
    (Order, orders),
    (Strict, st.builds(Strict, at=instants, amount=decimals, pair=st.tuples(st.integers(), texts))),
    (Page[Line], st.builds(Page[Line], items=st.lists(lines, max_size=3))),
    (Point, st.builds(Point, x=floats, raw=st.binary(), labels=st.frozensets(texts))),
    (Row, st.fixed_dictionaries({"id": st.integers(), "raw": st.binary()})),
    (tuple[int, str], st.tuples(st.integers(), texts)),
    (tuple[Decimal, ...], st.lists(decimals, max_size=3).map(tuple)),
    (set[UUID], st.sets(st.uuids(), max_size=4)),
    (frozenset[Line], st.frozensets(lines, max_size=3)),
    (dict[int, Decimal], st.dictionaries(st.integers(), decimals, max_size=3)),
    (dict[str, list[datetime]], st.dictionaries(texts, st.lists(instants, max_size=2), max_size=2)),
    (Order | None, st.none() | orders),
    (int | str | None, st.none() | st.integers() | texts),
    (list[Point | None], st.lists(st.none() | st.builds(Point, x=floats, raw=st.binary()), max_size=3)),
    (list[bytes], st.lists(st.binary(), max_size=3)),
]


@pytest.mark.parametrize(("annotation", "strategy"), TYPED, ids=[str(annotation) for annotation, _ in TYPED])
def test_a_typed_value_comes_back_equal_and_of_its_type(annotation: Any, strategy: st.SearchStrategy[Any]) -> None:
    codec = ValueCodec(annotation)

    @given(strategy)
    def comes_back(value: Any) -> None:
        back = codec.decode(loads(dumps(codec.encode(value))))
        assert back == value
        assert type(back) is type(value)

    comes_back()


@given(st.recursive(st.none() | st.booleans() | st.integers() | floats | texts, st.lists))
def test_plain_data_needs_no_annotation(value: Any) -> None:
    assert ValueCodec(Any).decode(loads(dumps(encode_any(value)))) == value


@pytest.mark.parametrize("annotation", [Any, dict[str, Any]], ids=str)
def test_whoever_changes_what_was_decoded_does_not_change_what_is_stored(annotation: Any) -> None:
    stored: Json = {"lines": [{"n": 1}]}
    value = ValueCodec(annotation).decode(stored)
    value["lines"][0]["n"] = 2
    value["lines"].append(3)
    assert stored == {"lines": [{"n": 1}]}


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (Decimal("1.50"), "1.50"),
        (Decimal("NaN"), "NaN"),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00Z"),
        (timedelta(seconds=90), "PT1M30S"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Color.BLUE, "blue"),
        (Level.HIGH, 2),
        ((1, {"a": (2,)}), [1, {"a": [2]}]),
        ({3, 1, 2}, [1, 2, 3]),
        ({1: "a"}, {"1": "a"}),
        (Line(sku="a", price=Decimal(1)), {"sku": "a", "price": "1"}),
        (Point(1.0, b"\xff", frozenset("ba")), {"x": 1.0, "raw": "_w==", "labels": ["a", "b"]}),
        ([b"\xff"], ["_w=="]),
        (Path("/tmp"), "/tmp"),
        (Loose(data=Line(sku="a", price=Decimal(1))), {"data": {"sku": "a", "price": "1"}, "by_name": {}}),
    ],
    ids=lambda given: type(given).__name__,  # a set's repr differs from process to process
)
def test_without_annotation_values_become_what_pydantic_dumps(value: Any, encoded: Json) -> None:
    assert encode_any(value) == encoded


def generator() -> Iterator[int]:
    yield 1


async def stream() -> AsyncIterator[int]:
    yield 1


class HostileValue:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


ONCE: list[Callable[[], Any]] = [
    generator,
    lambda: iter([1]),
    lambda: map(int, "1"),
    asyncio.Event,
    stream,
    HostileValue,
    object,
]
ONCE += [lambda: open, lambda: HostileValue, lambda: ValueError("x"), lambda: sys]


@pytest.mark.parametrize("make", ONCE, ids=range(len(ONCE)))
@pytest.mark.parametrize("annotation", [Any, list[int], dict[str, Any], Line], ids=str)
def test_what_is_not_data_is_refused(make: Callable[[], Any], annotation: Any) -> None:
    for wrap in (lambda value: value, lambda value: {"key": value}):
        with pytest.raises(Exception):  # noqa: B017 - what pydantic raises; FunctionCodec gives it its name
            ValueCodec(annotation).encode(wrap(make()))


@pytest.mark.parametrize("make", ONCE, ids=range(len(ONCE)))
def test_what_is_not_data_is_refused_inside_a_model(make: Callable[[], Any]) -> None:
    for value in (make(), [make()], {"a": (make(),)}):
        for model in (
            Loose(by_name={"key": value}),
            Loose(data=value),
            Loose.model_validate({"more": value}),
        ):
            with pytest.raises(PayloadError, match="the value cannot be stored"):
                encode_any(model)


def test_a_coroutine_is_refused_with_the_right_advice() -> None:
    async def later() -> int:
        return 1

    pending = later()
    with pytest.raises(PayloadError, match="await it first"):
        encode_any([pending])
    pending.close()


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        [math.inf],
        {"a": -math.inf},
        Loose(data=math.nan),
        Loose(by_name={"a": math.inf}),
        Loose.model_validate({"more": math.nan}),
    ],
)
def test_infinity_is_refused_where_pydantic_would_write_null(value: Any) -> None:
    with pytest.raises(PayloadError):
        encode_any(value)


@pytest.mark.parametrize("annotation", [float, float | None, list[float], dict[str, float | None], Point], ids=str)
def test_a_typed_nan_never_becomes_null(annotation: Any) -> None:
    values = {Point: Point(math.nan), list[float]: [math.nan], dict[str, float | None]: {"a": math.nan}}
    with pytest.raises(PayloadError, match="nan"):
        dumps(ValueCodec(annotation).encode(values.get(annotation, math.nan)))


def test_values_that_contain_themselves_are_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    ring: dict[str, Any] = {}
    ring["self"] = [ring]
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (loop, ring, deep, Loose(data=loop), Loose.model_construct(by_name=ring)):
        with pytest.raises(PayloadError):
            encode_any(value)


def test_keys_with_the_same_text_are_refused() -> None:
    with pytest.raises(PayloadError, match="same JSON text"):
        encode_any({1: "a", "1": "b"})


class Camel(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel)
    order_id: int
    sent_to: str = Field(validation_alias=AliasChoices("to", "sentTo"), serialization_alias="recipient")


class Loud(Camel):
    model_config = ConfigDict(serialize_by_alias=True)


@pytest.mark.parametrize("kind", [Camel, Loud])
def test_a_model_with_aliases_comes_back_and_is_read_from_others_by_them(kind: type[Camel]) -> None:
    value = kind.model_validate({"orderId": 7, "to": "ann"})
    codec = ValueCodec(kind)
    assert codec.decode(codec.encode(value)) == value
    assert codec.decode({"orderId": 7, "sentTo": "ann"}) == value
    assert ValueCodec(list[kind]).decode(encode_any([value])) == [value]  # type: ignore[valid-type]


def test_a_bare_iterable_comes_back_as_a_list() -> None:
    assert ValueCodec(Iterable[int]).decode(ValueCodec(Iterable[int]).encode((1, 2))) == [1, 2]


def test_a_model_changed_after_its_validation_is_refused() -> None:
    order = Order(id=uuid4(), lines=[], placed=datetime(2026, 1, 1, tzinfo=UTC))
    order.placed = "soon"  # type: ignore[assignment]
    with pytest.raises(PayloadError, match="cannot be stored"):
        encode_any(order)


def test_the_order_of_a_set_is_the_same_in_every_process() -> None:
    code = "from orchestrator.codec import *; print(dumps(ValueCodec(set[str]).encode(set('abcdefghij'))))"
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert told == {b'["a","b","c","d","e","f","g","h","i","j"]\n'}


def test_sets_inside_models_are_ordered() -> None:
    order = Order(id=uuid4(), lines=[], placed=datetime(2026, 1, 1, tzinfo=UTC), tags=set("hgfedcba"))
    encoded = ValueCodec(list[Order]).encode([order])
    assert isinstance(encoded, list) and isinstance(encoded[0], dict)
    assert encoded[0]["tags"] == list("abcdefgh")


def test_an_annotation_that_pydantic_does_not_know_is_a_wrong_definition() -> None:
    with pytest.raises(DefinitionError, match="parameter 'x' is annotated with"):
        ValueCodec(HostileValue, what="parameter 'x'")


class Login(BaseModel):
    name: str
    password: SecretStr | None = None


class SecretDate(Secret[date]): ...


class Session(BaseModel):
    metadata: SecretStr


class Token(BaseModel):
    valid: Secret[int] | None = None


SECRET = [SecretStr, SecretBytes, Login, list[Login], dict[str, Login], Session, Secret[int], SecretDate, Token]


@pytest.mark.parametrize("annotation", SECRET)
def test_a_secret_is_a_wrong_definition_and_never_stored_as_stars(annotation: Any) -> None:
    with pytest.raises(DefinitionError, match="what is secret is not stored"):
        ValueCodec(annotation)


@pytest.mark.parametrize("value", [SecretStr("abc"), [SecretBytes(b"abc")], {"a": Login(name="ada")}, Secret("abc")])
def test_a_secret_without_annotation_is_refused(value: Any) -> None:
    with pytest.raises((PayloadError, DefinitionError), match="what is secret is not stored") as refused:
        encode_any(value)
    assert "abc" not in str(refused.value)


class Crew(BaseModel):
    """Its fields have the names of parts of pydantic's own schemas."""

    members: set[str]
    default: Any = None


def test_the_name_of_a_field_does_not_matter() -> None:
    crew = Crew(members=set("hgfedcba"), default=set("hgfedcba"))
    encoded: Any = ValueCodec(Crew).encode(crew)
    assert (encoded["members"], encoded["default"]) == (list("abcdefgh"), list("abcdefgh"))
    with pytest.raises(PayloadError, match="nan"):
        encode_any(Crew(members=set(), default=math.nan))


class Stream(BaseModel):
    items: Iterable[int]


@pydantic_dataclass
class Flow:
    streams: list[Stream]


@pytest.mark.parametrize("annotation", [Stream, list[Stream], Flow, Stream | None])
def test_a_model_that_can_be_written_only_once_is_a_wrong_definition(annotation: Any) -> None:
    """Its second step would get nothing of what its first one got."""
    with pytest.raises(DefinitionError, match=r"read only once.*list"):
        ValueCodec(annotation)


class Place(enum.Enum):
    HOME = (1, 2)


class Size(enum.Enum):
    SMALL = 1


class Hidden(BaseModel):
    id: str
    card: str = Field(exclude=True)


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    net: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def gross(self) -> int:
        return self.net * 2


class Split(BaseModel):
    words: list[str]

    @field_validator("words", mode="before")
    @classmethod
    def split(cls, text: str) -> list[str]:
        return text.split()


@dataclass
class Scaled:
    factor: InitVar[int]
    value: int = 0

    def __post_init__(self, factor: int) -> None:
        self.value *= factor


class Refund(BaseModel):
    cents: int = Field(gt=0)


class Batch(BaseModel):
    refunds: list[Refund]


def changed(refund: Refund) -> Refund:
    refund.cents = -1
    return refund


LOST: list[tuple[Any, Any]] = [
    (Place, Place.HOME),
    (dict[tuple[int, int], str], {(1, 2): "a"}),
    (dict[Size, str], {Size.SMALL: "a"}),
    (list[Hidden], [Hidden(id="a", card="b")]),
    (Closed, Closed(net=1)),
    (Split, Split(words="a b")),  # type: ignore[arg-type]
    (Scaled, Scaled(2, 3)),
    (Refund, changed(Refund(cents=1))),
    (Batch, Batch(refunds=[changed(Refund(cents=1))])),
]


@pytest.mark.parametrize(("annotation", "value"), LOST, ids=[str(annotation) for annotation, _ in LOST])
def test_what_could_not_be_read_again_is_refused_before_it_is_stored(annotation: Any, value: Any) -> None:
    with pytest.raises(PayloadError, match="cannot be read back"):
        ValueCodec(annotation).encode(value)
    encode_any(value if not isinstance(value, Scaled) else None)


def test_what_is_read_as_it_was_written_is_not_refused() -> None:
    class Point3(NamedTuple):
        x: int
        raw: bytes

    for annotation, value in (
        (dict[Color, int], {Color.RED: 1}),
        (dict[Level, int], {Level.HIGH: 1}),
        (dict[bool, int], {True: 1}),
        (Point3, Point3(1, b"a")),
        (Literal[1, "a", None], "a"),
        (Path, Path("/tmp")),
    ):
        assert ValueCodec(annotation).decode(ValueCodec(annotation).encode(value)) == value


def test_the_type_of_what_cannot_be_stored_is_told() -> None:
    class Basket: ...

    with pytest.raises(PayloadError, match=r"^the order cannot be stored: it holds a \S+\.Basket, which"):
        encode_any({"lines": [Basket()]}, "the order")
