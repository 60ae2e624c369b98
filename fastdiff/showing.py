"""How values and objects are shown to a person: on one line, tensors by dtype and shape."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

LONGEST = 80  # characters of a value in a message


def brief(value: Any) -> str:
    """A value on one line: a tensor by dtype and shape, anything else by its repr, cut to ``LONGEST``."""
    if isinstance(value, Tensor):
        return f"tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def brief_fields(self: Any) -> str:
    """``__repr__`` of an object: of a dataclass's, the fields that differ from their defaults."""
    shown = []
    for field in dataclasses.fields(self) if dataclasses.is_dataclass(self) else ():
        value, default = getattr(self, field.name), field.default
        if isinstance(value, Tensor) or value is not default and value != default:
            shown.append(f"{field.name}={brief(value)}")
    return f"{type(self).__name__}({', '.join(shown)})"
