"""Ranges of numeric options, declared with the field: ``lr: Annotated[float, Range(0, 1)]``."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union


@dataclasses.dataclass(frozen=True, repr=False)
class Range:
    """The numbers from `least` to `most`; NaN and infinity are in none.

    Args:
        least, most: the bounds, both finite.
        above: `least` itself is too small.
        below: `most` itself is too large.
    """

    least: float
    most: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        low = self.least < value if self.above else self.least <= value
        return low and (value < self.most if self.below else value <= self.most)

    def __repr__(self) -> str:
        return f"{'(' if self.above else '['}{self.least}, {self.most}{')' if self.below else ']'}"


# Sizes of networks have a limit: a slip of the finger would be an hour of allocation.
Seed = Annotated[int, Range(0, 2**32 - 1)]
Steps = Annotated[int, Range(0, 10**9)]
Count = Annotated[int, Range(1, 10**9)]
Width = Annotated[int, Range(1, 2**14)]
Channels = Annotated[int, Range(1, 2**12)]
Depth = Annotated[int, Range(1, 256)]
MaybeDepth = Annotated[int, Range(0, 256)]
Levels = Annotated[int, Range(2, 2**16)]
Weight = Annotated[float, Range(0, 10**6)]
Share = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, below=True)]
Num = Annotated[int, Range(1, 10**6)]
Label = Annotated[int, Range(0, 10**9)]
Temperature = Annotated[float, Range(0, 1000)]


@dataclasses.dataclass
class Options:
    """A dataclass of options, whose numbers are checked when it is made.

    Raises:
        ValueError: a number out of the range of its field, or none; also in options within.
    """

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))


def check_ranges(kind: type, values: Mapping[str, Any], prefix: str = "") -> None:
    """Compare values with the ranges that the fields of a dataclass declare, and those within it.

    Args:
        kind: the dataclass.
        values: field -> value; options within are mappings, or have attributes.
        prefix: of the names in the message, as "engine.".

    Raises:
        ValueError: the first value that does not fit.
    """
    for name, hint in field_types(kind).items():
        value = values[name]
        if dataclasses.is_dataclass(hint):
            within = value if isinstance(value, Mapping) else vars(value)
            check_ranges(typing.cast(type, hint), within, f"{prefix}{name}.")
        elif not _fits(hint, value):
            raise ValueError(f"{prefix}{name} must be {describe(hint)}, got {value!r}")


def check_number(name: str, hint: Any, value: Any) -> None:
    """Raises ValueError unless a value fits a type as `Share`; the message gives it `name`."""
    if not _fits(hint, value):
        raise ValueError(f"{name} must be {describe(hint)}, got {value!r}")


def field_types(kind: type) -> dict[str, Any]:
    """Field -> its type with what `Annotated` adds; nothing for what is no dataclass."""
    if not dataclasses.is_dataclass(kind):
        return {}
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def describe(hint: Any) -> str:
    """A type in words: "an integer in [1, 8], or null"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{describe(arguments[0])} in {arguments[1]!r}"
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is list:
        return f"a list [...], each {describe(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} numbers [...], each {describe(arguments[0])}"
    if origin in (Union, types.UnionType):
        return ", or ".join(map(describe, arguments))
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
}


def _fits(hint: Any, value: Any) -> bool:
    """Whether the numbers in a value are in the ranges of its type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        kinds = (int, float) if arguments[0] is float else arguments[0]
        return isinstance(value, kinds) and not isinstance(value, bool) and value in arguments[1]
    if origin in (Union, types.UnionType):
        return any(_fits(argument, value) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(arguments[0], item) for item in value)
    if origin is tuple:
        same = isinstance(value, (tuple, list)) and len(value) == len(arguments)
        return same and all(map(_fits, arguments, value))
    return value is None if hint is type(None) else True
