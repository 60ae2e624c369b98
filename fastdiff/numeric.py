"""Checks of the numbers that a user gives. An error names the argument that was wrong."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .showing import brief

_DECLARED = ("float", "int", "float | None", "int | None", float, int)


def check_numbers(**values: Any) -> None:
    """Raise TypeError for what is no number: a text, None, a list, a tensor of several; ValueError for an integer that
    is greater than any float."""
    for name, value in values.items():
        if type(value) is float or (type(value) is int and value.bit_length() <= 1023):
            continue
        if type(value) is int:
            raise ValueError(f"{name} is greater than a float64 can be; got an integer of {value.bit_length()} bits.")
        # What float() takes as it is; it would read a text too, which is none of them.
        if not hasattr(type(value), "__float__") or math.prod(getattr(value, "shape", ())) != 1:
            raise TypeError(f"{name} must be a number; got {brief(value)}.")


def check_fields(self: Any) -> None:
    """``check_numbers`` for what the fields of a dataclass declare as numbers; None where they say that it may be."""
    for field in dataclasses.fields(self) if dataclasses.is_dataclass(self) else ():
        value = getattr(self, field.name)
        if field.type in _DECLARED and not (value is None and "None" in str(field.type)):
            check_numbers(**{field.name: value})
