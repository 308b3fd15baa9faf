"""Calls and results of one function to JSON and back, by parameter name.

Owns the binding of arguments to parameters. It must never call the function, and never fill in a default:
what the caller left out is left to the code of the day on which the step runs.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NoReturn

from orchestrator.codec.messages import MessageValue
from orchestrator.codec.text import Json, canonical_text, first_line, short
from orchestrator.codec.values import ValueCodec, alike, encode_any, explain, reason
from orchestrator.errors import DefinitionError, PayloadError

MISSING: Final = inspect.Parameter.empty


class FunctionCodec:
    """Encode and decode the calls and results of one function, from its annotations.

    ``skip`` leading parameters are injected by the engine and are no part of a call. ``what`` names the
    function in messages. Annotations are resolved at first use, so that they may name what is defined later
    in their module.

    Raises:
        DefinitionError: at first use, if an annotation cannot be resolved or encoded.
    """

    def __init__(self, function: Callable[..., Any], *, skip: int = 0, what: str = "") -> None:
        self.what = what or getattr(function, "__qualname__", repr(function))
        self._function = function
        parameters = list(inspect.signature(function).parameters.values())[skip:]
        self._signature = inspect.Signature(parameters)
        self._star = _named(parameters, inspect.Parameter.VAR_POSITIONAL)
        self._star_star = _named(parameters, inspect.Parameter.VAR_KEYWORD)
        fixed = [p for p in parameters if p.name not in (self._star, self._star_star)]
        self.parameters: tuple[str, ...] = tuple(p.name for p in fixed)
        self._positional = tuple(p.name for p in fixed if p.kind is not inspect.Parameter.KEYWORD_ONLY)
        self._keywords = frozenset(p.name for p in fixed if p.kind is not inspect.Parameter.POSITIONAL_ONLY)
        self._required = frozenset(p.name for p in fixed if p.default is MISSING)
        self._values: dict[str, ValueCodec] | None = None

    @functools.cached_property
    def result_annotation(self) -> Any:
        """Return what the function is annotated to return; Any if it is not."""
        return self._annotations.get("return", Any)

    def encode_call(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, from_json: bool = False
    ) -> dict[str, Json]:
        """Encode a call by parameter name; ``*items`` and ``**extra`` keep their stars.

        Defaults are not filled in. ``from_json`` says that the values were read from JSON (a message, a
        command line).

        Raises:
            TypeError: the function cannot be called like that.
            PayloadError: a value does not fit its annotation or cannot be stored.
        """
        values = self._values or self.prepare()
        if len(args) > len(self._positional) and self._star is None:
            self._refuse_call(args, kwargs)
        encoded: dict[str, Json] = {}
        for name, value in zip(self._positional, args, strict=False):
            encoded[name] = self._encode(name, values[name], value, from_json)
        extra: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name in self._keywords and name not in encoded:
                encoded[name] = self._encode(name, values[name], value, from_json)
            else:
                extra[name] = value
        if not self._required <= encoded.keys() or (extra and not self._takes(extra)):
            self._refuse_call(args, kwargs)
        if self._star is not None and len(args) > len(self._positional):
            rest, star = args[len(self._positional) :], "*" + self._star
            encoded[star] = [self._encode(star, values[star], value, from_json) for value in rest]
        if extra:
            star = f"**{self._star_star}"
            encoded[star] = {k: self._encode(f"{star}[{k}]", values[star], v, from_json) for k, v in extra.items()}
        return encoded

    def encode_defaults(self, names: Iterable[str]) -> dict[str, Json]:
        """Encode the defaults of the parameters `names`; one without a default is left out."""
        values = self._values or self.prepare()
        defaults = {name: self._signature.parameters[name].default for name in names}
        return {
            name: self._encode(name, values[name], value, False)
            for name, value in defaults.items()
            if value is not MISSING
        }

    def decode_call(self, encoded: Mapping[str, Json]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of an encoded call; what the engine injects is not among them.

        Raises:
            PayloadError: a value does not fit today's annotations, or the parameter is gone.
        """
        values = self._values or self.prepare()
        if not self._required <= encoded.keys() <= values.keys() or "return" in encoded:
            self._refuse_recorded(encoded, values)
        kwargs: dict[str, Any] = {}
        rest: list[Any] = []
        extra: dict[str, Any] = {}
        for name, value in encoded.items():
            if name[0] != "*":
                kwargs[name] = self._decode(name, values[name], value)
            elif isinstance(value, dict):
                extra = {k: self._decode(f"{name}[{k}]", values[name], item) for k, item in value.items()}
            elif isinstance(value, list):
                rest = [self._decode(name, values[name], item) for item in value]
        args = self._take_positional(kwargs, bool(rest))
        return (*args, *rest), kwargs | extra

    def message_call(self, encoded: dict[str, Json]) -> tuple[list[Any], dict[str, Any]]:
        """Return an encoded call as the arguments of a message, still encoded: by name whatever may be named."""
        kwargs: dict[str, Any] = {name: value for name, value in encoded.items() if name[0] != "*"}
        rest: Any = encoded.get(f"*{self._star}") or []
        extra: Any = encoded.get(f"**{self._star_star}") or {}
        return [*self._take_positional(kwargs, bool(rest)), *rest], {**kwargs, **extra}

    def decode_arguments(self, encoded: Mapping[str, Json], names: Iterable[str]) -> dict[str, Any]:
        """Return some of the arguments of an encoded call, by name.

        Raises:
            PayloadError: a value does not fit today's annotation.
        """
        values = self._values or self.prepare()
        return {name: self._decode(name, values[name], encoded[name]) for name in names}

    def encode_result(self, value: Any) -> Json:
        """Encode what the function returned.

        Raises:
            PayloadError: the value does not fit the annotation or cannot be stored.
        """
        return self._encode("return", (self._values or self.prepare())["return"], value, False)

    def decode_result(self, encoded: Json) -> Any:
        """Return the result of its JSON.

        Raises:
            PayloadError: the value does not fit today's annotation.
        """
        return self._decode("return", (self._values or self.prepare())["return"], encoded)

    def canonical(self, encoded: Mapping[str, Json]) -> str:
        """Return the text by which two encoded calls are compared.

        The call is decoded and encoded again with today's annotations; one that does not fit them is
        compared as it was recorded.
        """
        try:
            args, kwargs = self.decode_call(encoded)
            return canonical_text(typing.cast(Json, self.encode_call(args, kwargs)))
        except (PayloadError, TypeError):
            return canonical_text(dict(encoded))

    def same(self, one: Mapping[str, Json], other: Mapping[str, Json]) -> bool:
        """Tell whether two encoded calls are the same: in their text, or at least once they are decoded.

        A Decimal is the same with more zeros behind it, an instant in another time zone.
        """
        if self.canonical(one) == self.canonical(other):
            return True
        try:
            return alike(self.decode_call(one), self.decode_call(other))
        except (PayloadError, TypeError):
            return False

    def prepare(self) -> dict[str, ValueCodec]:
        """Build the codecs of all parameters now, so that a wrong annotation shows before a call.

        Raises:
            DefinitionError: an annotation cannot be resolved or encoded.
        """
        values = {name: self._codec(name, f"parameter {name!r}") for name in self.parameters}
        if self._star is not None:
            values["*" + self._star] = self._codec(self._star, f"parameter '*{self._star}'")
        if self._star_star is not None:
            values["**" + self._star_star] = self._codec(self._star_star, f"parameter '**{self._star_star}'")
        values["return"] = self._codec("return", "the result")
        self._values = values
        return values

    def _codec(self, name: str, what: str) -> ValueCodec:
        return ValueCodec(self._annotations.get(name, Any), what=f"{self.what}: {what}")

    @functools.cached_property
    def _annotations(self) -> dict[str, Any]:
        function: Any = inspect.unwrap(self._function)
        while isinstance(function, functools.partial):
            function = inspect.unwrap(function.func)
        if not hasattr(function, "__annotations__"):
            function = type(function).__call__
        wanted = {*self._signature.parameters, "return"}
        # A stand-in with the wanted names only: what is injected may have names that are unknown at run time.
        stand_in = types.SimpleNamespace(
            __annotations__={k: v for k, v in function.__annotations__.items() if k in wanted},
            __type_params__=getattr(function, "__type_params__", ()),
        )
        names = getattr(function, "__globals__", {})
        try:
            return typing.get_type_hints(stand_in, globalns=names, include_extras=True)
        except Exception as error:
            raise DefinitionError(
                f"{self.what}: its annotations cannot be resolved ({first_line(error)}); import these names "
                "at run time, not under TYPE_CHECKING, and define them at module level."
            ) from error

    def _encode(self, name: str, codec: ValueCodec, value: Any, from_json: bool) -> Json:
        from_json = from_json and not isinstance(value, bytes)  # of which Celery's JSON has an envelope of its own
        try:
            return codec.encode(codec.decode(value) if from_json else value)
        except Exception as error:
            raise PayloadError(f"{self.what}: {_label(name)} cannot be stored: {reason(error)}") from error

    def _decode(self, name: str, codec: ValueCodec, value: Json) -> Any:
        try:
            return codec.decode(value)
        except Exception as error:
            raise PayloadError(
                f"{self.what}: {_label(name)} as recorded does not fit today's annotation: {explain(error)} "
                "Make the annotation accept it, or register a new version."
            ) from error

    def _refuse_recorded(self, encoded: Mapping[str, Json], values: Mapping[str, ValueCodec]) -> NoReturn:
        gone = ", ".join(sorted(short(name) for name in encoded if name not in values or name == "return"))
        lacking = ", ".join(sorted(self._required - encoded.keys()))
        told = [f"has no parameter {gone} today"] if gone else []
        told += [f"requires {lacking} today, which was not recorded"] if lacking else []
        raise PayloadError(
            f"{self.what} {' and '.join(told)}; keep its parameters, give new ones a default, "
            "or register a new version."
        )

    def _takes(self, extra: dict[str, Any]) -> bool:
        """Say whether ``**`` takes these names: all but those of parameters that keywords can name."""
        return self._star_star is not None and self._keywords.isdisjoint(extra)

    def _take_positional(self, kwargs: dict[str, Any], has_rest: bool) -> list[Any]:
        """Move to a list what must be passed by position, with defaults where the call left a gap."""
        needed = len(self._positional) if has_rest else 0
        for index, name in enumerate(self._positional):
            if name not in self._keywords and name in kwargs:
                needed = index + 1
        args: list[Any] = []
        for index, name in enumerate(self._positional):
            if name in kwargs:
                args.append(kwargs.pop(name))
            elif index < needed:
                args.append(self._signature.parameters[name].default)
            else:
                break
        return args

    def _refuse_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> NoReturn:
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.what}: {error}") from None
        raise TypeError(f"{self.what} cannot be called with these arguments")


class PlainCodec(FunctionCodec):
    """Encode calls of a function that is known elsewhere alone: any arguments, as Celery's messages carry them.

    What a compensation is given by parameter name arrives by that name.
    """

    def __init__(self, *, what: str) -> None:
        super().__init__(_anything, what=what)

    def decode_call(self, encoded: Mapping[str, Json]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of an encoded call; see `FunctionCodec.decode_call`."""
        named = {name: value for name, value in encoded.items() if name[0] != "*"}
        args, kwargs = super().decode_call({name: value for name, value in encoded.items() if name not in named})
        return args, {**kwargs, **named}

    def canonical(self, encoded: Mapping[str, Json]) -> str:
        """Return the text by which two encoded calls are compared, whether or not their values are in envelopes."""
        return canonical_text(encode_any(self.decode_call(encoded)))


def _anything(*args: MessageValue, **kwargs: MessageValue) -> MessageValue:
    """The shape of a call of which nothing is known."""


def _named(parameters: list[inspect.Parameter], kind: inspect._ParameterKind) -> str | None:
    return next((p.name for p in parameters if p.kind is kind), None)


def _label(name: str) -> str:
    return "the result" if name == "return" else f"parameter {short(name)!r}"
