"""How values and objects are shown to a person: on one line, tensors by dtype and shape; and where warnings point."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from typing import Any

from torch import Tensor

LONGEST = 80  # characters of a value in a message


def brief(value: Any) -> str:
    """A value on one line: a tensor by dtype and shape, a class by its name, anything else by its repr, cut to
    ``LONGEST``."""
    if isinstance(value, Tensor):
        return f"tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}, not an object of it"
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def printable(text: str) -> str:
    """Text of a file, or a file's name, as it can be shown anywhere: what is no text, and what a terminal would obey,
    becomes a replacement character."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def warn(message: str) -> None:
    """A UserWarning that points at the line outside of fastdiff which led to it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "fastdiff":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def brief_fields(self: Any) -> str:
    """``__repr__`` of an object: of a dataclass's, the fields that differ from their defaults."""
    shown = []
    for field in dataclasses.fields(self) if dataclasses.is_dataclass(self) else ():
        value, default = getattr(self, field.name), field.default
        if isinstance(value, Tensor) or value is not default and value != default:
            shown.append(f"{field.name}={brief(value)}")
    return f"{type(self).__name__}({', '.join(shown)})"
