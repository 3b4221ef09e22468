"""Forms: what a description from a file must look like, proven before anything uses it; a message names the place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Form = Callable[[str, Any], None]  # raises ValueError if the value, which is at that place, has another form
LARGEST = 2**63 - 1
MOST_DIMENSIONS = 64  # of a tensor of torch


def simple(what: str, holds: Callable[[Any], bool]) -> Form:
    """The form of values for which `holds` is true; `what` names them."""

    def check(place: str, value: Any) -> None:
        if not holds(value):
            raise ValueError(f"{place}: expected {what}, got {_short(value)}")

    return check


def optional(form: Form) -> Form:
    """The form of a value that has another form, or is null."""

    def check(place: str, value: Any) -> None:
        if value is not None:
            form(place, value)

    return check


def list_of(form: Form) -> Form:
    """A list of values of one form."""

    def check(place: str, value: Any) -> None:
        if not isinstance(value, list):
            raise ValueError(f"{place}: expected a list, got {_short(value)}")
        for number, item in enumerate(value):
            form(f"{place}[{number}]", item)

    return check


def table_of(form: Form) -> Form:
    """An object whose values have one form, whatever their names."""

    def check(place: str, value: Any) -> None:
        _object(place, value)
        for name, item in value.items():
            form(f"{place}.{name}", item)

    return check


def record(fields: Mapping[str, Form], others: Mapping[str, Form] | None = None) -> Form:
    """An object with these fields, and perhaps others; fields that are not named here may be there, and anything."""

    def check(place: str, value: Any) -> None:
        _object(place, value)
        missing = [name for name in fields if name not in value]
        if missing:
            raise ValueError(f"{place}: expected a field {missing[0]!r}, got none")
        for name, form in {**(others or {}), **fields}.items():
            if name in value:
                form(f"{place}.{name}", value[name])

    return check


def _object(place: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected an object, got {_short(value)}")


def _short(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}" if isinstance(value, (str, int, float)) else type(value).__name__


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number that a tensor can be as large as."""
    return type(value) is int and 0 <= value <= LARGEST


def is_shape(value: Any) -> bool:
    """Whether a value is a shape that a tensor can have."""
    few = isinstance(value, list) and len(value) <= MOST_DIMENSIONS and all(map(is_whole, value))
    return few and math.prod(value) <= LARGEST


TEXT = simple("a text", lambda value: isinstance(value, str))
WHOLE = simple("a whole number from 0 up", is_whole)
NUMBER = simple("a finite number", lambda value: type(value) in (int, float) and abs(value) <= LARGEST)
SHAPE = simple("a shape, a list of whole numbers", is_shape)
OBJECT = table_of(lambda place, value: None)
